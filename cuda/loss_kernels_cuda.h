// The loss's CUDA kernels, each compiled in a file of its own.

#ifndef CODISTILL_CUDA_LOSS_KERNELS_CUDA_H_
#define CODISTILL_CUDA_LOSS_KERNELS_CUDA_H_

#include "cuda/device.h"
#include "cuda/loss_params.h"

namespace codistill::internal {

using SoftmaxKernel = void (*)(LossParams);

// `teach`: there is psi. `one`: of one dense teacher, kMatch. `kept`: all arrays of a row are in
// shared memory.
SoftmaxKernel SoftmaxKernelFloat32(bool teach, bool one, bool kept);
SoftmaxKernel SoftmaxKernelBfloat16(bool teach, bool one, bool kept);

// Threads of the largest block, for kernels with clusters and for the general one.
constexpr int kMaxThreads = 1024, kMaxGeneralThreads = 512;
// Shared memory that the softmax kernels declare themselves, at most.
constexpr int kStaticSharedBytes = 3 << 10;

cudaError_t LaunchElementwise(const LossParams& params, NumberFormat format, cudaStream_t stream);

// Before: weights and prior. Behind: what the rows' parts come to.
cudaError_t LaunchPrepare(const LossParams& params, cudaStream_t stream);
cudaError_t LaunchSums(const LossParams& params, cudaStream_t stream);

}  // namespace codistill::internal

#endif  // CODISTILL_CUDA_LOSS_KERNELS_CUDA_H_
