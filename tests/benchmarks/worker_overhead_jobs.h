#ifndef CODISTILL_TESTS_BENCHMARKS_WORKER_OVERHEAD_JOBS_H_
#define CODISTILL_TESTS_BENCHMARKS_WORKER_OVERHEAD_JOBS_H_

#include <string>

#include "absl/status/statusor.h"
#include "proto/job.pb.h"

namespace codistill {

// Jobs of one shard and one worker without teachers, which never end by themselves, and their data,
// made up and written into `data_dir`.

// ResNet-20 on 32x32 PNG images of 10 classes, 64 a step.
absl::StatusOr<JobConfig> ResNet20Job(const std::string& data_dir);

// ResNet-50 (models/resnet.py, layout large) on square PNG images of 10 classes, in bfloat16
// and on a device.
absl::StatusOr<JobConfig> ResNet50Job(const std::string& data_dir, int side, int batch,
                                      const std::string& device);

// LSTM language model, 2 layers of 256, embedding 256, over a text of 13,777 different tokens; 32
// lanes of 32 tokens a step. `steps`: how many the text must last for in one pass.
absl::StatusOr<JobConfig> LstmJob(const std::string& data_dir, int steps);

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_WORKER_OVERHEAD_JOBS_H_
