#include "common/tensor/sum_of_squares.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(SumOfSquaresTest, AgreesWithTheObviousLoop) {
  for (int n : {0, 1, 15, 16, 17, 1000}) {
    std::vector<float> values(n);
    double want = 0;
    for (int i = 0; i < n; ++i) {
      values[i] = 0.25f * static_cast<float>((i * 37) % 101 - 50);
      want += static_cast<double>(values[i]) * values[i];
    }
    EXPECT_DOUBLE_EQ(SumOfSquares(values.data(), n), want) << n;
  }
}

TEST(SumOfSquaresTest, IsFiniteExactlyWhenAllElementsAre) {
  std::vector<float> values(33, std::numeric_limits<float>::max());
  EXPECT_TRUE(std::isfinite(SumOfSquares(values.data(), 33)));
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    for (const int at : {0, 16, 32}) {
      std::vector<float> copy = values;
      copy[at] = bad;
      EXPECT_FALSE(std::isfinite(SumOfSquares(copy.data(), 33))) << bad << " at " << at;
    }
  }
}

}  // namespace
}  // namespace codistill
