#include "common/tensor/float16.h"

#include <cstring>

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "common/tensor/float16.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// By whole numbers rather than by the processor's own conversions, which not all have and which
// heed the rounding and denormal modes of the thread.

// Returns how many elements, a multiple of a vector, were converted.
size_t NarrowToHalf(const float* HWY_RESTRICT from, size_t n, uint16_t* HWY_RESTRICT to) {
  const hn::ScalableTag<float> df;
  const hn::RebindToSigned<decltype(df)> di;
  const hn::Rebind<uint16_t, decltype(df)> d16;
  const size_t lanes = hn::Lanes(df);
  const auto magnitude_mask = hn::Set(di, 0x7fffffff);
  const auto infinity = hn::Set(di, 0x7f800000);
  const auto overflow = hn::Set(di, 0x477ff000);  // 65,520 and more are infinite
  const auto normal = hn::Set(di, 0x38800000);    // 2^-14, the smallest normal half
  const auto rebias = hn::Set(di, static_cast<int32_t>(0xc8000fffu));
  const auto half = hn::Set(df, 0.5f);
  const auto half_bits = hn::BitCast(di, half);
  const auto one = hn::Set(di, 1);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto bits = hn::BitCast(di, hn::LoadU(df, from + i));
    const auto magnitude = hn::And(bits, magnitude_mask);
    // A carry out of the fraction lands in the exponent, as it should.
    const auto odd = hn::And(hn::ShiftRight<13>(magnitude), one);
    auto result = hn::ShiftRight<13>(hn::Add(hn::Add(magnitude, rebias), odd));
    // Added to 1/2, a number below 2^-14 is rounded to multiples of 2^-24: its bits are the half's.
    const auto small =
        hn::Sub(hn::BitCast(di, hn::Add(hn::BitCast(df, magnitude), half)), half_bits);
    result = hn::IfThenElse(hn::Lt(magnitude, normal), small, result);
    result = hn::IfThenElse(hn::Lt(magnitude, overflow), result, hn::Set(di, 0x7c00));
    result = hn::IfThenElse(hn::Gt(magnitude, infinity), hn::Set(di, 0x7e00), result);
    const auto sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(di, 0x8000));
    hn::StoreU(hn::DemoteTo(d16, hn::Or(result, sign)), d16, to + i);
  }
  return i;
}

size_t WidenFromHalf(const uint16_t* HWY_RESTRICT from, size_t n, float* HWY_RESTRICT to) {
  const hn::ScalableTag<float> df;
  const hn::RebindToSigned<decltype(df)> di;
  const hn::Rebind<uint16_t, decltype(df)> d16;
  const size_t lanes = hn::Lanes(df);
  const auto exponent = hn::Set(di, 0x7c00 << 13);
  const auto rebias = hn::Set(di, (127 - 15) << 23);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto bits = hn::PromoteTo(di, hn::LoadU(d16, from + i));
    const auto magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(di, 0x7fff)));
    const auto has = hn::And(magnitude, exponent);
    auto result = hn::Add(magnitude, rebias);
    const auto beyond = hn::Add(result, hn::Set(di, (128 - 16) << 23));  // infinite, or no number
    const auto small = hn::Sub(hn::BitCast(df, hn::Add(result, hn::Set(di, 1 << 23))),
                               hn::BitCast(df, hn::Set(di, 113 << 23)));
    result = hn::IfThenElse(hn::Eq(has, exponent), beyond, result);
    result = hn::IfThenElse(hn::Eq(has, hn::Zero(di)), hn::BitCast(di, small), result);
    const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(di, 0x8000)));
    hn::StoreU(hn::BitCast(df, hn::Or(result, sign)), df, to + i);
  }
  return i;
}

}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace codistill {
namespace internal {

HWY_EXPORT(NarrowToHalf);
HWY_EXPORT(WidenFromHalf);

namespace {

uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
float OfBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace
}  // namespace internal

uint16_t ToFloat16(float value) {
  const uint32_t bits = internal::BitsOf(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t sign = bits >> 16 & 0x8000;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {
    result = internal::BitsOf(internal::OfBits(magnitude) + 0.5f) - internal::BitsOf(0.5f);
  } else {
    result = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(result | sign);
}

float FromFloat16(uint16_t value) {
  const uint32_t magnitude = (value & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x7c00u << 13;
  uint32_t result = magnitude + ((127 - 15) << 23);
  if (exponent == 0x7c00u << 13) {
    result += (128 - 16) << 23;
  } else if (exponent == 0) {
    result = internal::BitsOf(internal::OfBits(result + (1 << 23)) - internal::OfBits(113 << 23));
  }
  return internal::OfBits(result | (value & 0x8000u) << 16);
}

void ToFloat16(const float* from, size_t n, uint16_t* to) {
  size_t i = HWY_DYNAMIC_DISPATCH(internal::NarrowToHalf)(from, n, to);
  for (; i < n; ++i) to[i] = ToFloat16(from[i]);
}

void FromFloat16(const uint16_t* from, size_t n, float* to) {
  size_t i = HWY_DYNAMIC_DISPATCH(internal::WidenFromHalf)(from, n, to);
  for (; i < n; ++i) to[i] = FromFloat16(from[i]);
}

}  // namespace codistill
#endif  // HWY_ONCE
