#include "common/tensor/float16.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr uint32_t kHalves = 1 << 16;

bool IsNan(uint16_t half) { return (half & 0x7fff) > 0x7c00; }

// The number that the bits of a half stand for, by its definition.
double Value(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int fraction = half & 1023;
  const double magnitude = exponent == 31  ? std::numeric_limits<double>::infinity()
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

// Every float of a kind that matters: around every half, and halfway between every two.
std::vector<float> Floats() {
  std::vector<float> floats = {0.0f, -0.0f, 1e-45f, 1e-30f, 65519.99f, 65520.0f, 1e30f, 3.4e38f};
  for (uint32_t h = 0; h < 0x7c00; ++h) {
    const double here = Value(static_cast<uint16_t>(h));
    const double next = h == 0x7bff ? 65536 : Value(static_cast<uint16_t>(h + 1));
    for (const double value : {here, (here + next) / 2}) {
      const float f = static_cast<float>(value);
      for (const float g : {f, std::nextafter(f, 0.0f), std::nextafter(f, 1e9f)}) {
        floats.push_back(g);
        floats.push_back(-g);
      }
    }
  }
  return floats;
}

TEST(Float16Test, EveryHalfIsItsNumberAndComesBack) {
  for (uint32_t h = 0; h < kHalves; ++h) {
    const auto half = static_cast<uint16_t>(h);
    const float value = FromFloat16(half);
    if (IsNan(half)) {
      EXPECT_TRUE(std::isnan(value)) << h;
      EXPECT_TRUE(IsNan(ToFloat16(value))) << h;
      continue;
    }
    ASSERT_EQ(value, Value(half)) << h;
    ASSERT_EQ(std::signbit(value), (half & 0x8000) != 0) << h;
    ASSERT_EQ(ToFloat16(value), half) << h;
  }
}

TEST(Float16Test, RoundsToTheNearestAndTiesToEven) {
  for (const float value : Floats()) {
    const uint16_t half = ToFloat16(value);
    ASSERT_EQ((half & 0x8000) != 0, std::signbit(value)) << value;
    const uint16_t magnitude = half & 0x7fff;
    const double exact = std::fabs(static_cast<double>(value));
    if (exact >= 65520) {
      ASSERT_EQ(magnitude, 0x7c00) << value;
      continue;
    }
    ASSERT_LT(magnitude, 0x7c00) << value;
    const double error = std::fabs(Value(magnitude) - exact);
    for (const int step : {-1, 1}) {
      if (magnitude == 0 && step < 0) continue;
      const auto other = static_cast<uint16_t>(magnitude + step);
      const double others = std::fabs((other == 0x7c00 ? 65536.0 : Value(other)) - exact);
      ASSERT_LE(error, others) << value;
      if (error == others) {
        ASSERT_EQ(magnitude % 2, 0) << value;
      }
    }
  }
}

TEST(Float16Test, VectorsHaveTheBitsOfSingleNumbers) {
  std::vector<float> floats = Floats();
  floats.push_back(std::numeric_limits<float>::infinity());
  floats.push_back(std::numeric_limits<float>::quiet_NaN());
  floats.push_back(-std::numeric_limits<float>::quiet_NaN());
  std::vector<uint16_t> halves(floats.size() + 1, 0x1234);
  ToFloat16(floats.data(), floats.size(), halves.data());
  for (size_t i = 0; i < floats.size(); ++i) {
    ASSERT_EQ(halves[i], ToFloat16(floats[i])) << floats[i];
  }
  EXPECT_EQ(halves.back(), 0x1234);

  std::vector<uint16_t> all(kHalves);
  for (uint32_t h = 0; h < kHalves; ++h) all[h] = static_cast<uint16_t>(h);
  for (const size_t n : {size_t{kHalves}, size_t{1}, size_t{37}}) {
    std::vector<float> wide(n + 1, 5);
    FromFloat16(all.data() + kHalves - n, n, wide.data());
    for (size_t i = 0; i < n; ++i) {
      const float want = FromFloat16(all[kHalves - n + i]);
      ASSERT_EQ(std::memcmp(&wide[i], &want, sizeof(want)), 0) << kHalves - n + i;
    }
    EXPECT_EQ(wide.back(), 5);
  }
}

}  // namespace
}  // namespace codistill
