#include "cuda/loss_kernels_cuda.h"
#include "cuda/softmax_loss_kernel-inl.h"

namespace codistill::internal {

SoftmaxKernel SoftmaxKernelFloat32(bool teach, bool one, bool kept) {
  constexpr NumberFormat kFormat = NumberFormat::kFloat32;
  if (!teach) {
    return kept ? &SoftmaxLossKernel<kFormat, SoftmaxMode::kPlain, true>
                : &SoftmaxLossKernel<kFormat, SoftmaxMode::kPlain, false>;
  }
  if (one) {
    return kept ? &SoftmaxLossKernel<kFormat, SoftmaxMode::kOne, true>
                : &SoftmaxLossKernel<kFormat, SoftmaxMode::kOne, false>;
  }
  return &SoftmaxLossKernel<kFormat, SoftmaxMode::kGeneral, false>;
}

}  // namespace codistill::internal
