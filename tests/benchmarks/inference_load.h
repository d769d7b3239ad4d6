#ifndef CODISTILL_TESTS_BENCHMARKS_INFERENCE_LOAD_H_
#define CODISTILL_TESTS_BENCHMARKS_INFERENCE_LOAD_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/tensor/tensor.h"

namespace codistill {

// Many clients of one prediction server, in one process: ModelInfer calls with FP32 batches made
// beforehand, over several connections. Every answer is compared with the one that its batch had
// when it was asked alone. Used by one thread.
class InferenceLoad {
 public:
  struct Options {
    std::string address;
    std::string model;
    std::string input = "x";
    std::vector<Tensor> batches;  // [examples, ...]; none: ServerLive is called instead
    int connections = 16;         // to the server each is a client
    absl::Duration deadline = absl::Seconds(5);
    double tolerance = 1e-3;  // of an answer's values, of the largest one
  };
  // Waits until the server is ready and asks each batch once.
  static absl::StatusOr<std::unique_ptr<InferenceLoad>> Start(Options options);
  virtual ~InferenceLoad() = default;

  struct Counts {
    double seconds = 0;
    int64_t offered = 0;
    int64_t answered = 0;               // right, and within the deadline
    int64_t refused = 0;                // RESOURCE_EXHAUSTED
    int64_t refused_without_delay = 0;  // of those, without google.rpc.RetryInfo
    int64_t expired = 0;                // DEADLINE_EXCEEDED
    int64_t failed = 0;                 // anything else
    std::string first_failure;
    std::vector<double> latencies;       // of those answered, seconds
    std::vector<double> answered_after;  // when they came, seconds from the beginning
    std::vector<double> refusal_latencies;
    double largest_difference = 0;  // of any answer, of the largest value
    // What was still under way then: not among the above.
    int64_t answered_later = 0;
    int64_t refused_later = 0;
  };
  // What came within `time`; then waits for what is still under way.
  // Closed loop: so many calls under way all the time.
  virtual Counts Closed(int outstanding, absl::Duration time) = 0;
  // Open loop: calls arrive as a Poisson process of `rate` a second, whatever becomes of the
  // others.
  virtual Counts Open(double rate, absl::Duration time) = 0;
};

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_INFERENCE_LOAD_H_
