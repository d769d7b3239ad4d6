#include "common/tensor/bfloat16.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

float OfBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Nearest of the two neighbours in exact arithmetic, ties to the even one.
uint16_t Nearest(float value) {
  const uint16_t below = static_cast<uint16_t>(BitsOf(value) >> 16);  // towards zero
  const uint16_t above = static_cast<uint16_t>(below + 1);
  const double exact = std::fabs(static_cast<double>(value));
  const double low = std::fabs(static_cast<double>(OfBits(uint32_t{below} << 16)));
  // Beyond the largest number comes what would be the next power of two.
  const double high = (above & 0x7fff) == 0x7f80
                          ? std::ldexp(1.0, 128)
                          : std::fabs(static_cast<double>(OfBits(uint32_t{above} << 16)));
  if (exact - low < high - exact) return below;
  if (exact - low > high - exact) return above;
  return (below & 1) == 0 ? below : above;
}

TEST(Bfloat16Test, RoundsToNearestEven) {
  std::vector<float> values;
  std::mt19937 random(5);
  for (int i = 0; i < 300000; ++i) {
    const float value = OfBits(static_cast<uint32_t>(random()));
    if (std::isfinite(value)) values.push_back(value);
  }
  // Around every tie of some exponents, the largest numbers, zeros and subnormal ones.
  for (uint32_t upper : {0x0000u, 0x0001u, 0x007fu, 0x0080u, 0x3f80u, 0x3f81u, 0x7f7fu, 0x8000u,
                         0x8001u, 0xbf80u, 0xff7fu}) {
    for (uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      values.push_back(OfBits(upper << 16 | lower));
    }
  }
  std::vector<uint16_t> narrow(values.size());
  ToBfloat16(values.data(), values.size(), narrow.data());
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(narrow[i], Nearest(values[i])) << values[i];
    ASSERT_EQ(narrow[i], ToBfloat16(values[i])) << values[i];
  }
}

TEST(Bfloat16Test, InfinitiesAndNansStayWhatTheyAre) {
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> values(37, 1.0f);  // in the vectors and in the rest
  std::vector<uint32_t> nans = {0x7fc00000, 0xffc00000, 0x7f800001, 0xff800001,
                                0x7fffffff, 0xffffffff, 0x7f80ffff, 0x7fa50000};
  for (size_t i = 0; i < nans.size(); ++i) {
    values[i] = OfBits(nans[i]);
    values[36 - i] = OfBits(nans[i]);
  }
  values[10] = infinity;
  values[11] = -infinity;
  std::vector<uint16_t> narrow(values.size());
  ToBfloat16(values.data(), values.size(), narrow.data());
  std::vector<float> wide(values.size());
  FromBfloat16(narrow.data(), narrow.size(), wide.data());
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(std::isnan(wide[i]), std::isnan(values[i])) << i;
    EXPECT_EQ(std::signbit(wide[i]), std::signbit(values[i])) << i;
    EXPECT_EQ(narrow[i], ToBfloat16(values[i])) << i;
  }
  EXPECT_EQ(wide[10], infinity);
  EXPECT_EQ(wide[11], -infinity);
}

TEST(Bfloat16Test, EveryNumberComesBack) {
  std::vector<uint16_t> all(65536), again(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(all.size());
  FromBfloat16(all.data(), all.size(), wide.data());
  ToBfloat16(wide.data(), wide.size(), again.data());
  for (size_t i = 0; i < all.size(); ++i) {
    ASSERT_EQ(BitsOf(wide[i]), static_cast<uint32_t>(i) << 16);
    // Signalling NaNs become quiet ones.
    ASSERT_EQ(again[i], std::isnan(wide[i]) ? all[i] | 0x40 : all[i]) << i;
  }
}

TEST(Bfloat16Test, AnyLengthAndPlace) {
  std::vector<float> values(200);
  for (size_t i = 0; i < values.size(); ++i) values[i] = 1.0f + static_cast<float>(i) / 1000;
  for (size_t begin : {0, 1, 3}) {
    for (size_t n = 0; n <= 70; ++n) {
      std::vector<uint16_t> narrow(80, 0xabcd);
      ToBfloat16(values.data() + begin, n, narrow.data() + begin);
      std::vector<float> wide(80, -7.0f);
      FromBfloat16(narrow.data() + begin, n, wide.data() + begin);
      for (size_t i = 0; i < n; ++i) {
        ASSERT_EQ(wide[begin + i], FromBfloat16(ToBfloat16(values[begin + i])));
      }
      ASSERT_EQ(narrow[begin + n], 0xabcd);
      ASSERT_EQ(wide[begin + n], -7.0f);
    }
  }
}

}  // namespace
}  // namespace codistill
