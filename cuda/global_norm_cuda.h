// The CUDA twin of global_norm.h, on device memory, enqueued on a stream (a cudaStream_t) of the
// current device. No CUDA header is needed to use it. Built only with --config=cuda.
//
//   CODISTILL_RETURN_IF_ERROR(LaunchGlobalNorm(tensors, workspace, stream));
//   ...  // what clips may read the GlobalNorm at the start of the workspace, in stream order
//   CODISTILL_RETURN_IF_ERROR(FinishGlobalNorm(workspace, stream, &norm));
//
// The sum is taken in another order than on the CPU, always the same one for the same sizes: equal
// bits from run to run, and the CPU's to 1e-12.

#ifndef CODISTILL_CUDA_GLOBAL_NORM_CUDA_H_
#define CODISTILL_CUDA_GLOBAL_NORM_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "cuda/global_norm.h"

namespace codistill {

// Bytes of device memory, aligned to 16 bytes, that a launch needs until Finish. Tensors with a
// negative size count as empty.
size_t GlobalNormWorkspaceBytes(absl::Span<const FloatArray> tensors);

// Returns at once and allocates nothing; the list itself is in the CPU's memory and read before
// this returns. Leaves a GlobalNorm at the start of the workspace. INVALID_ARGUMENT names the
// argument, and the tensor, at fault; INTERNAL has CUDA's name for an error.
absl::Status LaunchGlobalNorm(absl::Span<const FloatArray> tensors, void* workspace, void* stream);

// Waits for the stream and fetches the result.
absl::Status FinishGlobalNorm(const void* workspace, void* stream, GlobalNorm* result);

}  // namespace codistill

#endif  // CODISTILL_CUDA_GLOBAL_NORM_CUDA_H_
