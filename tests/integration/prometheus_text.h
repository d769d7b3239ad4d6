#ifndef CODISTILL_TESTS_INTEGRATION_PROMETHEUS_TEXT_H_
#define CODISTILL_TESTS_INTEGRATION_PROMETHEUS_TEXT_H_

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace codistill {

// One line of a Prometheus exposition that has a value.
struct PrometheusSample {
  std::string name;
  std::map<std::string, std::string> labels;
  double value = 0;
};

// Reads the text format 0.0.4 and holds it to its rules: names, labels with escapes, numbers; TYPE
// before a family's samples and at most once, families in one piece, no series twice; histograms
// with rising buckets, of which +Inf is there and equals the count. INVALID_ARGUMENT names the
// line.
absl::StatusOr<std::vector<PrometheusSample>> ParsePrometheus(absl::string_view text);

}  // namespace codistill

#endif  // CODISTILL_TESTS_INTEGRATION_PROMETHEUS_TEXT_H_
