#ifndef CODISTILL_COMMON_TENSOR_FLOAT16_H_
#define CODISTILL_COMMON_TENSOR_FLOAT16_H_

#include <cstddef>
#include <cstdint>

// IEEE 754 half precision (binary16) as it travels in DT_HALF (little-endian): 11 bits of
// significand, from 2^-24 to 65,504.
namespace codistill {

// One number, rounded to nearest, ties to even; what rounds to more than 65,504 becomes infinite, a
// NaN stays one (quiet, with its sign).
uint16_t ToFloat16(float value);
float FromFloat16(uint16_t value);

// The same for `n` elements, vectorised for the processor at hand; every element has the bits that
// the function above gives. The ranges do not overlap; no alignment is needed.
void ToFloat16(const float* from, size_t n, uint16_t* to);
void FromFloat16(const uint16_t* from, size_t n, float* to);

}  // namespace codistill

#endif  // CODISTILL_COMMON_TENSOR_FLOAT16_H_
