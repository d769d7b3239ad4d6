#ifndef CODISTILL_COMMON_CONFIG_TEST_JOBS_H_
#define CODISTILL_COMMON_CONFIG_TEST_JOBS_H_

#include <string>
#include <vector>

#include "proto/job.pb.h"

// For tests: job files without a mistake, and the messages about those with some.
namespace codistill {

extern const char kGood[];   // two groups on synthetic data; what a test takes unless it says more
extern const char kCsv[];    // one group on CSV: two numeric columns, one categorical, two classes
extern const char kText[];   // one group on text, with recurrent state
extern const char kImage[];  // one group on images, with random crops and flips

// Writes `text` as a job file of the running test and returns its path.
std::string WriteJob(const std::string& text);

// The job of `text`, which must have no mistake.
JobConfig Good(const std::string& text = kGood);

// The messages about `text` with `overrides`, without the heading; none about a good job.
std::vector<std::string> Mistakes(const std::string& text,
                                  const std::vector<std::string>& overrides = {});

}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_TEST_JOBS_H_
