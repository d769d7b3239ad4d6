#ifndef CODISTILL_TESTS_BENCHMARKS_KNOWN_GROUP_H_
#define CODISTILL_TESTS_BENCHMARKS_KNOWN_GROUP_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "tests/benchmarks/server_group.h"

namespace codistill {

// A multi-layer perceptron of three layers whose weights follow from its step, chosen such that
// every sum of its forward pass on an input of ones is exact in fp32, in whatever order it is
// taken: what it answers tells the step bit by bit, and weights of two steps together give what no
// step does. With v = step + 1 the layers give v, v^2 and v^2 * 2^(v mod 4) + v * (column mod 8).
struct KnownModel {
  int64_t inputs = 1024;  // powers of two, at most 1024
  int64_t hidden = 1024;
  int64_t outputs = 512;

  static constexpr int64_t kMaxStep = 127;  // beyond it sums are not exact

  static float Answer(int64_t step, int64_t column);
  int64_t elements() const;
  // All parameters, one after the other in the order of the archive.
  std::vector<float> Weights(int64_t step) const;
  // Names and places in a job: inputs and num_outputs.
  void Describe(ModelConfig* config) const;
  // Writes `name`.pt, .safetensors (weights of step 0) and .tensors.textproto.
  absl::Status Export(const std::string& directory, const std::string& name) const;
  // OK if `logits`, [rows, outputs], are those of `step`; else says where they are not.
  absl::Status Check(int64_t step, const float* logits, int64_t rows) const;
};

// One real parameter-server process that trains a KnownModel: each step is pushed with exactly the
// gradient that leads to the next one's weights, and published. For one thread, which lives as long
// as the group does.
class KnownGroup {
 public:
  struct Options {
    KnownModel model;
    std::string directory;  // exists; of archive, job files and logs
    int core = 1;           // of the server
  };
  static absl::StatusOr<std::unique_ptr<KnownGroup>> Start(Options options);

  // A job whose group "alpha" is this one, to be served.
  const JobConfig& job() const { return job_; }

  // Of all its steps.
  uint64_t generation() const { return worker_.registered.generation(); }

  // Pushes the next step; the cut is there when it returns. The number of that step.
  absl::StatusOr<int64_t> Publish();

 private:
  explicit KnownGroup(Options options) : options_(std::move(options)) {}

  const Options options_;
  JobConfig job_;
  std::unique_ptr<ServerGroup> group_;
  GroupWorker worker_;
  int64_t step_ = 0;
  std::vector<float> weights_;  // of step_
};

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_KNOWN_GROUP_H_
