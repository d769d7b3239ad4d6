#include "cuda/global_norm.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "common/base/random.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

// Of awkward sizes, one longer than what one thread sums at a time, one empty.
std::vector<std::vector<float>> Tensors() {
  RandomStream random(9);
  std::vector<std::vector<float>> tensors;
  for (const int64_t size : {5, 0, 1, 64, 300001, 65536, 65537, 3}) {
    tensors.emplace_back(size);
    for (float& value : tensors.back()) value = static_cast<float>(random.Normal());
  }
  return tensors;
}

std::vector<FloatArray> Arrays(const std::vector<std::vector<float>>& tensors) {
  std::vector<FloatArray> arrays;
  for (const std::vector<float>& tensor : tensors) {
    arrays.push_back({tensor.data(), static_cast<int64_t>(tensor.size())});
  }
  return arrays;
}

TEST(GlobalNormTest, AgreesWithTheSumInLongDouble) {
  const std::vector<std::vector<float>> tensors = Tensors();
  long double want = 0;
  for (const std::vector<float>& tensor : tensors) {
    for (const float value : tensor) want += static_cast<long double>(value) * value;
  }
  GlobalNorm one, many;
  ASSERT_TRUE(GlobalNormCpu(Arrays(tensors), 1, &one).ok());
  EXPECT_NEAR(one.sum_of_squares, static_cast<double>(want), 1e-13 * static_cast<double>(want));
  EXPECT_EQ(one.norm(), std::sqrt(one.sum_of_squares));
  EXPECT_EQ(one.first_not_finite, -1);
  for (const int threads : {2, 3, 16}) {
    ASSERT_TRUE(GlobalNormCpu(Arrays(tensors), threads, &many).ok());
    EXPECT_EQ(one.sum_of_squares, many.sum_of_squares) << threads;
  }
}

TEST(GlobalNormTest, NamesTheFirstTensorThatIsNotFinite) {
  std::vector<std::vector<float>> tensors = Tensors();
  GlobalNorm norm;
  tensors[7][2] = std::numeric_limits<float>::quiet_NaN();
  ASSERT_TRUE(GlobalNormCpu(Arrays(tensors), 2, &norm).ok());
  EXPECT_EQ(norm.first_not_finite, 7);
  EXPECT_FALSE(std::isfinite(norm.sum_of_squares));
  tensors[4].back() = -std::numeric_limits<float>::infinity();
  ASSERT_TRUE(GlobalNormCpu(Arrays(tensors), 2, &norm).ok());
  EXPECT_EQ(norm.first_not_finite, 4);
}

TEST(GlobalNormTest, HoldsTheLargestNumbers) {
  std::vector<float> tensor(1000, std::numeric_limits<float>::max());
  GlobalNorm norm;
  ASSERT_TRUE(GlobalNormCpu({{tensor.data(), 1000}}, 1, &norm).ok());
  EXPECT_EQ(norm.first_not_finite, -1);
  EXPECT_NEAR(norm.norm() / std::numeric_limits<float>::max(), std::sqrt(1000.0), 1e-9);
}

TEST(GlobalNormTest, OfNothingIsZero) {
  GlobalNorm norm;
  norm.sum_of_squares = 5;
  ASSERT_TRUE(GlobalNormCpu({}, 2, &norm).ok());
  EXPECT_EQ(norm.sum_of_squares, 0);
  EXPECT_EQ(norm.first_not_finite, -1);
}

TEST(GlobalNormTest, NamesTheTensorAtFault) {
  GlobalNorm norm;
  const float x = 1;
  EXPECT_EQ(GlobalNormCpu({{&x, 1}, {nullptr, 2}}, 1, &norm).message(),
            "global norm: tensors: 1 is null");
  EXPECT_EQ(GlobalNormCpu({{&x, -3}}, 1, &norm).message(),
            "global norm: tensors: the size of 0 is -3; want 0 or more");
}

}  // namespace
}  // namespace codistill
