// What ComputeLossCpu hands to its vector kernels, after validation.

#ifndef CODISTILL_CUDA_LOSS_KERNELS_H_
#define CODISTILL_CUDA_LOSS_KERNELS_H_

#include <cstdint>

#include "cuda/loss.h"

namespace codistill {
namespace internal {

struct LossWork {
  const LossOptions* options;
  const LossInputs* inputs;
  const float* logits;
  absl::Span<const float* const> teachers;
  bool teach;          // weight > 0
  double row_scale;    // of the gradient: gradient_scale / rows
  float* gradient;     // may be null
  bool bypass_cache;   // store the gradient past the caches: it is too large to stay there
  int64_t block_rows;  // element-wise losses: rows of a block, the unit of the sums
  // Per row (softmax) or per block (element-wise), so that sums do not depend on threads.
  double* label_loss;
  double* teacher_loss;
  int64_t* correct;
};

// Softmax cross-entropy: rows [begin, end).
void SoftmaxLoss(const LossWork& work, int64_t begin, int64_t end);

// Sigmoid cross-entropy and squared error: blocks [begin, end) of block_rows rows.
void ElementwiseLoss(const LossWork& work, int64_t begin, int64_t end);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_CUDA_LOSS_KERNELS_H_
