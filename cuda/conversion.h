// Numbers from one format into another, on the CPU; conversion_cuda.h has the same on CUDA devices,
// with the same bits. What rounds how is said where the loops for one thread are:
// common/tensor/bfloat16.h, float16.h and int8_rows.h.

#ifndef CODISTILL_CUDA_CONVERSION_H_
#define CODISTILL_CUDA_CONVERSION_H_

#include <cstdint>

#include "absl/status/status.h"
#include "cuda/number_format.h"

namespace codistill {

// `n` numbers from `from` to `to`, one of which is float32 and the other float16 or bfloat16:
// rounded to nearest, ties to even; what is too large for float16 becomes infinite, a NaN stays
// one. The arrays do not overlap; no alignment beyond that of their elements is needed.
// INVALID_ARGUMENT names the argument at fault. Thread-safe; the same for any number of threads.
absl::Status ConvertCpu(const void* from, NumberFormat from_format, int64_t n, void* to,
                        NumberFormat to_format, int threads);

// `rows` x `columns` float32, row-major, as int8 with a scale for every row (a channel of a weight,
// an example's logits): from = scale * to, `to` in [-127, 127]. `scales` is [rows].
// INVALID_ARGUMENT names the argument at fault, for numbers that are not finite the first row that
// has one; the results are then unspecified. Otherwise as above.
absl::Status QuantizeRowsCpu(const float* from, int64_t rows, int64_t columns, int8_t* to,
                             float* scales, int threads);

// The numbers again: to = scale * from.
absl::Status DequantizeRowsCpu(const int8_t* from, const float* scales, int64_t rows,
                               int64_t columns, float* to, int threads);

// The checks, shared with the CUDA twins.
absl::Status ValidateConversion(const void* from, NumberFormat from_format, int64_t n,
                                const void* to, NumberFormat to_format);
absl::Status ValidateInt8Rows(const void* from, const void* scales, int64_t rows, int64_t columns,
                              const void* to);
// What QuantizeRows says of a row with a number that is not finite.
absl::Status RowNotFinite(int64_t row);

}  // namespace codistill

#endif  // CODISTILL_CUDA_CONVERSION_H_
