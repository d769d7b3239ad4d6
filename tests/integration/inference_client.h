#ifndef CODISTILL_TESTS_INTEGRATION_INFERENCE_CLIENT_H_
#define CODISTILL_TESTS_INTEGRATION_INFERENCE_CLIENT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/tensor/tensor.h"

namespace codistill {

// What a prediction server says of a batch, and of itself.
struct Inference {
  Tensor logits;
  std::string model_version;  // "generation.step"
  int64_t generation = 0;
  int64_t step = 0;
  int64_t latest_step = 0;
  int64_t staleness_steps = 0;
};

// One ModelInfer call of the Open Inference Protocol with generated protobuf code only, as any
// other client would make it: nothing of the product's own encoding is in it.
absl::StatusOr<Inference> Infer(const std::string& address, const std::string& model,
                                const std::vector<NamedTensor>& inputs, absl::Duration timeout);

}  // namespace codistill

#endif  // CODISTILL_TESTS_INTEGRATION_INFERENCE_CLIENT_H_
