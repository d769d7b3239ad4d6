#include "cuda/elementwise_loss_kernel-inl.h"
#include "cuda/loss_kernels_cuda.h"

namespace codistill::internal {

cudaError_t LaunchElementwise(const LossParams& params, NumberFormat format, cudaStream_t stream) {
  // A warp for rows of which each of its lanes has few elements.
  const int group = params.classes <= 512 ? 32 : kElementwiseThreads;
  const int64_t per_block = kElementwiseThreads / group;
  const auto blocks = static_cast<unsigned>((params.rows + per_block - 1) / per_block);
  return LaunchKernel(format == NumberFormat::kFloat32
                          ? &ElementwiseLossKernel<NumberFormat::kFloat32>
                          : &ElementwiseLossKernel<NumberFormat::kBfloat16>,
                      blocks, kElementwiseThreads, 0, stream, params, group);
}

}  // namespace codistill::internal
