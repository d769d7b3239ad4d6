// Conversions between number formats for kernels, by whole numbers as on the CPU
// (common/tensor/bfloat16.h, float16.h): what the device's own instructions make of a NaN is
// another. A dozen operations at most, a fraction of what the time of a number's way through memory
// leaves. Included after cuda/device.h.

#ifndef CODISTILL_CUDA_NUMBER_BITS_H_
#define CODISTILL_CUDA_NUMBER_BITS_H_

#include <cstdint>

#include "cuda/device.h"

namespace codistill {

__device__ __forceinline__ uint32_t Bfloat16Bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded;
}

__device__ __forceinline__ float OfBfloat16Bits(uint32_t value) {
  return __uint_as_float(value << 16);
}

__device__ __forceinline__ uint32_t Float16Bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  // A carry out of the fraction lands in the exponent, as it should.
  uint32_t result = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1)) >> 13;
  // Added to 1/2, a number below 2^-14 is rounded to multiples of 2^-24: its bits are the half's.
  const uint32_t small = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  if (magnitude < 0x38800000) result = small;
  if (magnitude >= 0x477ff000) result = 0x7c00;
  if (magnitude > 0x7f800000) result = 0x7e00;
  return result | (bits >> 16 & 0x8000);
}

__device__ __forceinline__ float OfFloat16Bits(uint32_t value) {
  const uint32_t magnitude = (value & 0x7fff) << 13;
  const uint32_t exponent = magnitude & (0x7c00u << 13);
  uint32_t result = magnitude + ((127 - 15) << 23);
  const float small = __uint_as_float(result + (1u << 23)) - __uint_as_float(113u << 23);
  if (exponent == 0x7c00u << 13) result += (128 - 16) << 23;
  if (exponent == 0) result = __float_as_uint(small);
  return __uint_as_float(result | (value & 0x8000) << 16);
}

}  // namespace codistill

#endif  // CODISTILL_CUDA_NUMBER_BITS_H_
