#include "cuda/conversion_cuda.h"

#include <cmath>
#include <cstring>
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

std::vector<uint32_t> BitsOf(const std::vector<float>& values) {
  std::vector<uint32_t> bits(values.size());
  if (!bits.empty()) std::memcpy(bits.data(), values.data(), 4 * bits.size());
  return bits;
}

// Any bits, so that all exponents and NaNs occur, and numbers of common sizes.
std::vector<float> Floats(int64_t n) {
  RandomStream random(7);
  std::vector<float> values(n);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random.Next());
    std::memcpy(&values[i], &bits, sizeof(bits));
    if (i % 3 == 1) values[i] = static_cast<float>(random.Normal());
    if (i % 5 == 2) values[i] = static_cast<float>(random.Normal()) * 0x1p-15f;
    if (i % 7 == 3) values[i] = 65504 + static_cast<float>(random.Below(40));
    // Halfway between two numbers of 16 bits.
    if (i % 11 == 4) values[i] = 1 + static_cast<float>(2 * random.Below(1024) + 1) / 2048;
  }
  return values;
}

class ConversionCudaTest : public DeviceTest {};

TEST_F(ConversionCudaTest, GivesTheBitsOfTheCpu) {
  for (const NumberFormat format : {NumberFormat::kFloat16, NumberFormat::kBfloat16}) {
    for (const int64_t n : {0, 1, 7, 8, 9, 4095, 4096, 4097, 20011}) {
      for (const size_t offset : {0, 1}) {
        const std::vector<float> from = Floats(n);
        std::vector<uint16_t> want(n);
        ASSERT_TRUE(
            ConvertCpu(from.data(), NumberFormat::kFloat32, n, want.data(), format, 1).ok());
        const DeviceArray<float> device_from(from, offset);
        const DeviceArray<uint16_t> to(n, offset);
        ASSERT_TRUE(
            LaunchConvert(device_from.get(), NumberFormat::kFloat32, n, to.get(), format, nullptr)
                .ok());
        ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
        ASSERT_EQ(to.Fetch(), want) << NameOf(format) << " " << n;
        EXPECT_TRUE(to.NothingBehind());
      }
    }
  }
}

TEST_F(ConversionCudaTest, WidensAllNumbersOf16Bits) {
  for (const NumberFormat format : {NumberFormat::kFloat16, NumberFormat::kBfloat16}) {
    for (const size_t offset : {0, 1}) {
      std::vector<uint16_t> from(65536 + 3);
      for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint16_t>(i);
      const int64_t n = static_cast<int64_t>(from.size());
      std::vector<float> want(n);
      ASSERT_TRUE(ConvertCpu(from.data(), format, n, want.data(), NumberFormat::kFloat32, 1).ok());
      const DeviceArray<uint16_t> device_from(from, offset);
      const DeviceArray<float> to(n, offset);
      ASSERT_TRUE(
          LaunchConvert(device_from.get(), format, n, to.get(), NumberFormat::kFloat32, nullptr)
              .ok());
      ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
      ASSERT_EQ(BitsOf(to.Fetch()), BitsOf(want)) << NameOf(format);
      EXPECT_TRUE(to.NothingBehind());
    }
  }
}

// Rows of different sizes, one of zeros, one of next to nothing.
std::vector<float> Rows(int64_t rows, int64_t columns) {
  RandomStream random(static_cast<uint64_t>(8 + columns));
  std::vector<float> values(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t row = i / columns;
    values[i] = static_cast<float>(random.Normal() * std::exp(0.5 * static_cast<double>(row)));
    if (row % 5 == 3) values[i] = -0.0f;
    if (row % 5 == 4) values[i] *= 0x1p-120f;
  }
  return values;
}

