#include "common/tensor/tensor.h"

#include <limits>

#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(DataTypeTest, EveryTypeHasSizeAndName) {
  for (int i = DataType_MIN + 1; i <= DataType_MAX; ++i) {
    const DataType dtype = static_cast<DataType>(i);
    EXPECT_GT(ElementSize(dtype), 0u) << DataType_Name(dtype);
    EXPECT_EQ(DataTypeFromName(DataTypeName(dtype)), dtype);
  }
  EXPECT_EQ(ElementSize(DT_INVALID), 0u);
  EXPECT_EQ(DataTypeName(DT_BFLOAT16), "BF16");
  EXPECT_EQ(DataTypeFromName("FP32"), DT_FLOAT);
  EXPECT_EQ(DataTypeFromName("fp32"), DT_INVALID);
  EXPECT_EQ(DataTypeFromName("INVALID"), DT_INVALID);
}

TEST(ElementCountTest, ScalarsZerosNegativesAndOverflow) {
  constexpr int64_t kBig = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(ElementCount({}), 1);
  EXPECT_EQ(ElementCount({2, 3, 4}), 24);
  EXPECT_EQ(ElementCount({kBig}), kBig);
  EXPECT_EQ(ElementCount({kBig, 2}), -1);
  EXPECT_EQ(ElementCount({kBig, 2, 0}), 0);
  EXPECT_EQ(ElementCount({0, -1}), -1);
  EXPECT_EQ(ElementCount({-2, -3}), -1);
  EXPECT_EQ(ShapeString({32, 128}), "[32, 128]");
  EXPECT_EQ(ShapeString({}), "[]");
}

TEST(TensorTest, AllocatesAlignedAndZeroes) {
  const Tensor zeros = Tensor::Zeros(DT_INT64, {3, 5});
  EXPECT_EQ(zeros.bytes(), 120u);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(zeros.data()) % 64, 0u);
  for (int64_t x : zeros.As<int64_t>()) EXPECT_EQ(x, 0);

  const Tensor nothing = Tensor::Allocate(DT_FLOAT, {0, 7});
  EXPECT_FALSE(nothing.empty());
  EXPECT_EQ(nothing.bytes(), 0u);
  EXPECT_TRUE(Tensor().empty());
}

TEST(TensorTest, CopiesShareAndOwnerOutlivesTheTensor) {
  Tensor a = Tensor::Zeros(DT_FLOAT, {4});
  const Tensor b = a;
  a.As<float>()[2] = 7;
  EXPECT_EQ(b.As<float>()[2], 7);
  std::shared_ptr<const void> owner = a.owner();
  const float* data = b.As<float>().data();
  a = Tensor();
  const_cast<Tensor&>(b) = Tensor();
  EXPECT_EQ(data[2], 7);
  EXPECT_EQ(owner.use_count(), 1);
}

TEST(TensorTest, AdoptKeepsTheOwnersBytes) {
  auto bytes = std::make_shared<std::vector<uint8_t>>(6, 9);
  Tensor tensor = Tensor::Adopt(DT_UINT8, {2, 3}, bytes->data(), bytes);
  EXPECT_EQ(tensor.data(), bytes->data());
  EXPECT_EQ(bytes.use_count(), 2);
  EXPECT_EQ(tensor.As<uint8_t>().back(), 9);
}

TEST(TensorDeathTest, WrongElementTypeIsOurBug) {
  Tensor tensor = Tensor::Zeros(DT_HALF, {2});
  EXPECT_EQ(tensor.As<uint16_t>().size(), 2u);
  EXPECT_DEATH(tensor.As<float>(), "FP16");
}

TEST(TensorDeathTest, MemoryOfADeviceIsNotTheHosts) {
  float value = 0;
  const Tensor tensor =
      Tensor::Adopt(DT_FLOAT, {1}, &value, std::make_shared<int>(0), /*device=*/2);
  EXPECT_EQ(tensor.device(), 2);
  const Tensor copy = tensor;
  EXPECT_EQ(copy.device(), 2);
  EXPECT_EQ(Tensor::Allocate(DT_FLOAT, {1}).device(), kHostDevice);
  EXPECT_DEATH(tensor.As<float>(), "the tensor is on cuda:2");
}

TEST(TensorViewTest, Sizes) {
  TensorView view{"w", DT_DOUBLE, {2, 2}, nullptr};
  EXPECT_EQ(view.elements(), 4);
  EXPECT_EQ(view.bytes(), 32u);
}

}  // namespace
}  // namespace codistill
