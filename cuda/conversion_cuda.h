// The CUDA twins of conversion.h: same results to the bit, on device memory, enqueued on a stream
// (a cudaStream_t) of the current device. No CUDA header is needed to use them. Built only with
// --config=cuda.
//
// Launch* return at once and allocate nothing; INVALID_ARGUMENT names the argument at fault,
// INTERNAL has CUDA's name for an error. Fast where pointers are aligned to 16 bytes and, of rows,
// their length is a multiple of 4.

#ifndef CODISTILL_CUDA_CONVERSION_CUDA_H_
#define CODISTILL_CUDA_CONVERSION_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "cuda/conversion.h"

namespace codistill {

// As ConvertCpu.
absl::Status LaunchConvert(const void* from, NumberFormat from_format, int64_t n, void* to,
                           NumberFormat to_format, void* stream);

// Bytes of device memory, aligned to 16 bytes, that LaunchQuantizeRows needs until Finish.
constexpr size_t kQuantizeWorkspaceBytes = 16;

// As QuantizeRowsCpu; nothing is written of a row with a number that is not finite.
absl::Status LaunchQuantizeRows(const float* from, int64_t rows, int64_t columns, int8_t* to,
                                float* scales, void* workspace, void* stream);
// Waits for the stream. INVALID_ARGUMENT names the first row with a number that is not finite.
absl::Status FinishQuantizeRows(const void* workspace, void* stream);

// As DequantizeRowsCpu.
absl::Status LaunchDequantizeRows(const int8_t* from, const float* scales, int64_t rows,
                                  int64_t columns, float* to, void* stream);

}  // namespace codistill

#endif  // CODISTILL_CUDA_CONVERSION_CUDA_H_
