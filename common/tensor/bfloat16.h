#ifndef CODISTILL_COMMON_TENSOR_BFLOAT16_H_
#define CODISTILL_COMMON_TENSOR_BFLOAT16_H_

#include <cstddef>
#include <cstdint>

// bfloat16: the upper half of an IEEE 754 single, as it travels in DT_BFLOAT16 (little-endian).
namespace codistill {

// One number, rounded to nearest, ties to even; what is too large becomes infinite, subnormal
// numbers stay. A NaN stays one (quiet, with its sign and the upper bits of its payload).
uint16_t ToBfloat16(float value);
float FromBfloat16(uint16_t value);

// The same for `n` elements, vectorised for the processor at hand; every element has the bits that
// the function above gives. The ranges do not overlap; no alignment is needed.
void ToBfloat16(const float* from, size_t n, uint16_t* to);
void FromBfloat16(const uint16_t* from, size_t n, float* to);

}  // namespace codistill

#endif  // CODISTILL_COMMON_TENSOR_BFLOAT16_H_
