#include "common/tensor/int8_rows.h"

#include <algorithm>
#include <cmath>

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "common/tensor/int8_rows.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// The largest magnitude; NaN if a number is not finite.
float Magnitude(const float* HWY_RESTRICT from, int64_t n) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto zero = hn::Zero(d);
  // Two of each, because the processor can take in more than one at a time.
  auto largest0 = zero, largest1 = zero, spoilt0 = zero, spoilt1 = zero;
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    const auto x0 = hn::LoadU(d, from + i), x1 = hn::LoadU(d, from + i + lanes);
    largest0 = hn::Max(largest0, hn::Abs(x0));
    largest1 = hn::Max(largest1, hn::Abs(x1));
    spoilt0 = hn::MulAdd(x0, zero, spoilt0);  // 0 times an infinity is no number
    spoilt1 = hn::MulAdd(x1, zero, spoilt1);
  }
  float largest = hn::GetLane(hn::MaxOfLanes(d, hn::Max(largest0, largest1)));
  float spoilt = hn::GetLane(hn::SumOfLanes(d, hn::Add(spoilt0, spoilt1)));
  for (; i < n; ++i) {
    largest = std::max(largest, std::abs(from[i]));
    spoilt += from[i] * 0.0f;
  }
  return largest + spoilt;
}

void Quantize(const float* HWY_RESTRICT from, int64_t n, float inverse, int8_t* HWY_RESTRICT to) {
  const hn::ScalableTag<float> d;
  const hn::Rebind<int8_t, decltype(d)> d8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto factor = hn::Set(d, inverse);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto q = hn::NearestInt(hn::Mul(hn::LoadU(d, from + i), factor));
    hn::StoreU(hn::DemoteTo(d8, q), d8, to + i);
  }
  for (; i < n; ++i) to[i] = static_cast<int8_t>(std::nearbyint(from[i] * inverse));
}

void Dequantize(const int8_t* HWY_RESTRICT from, int64_t n, float scale, float* HWY_RESTRICT to) {
  const hn::ScalableTag<float> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<int8_t, decltype(d)> d8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto factor = hn::Set(d, scale);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto q = hn::PromoteTo(di, hn::LoadU(d8, from + i));
    hn::StoreU(hn::Mul(hn::ConvertTo(d, q), factor), d, to + i);
  }
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]) * scale;
}

int64_t QuantizeRows(const float* from, int64_t rows, int64_t columns, int8_t* to, float* scales) {
  for (int64_t row = 0; row < rows; ++row) {
    const float magnitude = Magnitude(from + row * columns, columns);
    if (!std::isfinite(magnitude)) return row;
    const bool zeros = magnitude < 0x1p-100f;
    scales[row] = zeros ? 0 : magnitude / 127;
    Quantize(from + row * columns, columns, zeros ? 0 : 127 / magnitude, to + row * columns);
  }
  return -1;
}

void DequantizeRows(const int8_t* from, const float* scales, int64_t rows, int64_t columns,
                    float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    Dequantize(from + row * columns, columns, scales[row], to + row * columns);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace codistill {
namespace internal {

HWY_EXPORT(Magnitude);
HWY_EXPORT(QuantizeRows);
HWY_EXPORT(DequantizeRows);

}  // namespace internal

float LargestMagnitude(const float* from, int64_t n) {
  return HWY_DYNAMIC_DISPATCH(internal::Magnitude)(from, n);
}

int64_t QuantizeInt8Rows(const float* from, int64_t rows, int64_t columns, int8_t* to,
                         float* scales) {
  return HWY_DYNAMIC_DISPATCH(internal::QuantizeRows)(from, rows, columns, to, scales);
}

void DequantizeInt8Rows(const int8_t* from, const float* scales, int64_t rows, int64_t columns,
                        float* to) {
  HWY_DYNAMIC_DISPATCH(internal::DequantizeRows)(from, scales, rows, columns, to);
}

}  // namespace codistill
#endif  // HWY_ONCE
