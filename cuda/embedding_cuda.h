// The CUDA twins of embedding.h: same results to the bit, on device memory, enqueued on a stream (a
// cudaStream_t) of the current device. No CUDA header is needed to use them. Built only with
// --config=cuda.
//
//   CODISTILL_RETURN_IF_ERROR(LaunchGatherRows(table, rows, dim, index, n, to, workspace, stream));
//   ...  // enqueue what uses the rows
//   CODISTILL_RETURN_IF_ERROR(FinishGatherRows(rows, workspace, stream));
//
// Launch* return at once and allocate nothing; INVALID_ARGUMENT names the argument at fault,
// INTERNAL has CUDA's name for an error. What can be said only with a look at the arrays is found
// by the device and said by Finish*, which wait for the stream and may be left out where the
// arrays are known to be right: a place at fault is left out by the kernels, no memory is touched
// for it. Fast where pointers are aligned to 16 bytes and dim is a multiple of 4.

#ifndef CODISTILL_CUDA_EMBEDDING_CUDA_H_
#define CODISTILL_CUDA_EMBEDDING_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "cuda/embedding.h"

namespace codistill {

// Bytes of device memory, aligned to 16 bytes, that a launch needs until Finish.
constexpr size_t kGatherWorkspaceBytes = 16;
size_t SegmentSumWorkspaceBytes(const SegmentsView& segments, int64_t dim);

// As GatherRowsCpu with the `places` elements of `index`.
absl::Status LaunchGatherRows(const float* table, int64_t rows, int64_t dim, const uint32_t* index,
                              int64_t places, float* to, void* workspace, void* stream);
// INVALID_ARGUMENT names the first place whose index is no row.
absl::Status FinishGatherRows(int64_t rows, const void* workspace, void* stream);

// As SumSegmentsCpu. All arrays of `segments` are in device memory. With no pieces at all (both
// counts 0) long segments are summed by a few threads each, slowly.
absl::Status LaunchSegmentSum(const SegmentsView& segments, const float* gradients,
                              int64_t gradient_rows, int64_t dim, bool accumulate, float* to,
                              void* workspace, void* stream);
// INVALID_ARGUMENT names the first element of positions that is no row of the gradients, or what is
// inconsistent in the other arrays.
absl::Status FinishSegmentSum(const SegmentsView& segments, int64_t gradient_rows,
                              const void* workspace, void* stream);

}  // namespace codistill

#endif  // CODISTILL_CUDA_EMBEDDING_CUDA_H_
