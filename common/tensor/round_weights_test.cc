#include "common/tensor/round_weights.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "common/tensor/bfloat16.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

std::vector<float> Normal(int64_t n) {
  std::mt19937 engine(5);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) value = normal(engine);
  return values;
}

TEST(RoundWeightsTest, Bfloat16IsThatOfTheElement) {
  for (const int64_t n : {0, 1, 7, 1023, 1024, 2500}) {
    const std::vector<float> before = Normal(n);
    std::vector<float> after = before;
    RoundToBfloat16(after.data(), n);
    for (int64_t i = 0; i < n; ++i) {
      ASSERT_EQ(after[i], FromBfloat16(ToBfloat16(before[i]))) << i << " of " << n;
    }
  }
}

TEST(RoundWeightsTest, Int8HasAScaleARow) {
  for (const int64_t columns : {1, 3, 16, 100, 517}) {
    const int64_t rows = 5;
    std::vector<float> before = Normal(rows * columns);
    for (int64_t i = 0; i < columns; ++i) before[columns + i] *= 1e6f;  // no other row suffers
    std::vector<float> after = before;
    RoundToInt8(after.data(), rows, columns);
    for (int64_t r = 0; r < rows; ++r) {
      float largest = 0;
      for (int64_t i = 0; i < columns; ++i) {
        largest = std::max(largest, std::abs(before[r * columns + i]));
      }
      const double scale = static_cast<double>(largest) / 127;
      for (int64_t i = 0; i < columns; ++i) {
        const double value = after[r * columns + i];
        EXPECT_LE(std::abs(value - before[r * columns + i]), scale * 0.5001) << r << " " << i;
        const double steps = value / scale;
        EXPECT_NEAR(steps, std::round(steps), 1e-4);
        EXPECT_LE(std::abs(steps), 127.001);
      }
    }
  }
}

TEST(RoundWeightsTest, Int8KeepsZerosAndLosesWhatIsNothing) {
  std::vector<float> values = {0, 0, 0, 1e-40f, -1e-40f, 0, 2, 0, -127};
  RoundToInt8(values.data(), 3, 3);
  EXPECT_EQ(values, (std::vector<float>{0, 0, 0, 0, 0, 0, 2, 0, -127}));
  RoundToInt8(values.data(), 0, 3);
  RoundToInt8(values.data(), 3, 0);
}

}  // namespace
}  // namespace codistill
