#include "common/tensor/bfloat16.h"

#include <cstring>

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "common/tensor/bfloat16.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Returns how many elements, a multiple of a vector, were converted.
size_t Narrow(const float* HWY_RESTRICT from, size_t n, uint16_t* HWY_RESTRICT to) {
  const hn::ScalableTag<float> df;
  const hn::RebindToSigned<decltype(df)> di;
  const hn::RebindToUnsigned<decltype(df)> du;
  const hn::Rebind<uint16_t, decltype(df)> d16;
  const size_t lanes = hn::Lanes(df);
  const auto infinity = hn::Set(di, 0x7f800000);
  const auto magnitude = hn::Set(di, 0x7fffffff);
  const auto half = hn::Set(du, 0x7fff);
  const auto one = hn::Set(du, 1);
  const auto quiet = hn::Set(du, 0x40);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto bits = hn::BitCast(du, hn::LoadU(df, from + i));
    // A carry out of the fraction lands in the exponent, as it should.
    const auto upper = hn::ShiftRight<16>(bits);
    const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, half), hn::And(upper, one)));
    const auto nan = hn::Gt(hn::And(hn::BitCast(di, bits), magnitude), infinity);
    const auto result =
        hn::IfThenElse(nan, hn::BitCast(di, hn::Or(upper, quiet)), hn::BitCast(di, rounded));
    hn::StoreU(hn::DemoteTo(d16, result), d16, to + i);
  }
  return i;
}

size_t Widen(const uint16_t* HWY_RESTRICT from, size_t n, float* HWY_RESTRICT to) {
  const hn::ScalableTag<float> df;
  const hn::RebindToUnsigned<decltype(df)> du;
  const hn::Rebind<uint16_t, decltype(df)> d16;
  const size_t lanes = hn::Lanes(df);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto bits = hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(d16, from + i)));
    hn::StoreU(hn::BitCast(df, bits), df, to + i);
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
HWY_EXPORT(Narrow);
HWY_EXPORT(Widen);

size_t NarrowVectors(const float* from, size_t n, uint16_t* to) {
  return HWY_DYNAMIC_DISPATCH(Narrow)(from, n, to);
}
size_t WidenVectors(const uint16_t* from, size_t n, float* to) {
  return HWY_DYNAMIC_DISPATCH(Widen)(from, n, to);
}
}  // namespace internal

uint16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float FromBfloat16(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

void ToBfloat16(const float* from, size_t n, uint16_t* to) {
  size_t i = internal::NarrowVectors(from, n, to);
  for (; i < n; ++i) to[i] = ToBfloat16(from[i]);
}

void FromBfloat16(const uint16_t* from, size_t n, float* to) {
  size_t i = internal::WidenVectors(from, n, to);
  for (; i < n; ++i) to[i] = FromBfloat16(from[i]);
}

}  // namespace codistill
#endif  // HWY_ONCE