TEST_F(ConversionCudaTest, QuantizesAsTheCpu) {
  for (const int64_t columns : {0, 1, 3, 4, 31, 1000, 1028, 5003, 8196, 20004}) {
    for (const int64_t rows : {0, 1, 9}) {
      for (const size_t offset : {0, 1}) {
        const std::vector<float> from = Rows(rows, columns);
        std::vector<int8_t> want(from.size());
        std::vector<float> want_scales(rows), want_back(from.size());
        ASSERT_TRUE(
            QuantizeRowsCpu(from.data(), rows, columns, want.data(), want_scales.data(), 1).ok());
        ASSERT_TRUE(
            DequantizeRowsCpu(want.data(), want_scales.data(), rows, columns, want_back.data(), 1)
                .ok());
        const DeviceArray<float> device_from(from, offset), scales(rows), back(from.size(), offset);
        const DeviceArray<int8_t> to(from.size(), offset);
        const Workspace workspace(kQuantizeWorkspaceBytes);
        ASSERT_TRUE(LaunchQuantizeRows(device_from.get(), rows, columns, to.get(), scales.get(),
                                       workspace.get(), nullptr)
                        .ok());
        ASSERT_TRUE(FinishQuantizeRows(workspace.get(), nullptr).ok());
        ASSERT_EQ(scales.Fetch(), want_scales) << columns;
        ASSERT_EQ(to.Fetch(), want) << columns;
        EXPECT_TRUE(to.NothingBehind());
        ASSERT_TRUE(
            LaunchDequantizeRows(to.get(), scales.get(), rows, columns, back.get(), nullptr).ok());
        ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
        ASSERT_EQ(back.Fetch(), want_back) << columns;
        EXPECT_TRUE(back.NothingBehind());
      }
    }
  }
}

TEST_F(ConversionCudaTest, NamesTheFirstRowThatIsNotFinite) {
  for (const int64_t columns : {100, 3000, 9000}) {
    const int64_t rows = 20;
    std::vector<float> from(rows * columns, 1);
    from[19 * columns] = HUGE_VALF;
    from[12 * columns + columns - 1] = std::nanf("");
    const DeviceArray<float> device_from(from), scales(rows);
    const DeviceArray<int8_t> to(from.size());
    const Workspace workspace(kQuantizeWorkspaceBytes);
    InEveryOrder([&] {
      ASSERT_TRUE(LaunchQuantizeRows(device_from.get(), rows, columns, to.get(), scales.get(),
                                     workspace.get(), nullptr)
                      .ok());
      EXPECT_EQ(FinishQuantizeRows(workspace.get(), nullptr).message(),
                "conversion: from has a number that is not finite in row 12");
    });
  }
}

TEST(ConversionCudaValidationTest, NamesTheArgumentAtFault) {
  // Refused before anything touches a device.
  float x = 0;
  uint16_t h = 0;
  int8_t q = 0;
  alignas(16) char workspace[16];
  auto message = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  const auto f32 = NumberFormat::kFloat32, f16 = NumberFormat::kFloat16;
  EXPECT_THAT(message(LaunchConvert(&x, f32, 1, &x, f32, nullptr)), HasSubstr("to_format"));
  EXPECT_THAT(message(LaunchConvert(&x, f32, -1, &h, f16, nullptr)), HasSubstr("n is -1"));
  EXPECT_THAT(message(LaunchConvert(&x, f32, int64_t{1} << 62, &h, f16, nullptr)),
              HasSubstr("n is too large"));
  EXPECT_THAT(message(LaunchQuantizeRows(&x, 1, 1, &q, nullptr, workspace, nullptr)),
              HasSubstr("scales is null"));
  EXPECT_THAT(message(LaunchQuantizeRows(&x, 1, 1, &q, &x, nullptr, nullptr)),
              HasSubstr("workspace is null"));
  EXPECT_THAT(message(LaunchDequantizeRows(&q, &x, 1, 1, nullptr, nullptr)),
              HasSubstr("to is null"));
}

}  // namespace
}  // namespace codistill
