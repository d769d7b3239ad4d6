#include "common/model/average_logits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

using Average = void (*)(absl::Span<const float* const>, int64_t, int64_t, float*);

std::vector<float> Of(Average average, const std::vector<std::vector<float>>& members, int64_t rows,
                      int64_t columns) {
  std::vector<const float*> pointers;
  for (const auto& member : members) pointers.push_back(member.data());
  std::vector<float> out(rows * columns + 1, 12345);
  average(pointers, rows, columns, out.data());
  EXPECT_EQ(out.back(), 12345) << "written beyond the end";
  out.pop_back();
  return out;
}

TEST(AverageLogitsTest, ByHand) {
  const std::vector<std::vector<float>> members = {{0, std::log(3.0f)}, {std::log(9.0f), 0}};
  // (1/4, 3/4) and (9/10, 1/10).
  const std::vector<float> soft = Of(AverageSoftmax, members, 1, 2);
  EXPECT_NEAR(std::exp(soft[0]), 0.575, 1e-6);
  EXPECT_NEAR(std::exp(soft[1]), 0.425, 1e-6);
  const std::vector<float> mean = Of(AverageLogits, members, 1, 2);
  EXPECT_FLOAT_EQ(mean[0], std::log(9.0f) / 2);
  EXPECT_FLOAT_EQ(mean[1], std::log(3.0f) / 2);
  // Sigmoids 1/2 and 9/10 have the mean 7/10; 3/4 and 1/2 have 5/8.
  const std::vector<float> odds = Of(AverageSigmoid, members, 1, 2);
  EXPECT_NEAR(odds[0], std::log(7.0 / 3), 1e-6);
  EXPECT_NEAR(odds[1], std::log(5.0 / 3), 1e-6);
}

TEST(AverageLogitsTest, AgreesWithDoublesForAllShapes) {
  std::mt19937 engine(3);
  for (const int64_t columns : {1, 2, 3, 15, 16, 17, 100, 1000}) {
    const int64_t rows = 3;
    std::vector<std::vector<float>> members(3, std::vector<float>(rows * columns));
    std::normal_distribution<float> normal(2, 8);
    for (auto& member : members) {
      for (float& z : member) z = normal(engine);
    }
    const std::vector<float> soft = Of(AverageSoftmax, members, rows, columns);
    const std::vector<float> mean = Of(AverageLogits, members, rows, columns);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> sums(members.size(), 0);
      for (size_t m = 0; m < members.size(); ++m) {
        for (int64_t c = 0; c < columns; ++c)
          sums[m] += std::exp(1.0 * members[m][r * columns + c]);
      }
      for (int64_t c = 0; c < columns; ++c) {
        double p = 0, z = 0;
        for (size_t m = 0; m < members.size(); ++m) {
          p += std::exp(1.0 * members[m][r * columns + c]) / sums[m] / 3;
          z += members[m][r * columns + c] / 3.0;
        }
        EXPECT_NEAR(soft[r * columns + c], std::log(p), 2e-5) << columns << " " << c;
        EXPECT_NEAR(mean[r * columns + c], z, 1e-5);
      }
    }
  }
}

TEST(AverageLogitsTest, StaysFiniteWhereOneClassHasAll) {
  const std::vector<float> soft = Of(AverageSoftmax, {{500, -500, 0}, {300, -300, 0}}, 1, 3);
  EXPECT_FLOAT_EQ(soft[0], 0);
  EXPECT_LT(soft[1], -87);
  EXPECT_TRUE(std::isfinite(soft[1]));
  EXPECT_TRUE(std::isfinite(soft[2]));
  const std::vector<float> odds = Of(AverageSigmoid, {{200}, {-200}}, 1, 1);
  EXPECT_NEAR(odds[0], 0, 1e-6);
  EXPECT_FLOAT_EQ(Of(AverageSigmoid, {{90}, {90}}, 1, 1)[0], 90);
  // Where doubles have no room for the probabilities either.
  for (const float sign : {1, -1}) {
    EXPECT_FLOAT_EQ(Of(AverageSigmoid, {{sign * 5000}, {sign * 5000}}, 1, 1)[0], sign * 5000);
    // The less certain one decides.
    EXPECT_FLOAT_EQ(Of(AverageSigmoid, {{sign * 5000}, {sign * 900}}, 1, 1)[0],
                    sign * (900 + std::log(2.0f)));
    EXPECT_FLOAT_EQ(Of(AverageSigmoid, {{sign * 3e38f}, {sign * 3e38f}}, 1, 1)[0], sign * 3e38f);
  }
}

TEST(AverageLogitsTest, NaNsAreNotHidden) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Average average : {AverageSoftmax, AverageLogits, AverageSigmoid}) {
    const std::vector<float> out = Of(average, {{nan, 1, 1, 1}, {1, 1, 1, 1}}, 2, 2);
    EXPECT_TRUE(std::isnan(out[0]));
    EXPECT_FALSE(std::isnan(out[2]) || std::isnan(out[3]));
  }
}

}  // namespace
}  // namespace codistill
