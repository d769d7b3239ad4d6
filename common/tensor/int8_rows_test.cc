#include "common/tensor/int8_rows.h"

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "hwy/targets.h"

namespace codistill {
namespace {

// Instruction sets are a parameter: all that this processor has and the loops are compiled for.
std::vector<int64_t> Targets() {
  std::vector<int64_t> targets;
  for (int64_t target : {HWY_AVX3, HWY_AVX2, HWY_SSE4, HWY_NEON, HWY_EMU128, HWY_SCALAR}) {
    if (hwy::SupportedTargets() & HWY_TARGETS & target) targets.push_back(target);
  }
  return targets;
}

class Int8RowsTest : public ::testing::TestWithParam<int64_t> {
 protected:
  Int8RowsTest() { hwy::SetSupportedTargetsForTest(GetParam()); }
  ~Int8RowsTest() override { hwy::SetSupportedTargetsForTest(0); }
};

INSTANTIATE_TEST_SUITE_P(Targets, Int8RowsTest, ::testing::ValuesIn(Targets()),
                         [](const ::testing::TestParamInfo<int64_t>& info) {
                           return std::string(hwy::TargetName(info.param));
                         });

TEST_P(Int8RowsTest, EveryElementIsTheNearestMultipleOfTheScale) {
  std::mt19937 random(3);
  for (const int64_t columns : {1, 2, 7, 15, 16, 17, 31, 33, 64, 100, 1001}) {
    const int64_t rows = 5;
    std::vector<float> from(rows * columns);
    for (size_t i = 0; i < from.size(); ++i) {
      from[i] = std::normal_distribution<float>(-3, 5)(random) *
                static_cast<float>(std::pow(10.0, static_cast<double>(i) / columns - 2));
    }
    std::vector<int8_t> q(from.size() + 1, 99);
    std::vector<float> scales(rows), back(from.size() + 1, 1234.5f);
    ASSERT_EQ(QuantizeInt8Rows(from.data(), rows, columns, q.data(), scales.data()), -1);
    DequantizeInt8Rows(q.data(), scales.data(), rows, columns, back.data());
    EXPECT_EQ(q.back(), 99);
    EXPECT_EQ(back.back(), 1234.5f);
    for (int64_t row = 0; row < rows; ++row) {
      float magnitude = 0;
      for (int64_t c = 0; c < columns; ++c) {
        magnitude = std::max(magnitude, std::abs(from[row * columns + c]));
      }
      EXPECT_EQ(scales[row], magnitude / 127);
      int most = 0;
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t i = row * columns + c;
        // The same number whether a vector or the rest of the row took it.
        ASSERT_EQ(q[i], static_cast<int>(std::nearbyint(from[i] * (127 / magnitude)))) << columns;
        ASSERT_EQ(back[i], static_cast<float>(q[i]) * scales[row]);
        ASSERT_LE(std::abs(static_cast<double>(back[i]) - from[i]), scales[row] * 0.50001);
        most = std::max(most, std::abs(static_cast<int>(q[i])));
      }
      EXPECT_EQ(most, 127);
    }
  }
}

TEST_P(Int8RowsTest, ExtremesKeepTheirSignAndZerosStay) {
  const std::vector<float> from = {0,      0,       0, 0,        0, 1e-35f, -1e-35f, 0,  0,
                                   1e-40f, 3.4e38f, 0, -3.4e38f, 0, 1,      -2,      -1, 0.5f};
  std::vector<int8_t> q(from.size());
  std::vector<float> scales(3), back(from.size());
  // Three rows: zeros and next to nothing, then the largest floats, then ties.
  ASSERT_EQ(QuantizeInt8Rows(from.data(), 1, 10, q.data(), scales.data()), -1);
  EXPECT_EQ(scales[0], 0);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(q[i], 0);
  ASSERT_EQ(QuantizeInt8Rows(from.data() + 10, 2, 4, q.data(), scales.data()), -1);
  EXPECT_EQ(
      q, (std::vector<int8_t>{127, 0, -127, 0, 64, -127, -64, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
  DequantizeInt8Rows(q.data(), scales.data(), 2, 4, back.data());
  EXPECT_TRUE(std::isfinite(back[0]));
  EXPECT_EQ(back[2], -back[0]);
  EXPECT_EQ(back[5], -2);
}

TEST_P(Int8RowsTest, NamesTheFirstRowThatIsNotFinite) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    for (const int64_t at : {0, 5, 40, 66}) {
      const int64_t columns = 67;
      std::vector<float> from(4 * columns, 1);
      from[2 * columns + at] = bad;
      std::vector<int8_t> q(from.size());
      std::vector<float> scales(4);
      EXPECT_EQ(QuantizeInt8Rows(from.data(), 4, columns, q.data(), scales.data()), 2) << at;
      EXPECT_TRUE(std::isnan(LargestMagnitude(from.data(), 4 * columns)));
      EXPECT_EQ(LargestMagnitude(from.data() + 3 * columns, columns), 1);
    }
  }
}

TEST_P(Int8RowsTest, NothingIsNoRow) {
  EXPECT_EQ(QuantizeInt8Rows(nullptr, 0, 7, nullptr, nullptr), -1);
  DequantizeInt8Rows(nullptr, nullptr, 0, 7, nullptr);
}

}  // namespace
}  // namespace codistill
