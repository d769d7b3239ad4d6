#include "cuda/global_norm_cuda.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "common/base/random.h"
#include "cuda/testing/device_array.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

class GlobalNormCudaTest : public DeviceTest {
 protected:
  // Tensor t lies t % 4 floats behind a multiple of 16 bytes.
  void Put(const std::vector<std::vector<float>>& tensors) {
    tensors_ = tensors;
    arrays_.clear();
    host_list_.clear();
    device_list_.clear();
    for (size_t t = 0; t < tensors_.size(); ++t) {
      arrays_.emplace_back(tensors_[t], t % 4);
      host_list_.push_back({tensors_[t].data(), static_cast<int64_t>(tensors_[t].size())});
      device_list_.push_back({arrays_.back().get(), host_list_.back().size});
    }
  }

  GlobalNorm OnDevice() const {
    const Workspace workspace(GlobalNormWorkspaceBytes(device_list_));
    GlobalNorm norm;
    EXPECT_TRUE(LaunchGlobalNorm(device_list_, workspace.get(), nullptr).ok());
    EXPECT_TRUE(FinishGlobalNorm(workspace.get(), nullptr, &norm).ok());
    return norm;
  }

  GlobalNorm OnCpu() const {
    GlobalNorm norm;
    EXPECT_TRUE(GlobalNormCpu(host_list_, 1, &norm).ok());
    return norm;
  }

  std::vector<std::vector<float>> tensors_;
  std::vector<DeviceArray<float>> arrays_;
  std::vector<FloatArray> host_list_, device_list_;
};

std::vector<std::vector<float>> Tensors(const std::vector<int64_t>& sizes) {
  RandomStream random(9);
  std::vector<std::vector<float>> tensors;
  for (const int64_t size : sizes) {
    tensors.emplace_back(size);
    for (float& value : tensors.back()) value = static_cast<float>(random.Normal());
  }
  return tensors;
}

const std::vector<int64_t> kSizes = {5, 0, 1, 64, 100001, 2, 3, 16384, 16385, 0, 16387, 1023, 0};

TEST_F(GlobalNormCudaTest, AgreesWithTheCpu) {
  Put(Tensors(kSizes));
  const GlobalNorm want = OnCpu();
  double first = 0;
  InEveryOrder([&] {
    const GlobalNorm norm = OnDevice();
    EXPECT_NEAR(norm.sum_of_squares, want.sum_of_squares, 1e-12 * want.sum_of_squares);
    EXPECT_EQ(norm.first_not_finite, -1);
    if (first == 0) first = norm.sum_of_squares;
    EXPECT_EQ(norm.sum_of_squares, first);
  });
}

TEST_F(GlobalNormCudaTest, TakesMoreTensorsThanALaunchHolds) {
  std::vector<int64_t> sizes;
  for (int i = 0; i < 500; ++i) sizes.push_back(i % 7);
  std::vector<std::vector<float>> tensors = Tensors(sizes);
  Put(tensors);
  const GlobalNorm want = OnCpu();
  EXPECT_NEAR(OnDevice().sum_of_squares, want.sum_of_squares, 1e-12 * want.sum_of_squares);
  tensors[499][0] = std::numeric_limits<float>::infinity();
  Put(tensors);
  EXPECT_EQ(OnDevice().first_not_finite, 499);
}

TEST_F(GlobalNormCudaTest, NamesTheFirstTensorThatIsNotFinite) {
  std::vector<std::vector<float>> tensors = Tensors(kSizes);
  tensors[11][1000] = std::numeric_limits<float>::quiet_NaN();
  Put(tensors);
  EXPECT_EQ(OnDevice().first_not_finite, 11);
  for (const size_t at : {size_t{0}, size_t{50000}, size_t{100000}}) {
    std::vector<std::vector<float>> copy = tensors;
    copy[4][at] = -std::numeric_limits<float>::infinity();
    Put(copy);
    InEveryOrder([&] {
      const GlobalNorm norm = OnDevice();
      EXPECT_EQ(norm.first_not_finite, 4);
      EXPECT_FALSE(std::isfinite(norm.sum_of_squares));
    });
  }
}

TEST_F(GlobalNormCudaTest, HoldsTheLargestNumbersAndNothing) {
  Put({std::vector<float>(20000, std::numeric_limits<float>::max())});
  const GlobalNorm norm = OnDevice();
  EXPECT_EQ(norm.first_not_finite, -1);
  EXPECT_NEAR(norm.norm() / std::numeric_limits<float>::max(), std::sqrt(20000.0), 1e-9);
  Put({});
  EXPECT_EQ(OnDevice().sum_of_squares, 0);
  Put({{}, {}});
  EXPECT_EQ(OnDevice().sum_of_squares, 0);
  EXPECT_EQ(OnDevice().first_not_finite, -1);
}

TEST(GlobalNormCudaValidationTest, NamesTheArgumentAtFault) {
  alignas(16) char workspace[64];
  const float x = 0;
  EXPECT_EQ(LaunchGlobalNorm({{&x, 0}, {nullptr, 1}}, workspace, nullptr).message(),
            "global norm: tensors: 1 is null");
  EXPECT_EQ(LaunchGlobalNorm({{&x, -1}}, workspace, nullptr).message(),
            "global norm: tensors: the size of 0 is -1; want 0 or more");
  EXPECT_THAT(std::string(LaunchGlobalNorm({}, nullptr, nullptr).message()),
              HasSubstr("workspace is null"));
}

}  // namespace
}  // namespace codistill
