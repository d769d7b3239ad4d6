// The CUDA twin of row_topk.h, on device memory, enqueued on a stream (a cudaStream_t) of the
// current device. No CUDA header is needed to use it. Built only with --config=cuda.
//
//   CODISTILL_RETURN_IF_ERROR(LaunchRowTopK(inputs, outputs, workspace, stream));
//   ...  // enqueue what uses the results
//   CODISTILL_RETURN_IF_ERROR(FinishRowTopK(workspace, stream));
//
// Differs from RowTopKCpu in this: k is at most kMaxCudaTopK and classes at most 2^30, values agree
// with the CPU's to 1e-5 of their size, and what is not finite is found by the device and said by
// FinishRowTopK. Indices are the same. Results repeat bit for bit.

#ifndef CODISTILL_CUDA_ROW_TOPK_CUDA_H_
#define CODISTILL_CUDA_ROW_TOPK_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "cuda/row_topk.h"

namespace codistill {

constexpr int64_t kMaxCudaTopK = 1024;

// Bytes of device memory, aligned to 16 bytes, that a launch needs until Finish.
constexpr size_t kRowTopKWorkspaceBytes = 16;

// Returns at once and allocates nothing. INVALID_ARGUMENT names the argument at fault, INTERNAL has
// CUDA's name for an error. Nothing is written of a row with a logit that is not finite.
absl::Status LaunchRowTopK(const RowTopKInputs& inputs, const RowTopKOutputs& outputs,
                           void* workspace, void* stream);

// Waits for the stream. INVALID_ARGUMENT names the first row with a logit that is not finite, which
// is also left in *not_finite_row (unless null; -1 otherwise).
absl::Status FinishRowTopK(const void* workspace, void* stream, int64_t* not_finite_row = nullptr);

}  // namespace codistill

#endif  // CODISTILL_CUDA_ROW_TOPK_CUDA_H_
