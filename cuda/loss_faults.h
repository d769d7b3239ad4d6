// What the loss says of arrays that are not as they must be, on the CPU and on CUDA devices alike.

#ifndef CODISTILL_CUDA_LOSS_FAULTS_H_
#define CODISTILL_CUDA_LOSS_FAULTS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "cuda/loss.h"

namespace codistill {
namespace internal {

// The checks of ComputeLossCpu that ValidateLoss leaves out because they read arrays.
absl::Status ValidateArrays(const LossOptions& options, const LossInputs& inputs, int threads);

// Looks closely at a row in which something seems to be wrong; says what, naming tensor and row,
// the latter as `name`. `finite`: whether its loss is; then only probabilities can be wrong, and if
// they are not, the answer is empty. Slow.
std::string FindFault(const LossOptions& options, const LossInputs& inputs, int64_t row,
                      int64_t name, bool finite);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_CUDA_LOSS_FAULTS_H_
