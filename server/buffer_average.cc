#include "server/buffer_average.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace codistill {
namespace {

template <typename T>
T Load(const uint8_t* from, int64_t i) {
  T value;
  std::memcpy(&value, from + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

template <typename T>
void Store(T value, uint8_t* to, int64_t i) {
  std::memcpy(to + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

// `Decode` and `Encode` translate between what is stored and double.
template <typename T, typename Decode, typename Encode>
void Mean(absl::Span<const uint8_t* const> sources, absl::Span<const double> weights, int64_t count,
          uint8_t* to, Decode decode, Encode encode) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (size_t s = 0; s < sources.size(); ++s) {
      sum += weights[s] * decode(Load<T>(sources[s], i));
    }
    Store<T>(encode(sum), to, i);
  }
}

template <typename T>
void Maximum(absl::Span<const uint8_t* const> sources, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    T largest = Load<T>(sources[0], i);
    for (size_t s = 1; s < sources.size(); ++s) largest = std::max(largest, Load<T>(sources[s], i));
    Store<T>(largest, to, i);
  }
}

float Bfloat16ToFloat(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

uint16_t FloatToBfloat16(float value) {
  if (std::isnan(value)) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

float HalfToFloat(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int fraction = half & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

uint16_t FloatToHalf(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  const float magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // rounds to infinity
  int exponent;
  std::frexp(magnitude, &exponent);
  // In units of the last place of the result, which is 2^-24 for subnormal numbers. A carry out of
  // the fraction lands in the exponent, as it should.
  const int unit = std::max(exponent - 11, -24);
  const int scaled = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  return sign | static_cast<uint16_t>(scaled + (unit + 24) * 1024);
}

void CombineBuffers(DataType dtype, absl::Span<const uint8_t* const> sources,
                    absl::Span<const double> weights, int64_t count, uint8_t* to) {
  switch (dtype) {
    case DT_FLOAT:
      Mean<float>(
          sources, weights, count, to, [](float v) { return double{v}; },
          [](double v) { return static_cast<float>(v); });
      return;
    case DT_DOUBLE:
      Mean<double>(
          sources, weights, count, to, [](double v) { return v; }, [](double v) { return v; });
      return;
    case DT_HALF:
      Mean<uint16_t>(
          sources, weights, count, to, [](uint16_t v) { return double{HalfToFloat(v)}; },
          [](double v) { return FloatToHalf(static_cast<float>(v)); });
      return;
    case DT_BFLOAT16:
      Mean<uint16_t>(
          sources, weights, count, to, [](uint16_t v) { return double{Bfloat16ToFloat(v)}; },
          [](double v) { return FloatToBfloat16(static_cast<float>(v)); });
      return;
    case DT_INT32:
      Maximum<int32_t>(sources, count, to);
      return;
    case DT_INT64:
      Maximum<int64_t>(sources, count, to);
      return;
    case DT_UINT8:
    case DT_BOOL:
      Maximum<uint8_t>(sources, count, to);
      return;
    case DT_INT8:
      Maximum<int8_t>(sources, count, to);
      return;
    default:
      return;  // no map has such a tensor
  }
}

}  // namespace codistill
