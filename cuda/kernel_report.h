// What launchers have in common: the names of CUDA's errors, and what a kernel reports from the
// device. Included by .cu files only, after cuda/device.h.

#ifndef CODISTILL_CUDA_KERNEL_REPORT_H_
#define CODISTILL_CUDA_KERNEL_REPORT_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "cuda/device.h"

namespace codistill {

// INTERNAL with CUDA's name for the error.
inline absl::Status CudaStatus(const char* kernel, const char* action, cudaError_t error) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(kernel, ": ", action, ": ", cudaGetErrorName(error), ": ",
                                          cudaGetErrorString(error)));
}

// The lowest of the numbers that threads found at fault, at the start of a workspace: all ones
// while there is none, which as an int64 is -1.
using Lowest = unsigned long long;  // NOLINT(runtime/int): CUDA's atomics want it

// Sets `n` of them, in stream order.
inline absl::Status ClearLowest(const char* kernel, void* workspace, int n, cudaStream_t stream) {
  return CudaStatus(kernel, "clearing the report",
                    cudaMemsetAsync(workspace, 0xff, n * sizeof(Lowest), stream));
}

// Waits for the stream and copies the first `bytes` of the workspace to the CPU.
inline absl::Status FetchReport(const char* kernel, const void* workspace, size_t bytes, void* to,
                                cudaStream_t stream) {
  CODISTILL_RETURN_IF_ERROR(
      CudaStatus(kernel, "copying the report",
                 cudaMemcpyAsync(to, workspace, bytes, cudaMemcpyDeviceToHost, stream)));
  return CudaStatus(kernel, "waiting for the stream", cudaStreamSynchronize(stream));
}

inline absl::Status ValidateWorkspace(const char* kernel, const void* workspace) {
  if (workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 16 == 0) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      kernel, ": workspace is ", workspace == nullptr ? "null" : "not aligned to 16 bytes"));
}

// A grid of so many blocks.
inline absl::Status ValidateBlocks(const char* kernel, const char* argument, int64_t blocks) {
  if (blocks <= INT32_MAX) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(kernel, ": ", argument, " is too large: it would take ", blocks,
                   " blocks of threads; at most ", INT32_MAX, " can be launched"));
}

inline bool IsAligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace codistill

#endif  // CODISTILL_CUDA_KERNEL_REPORT_H_
