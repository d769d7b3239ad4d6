#ifndef CODISTILL_COMMON_TENSOR_ROUND_WEIGHTS_H_
#define CODISTILL_COMMON_TENSOR_ROUND_WEIGHTS_H_

#include <cstdint>

// Rounds fp32 values in place to what a narrower type can hold, so that arithmetic in fp32 shows
// what a model of that type would say. Vectorised; no allocation.
namespace codistill {

// Each of `n` values to the nearest bfloat16, ties to even.
void RoundToBfloat16(float* values, int64_t n);

// Each of `rows` rows of `columns` values to a multiple of its own scale, max|v| / 127 of that row:
// symmetric int8, zero stays zero. Values must be finite. Where the largest is so small that the
// scale would be subnormal the row becomes zeros.
void RoundToInt8(float* values, int64_t rows, int64_t columns);

}  // namespace codistill

#endif  // CODISTILL_COMMON_TENSOR_ROUND_WEIGHTS_H_
