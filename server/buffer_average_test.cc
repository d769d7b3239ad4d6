#include "server/buffer_average.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

template <typename T>
std::vector<T> Combine(DataType dtype, const std::vector<std::vector<T>>& sources,
                       const std::vector<double>& weights) {
  std::vector<const uint8_t*> pointers;
  for (const auto& source : sources) {
    pointers.push_back(reinterpret_cast<const uint8_t*>(source.data()));
  }
  std::vector<T> to(sources[0].size());
  CombineBuffers(dtype, pointers, weights, static_cast<int64_t>(to.size()),
                 reinterpret_cast<uint8_t*>(to.data()));
  return to;
}

TEST(CombineBuffersTest, FloatsAreAveragedByWeight) {
  EXPECT_EQ(Combine<float>(DT_FLOAT, {{1, -4}, {5, 8}}, {0.75, 0.25}), (std::vector<float>{2, -1}));
  EXPECT_EQ(Combine<double>(DT_DOUBLE, {{1, -4}, {5, 8}}, {0.5, 0.5}), (std::vector<double>{3, 2}));
  EXPECT_EQ(Combine<uint16_t>(DT_HALF, {{FloatToHalf(1)}, {FloatToHalf(5)}}, {0.75, 0.25})[0],
            FloatToHalf(2));
  EXPECT_EQ(Combine<uint16_t>(DT_BFLOAT16, {{0x3f80}, {0x40a0}}, {0.75, 0.25})[0], 0x4000);
}

TEST(CombineBuffersTest, OfIntegersTheMaximumIsTaken) {
  EXPECT_EQ(Combine<int64_t>(DT_INT64, {{7, -9}, {3, -2}}, {0.5, 0.5}),
            (std::vector<int64_t>{7, -2}));
  EXPECT_EQ(Combine<int32_t>(DT_INT32, {{7}, {30}}, {0.9, 0.1}), (std::vector<int32_t>{30}));
  EXPECT_EQ(Combine<int8_t>(DT_INT8, {{7, -9}, {3, -2}}, {0.5, 0.5}), (std::vector<int8_t>{7, -2}));
  EXPECT_EQ(Combine<uint8_t>(DT_BOOL, {{0, 0}, {1, 0}}, {0.5, 0.5}), (std::vector<uint8_t>{1, 0}));
}

TEST(CombineBuffersTest, OneSourceIsCopiedBitByBit) {
  EXPECT_EQ(Combine<float>(DT_FLOAT, {{0.1f, -3e38f}}, {1}), (std::vector<float>{0.1f, -3e38f}));
}

TEST(HalfTest, EveryHalfSurvivesTheRoundTrip) {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float value = HalfToFloat(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(value))));
    } else {
      ASSERT_EQ(FloatToHalf(value), half) << value;
    }
  }
}

TEST(HalfTest, RoundsToNearestEven) {
  EXPECT_EQ(FloatToHalf(1.0f + 1.0f / 2048), FloatToHalf(1.0f));  // a tie
  EXPECT_EQ(FloatToHalf(1.0f + 3.0f / 2048), FloatToHalf(1.0f + 2.0f / 1024));
  EXPECT_EQ(FloatToHalf(65519.0f), FloatToHalf(65504.0f));
  EXPECT_TRUE(std::isinf(HalfToFloat(FloatToHalf(65520.0f))));
  EXPECT_EQ(FloatToHalf(std::numeric_limits<float>::denorm_min()), 0);
}

}  // namespace
}  // namespace codistill
