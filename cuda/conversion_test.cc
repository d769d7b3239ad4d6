#include "cuda/conversion.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "common/base/random.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

// The nearest number with so many bits of significand and exponents from so low, ties to even, from
// whole numbers in double.
double Nearest(float x, int significand_bits, int lowest_exponent, double largest) {
  if (std::isnan(x) || std::isinf(x) || x == 0) return x;
  const int exponent = std::max(std::ilogb(x), lowest_exponent);
  const double unit = std::ldexp(1.0, exponent - significand_bits + 1);
  const double rounded = std::nearbyint(x / unit) * unit;
  return std::abs(rounded) > largest ? std::copysign(HUGE_VAL, x) : rounded;
}

double Reference(float x, NumberFormat format) {
  return format == NumberFormat::kFloat16 ? Nearest(x, 11, -14, 65504)
                                          : Nearest(x, 8, -126, std::numeric_limits<float>::max());
}

// Floats of every kind: any bits, so that all exponents occur, and those that are special.
std::vector<float> Floats(int64_t n) {
  const float special[] = {0.0f,
                           -0.0f,
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN(),
                           std::numeric_limits<float>::denorm_min(),
                           std::numeric_limits<float>::max(),
                           65519.996f,
                           65520.0f,
                           -65520.0f,
                           0x1p-24f,
                           0x1p-25f,
                           0x1.8p-25f,
                           0x1.fffp-15f,
                           1.00390625f,
                           1.01171875f,
                           2049.0f,
                           2051.0f};
  constexpr int64_t kSpecial = sizeof(special) / sizeof(special[0]);
  RandomStream random(7);
  std::vector<float> values(n);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random.Next());
    std::memcpy(&values[i], &bits, sizeof(bits));
    if (i % 3 == 1) values[i] = static_cast<float>(random.Normal());
    if (i % 7 == 2) values[i] = special[random.Below(kSpecial)];
  }
  return values;
}

TEST(ConversionTest, RoundsToTheNearestAndComesBack) {
  for (const NumberFormat format : {NumberFormat::kFloat16, NumberFormat::kBfloat16}) {
    for (const int64_t n : {0, 1, 7, 16, 33, 1000, 1000003}) {
      const std::vector<float> from = Floats(n + 1);
      std::vector<uint16_t> narrow(n + 1, 0xabcd), other = narrow;
      std::vector<float> back(n + 1, -7);
      ASSERT_TRUE(
          ConvertCpu(from.data() + 1, NumberFormat::kFloat32, n, narrow.data(), format, 3).ok());
      ASSERT_TRUE(
          ConvertCpu(narrow.data(), format, n, back.data(), NumberFormat::kFloat32, 3).ok());
      EXPECT_EQ(narrow[n], 0xabcd);
      EXPECT_EQ(back[n], -7);
      for (int64_t i = 0; i < n; ++i) {
        const double want = Reference(from[i + 1], format);
        if (std::isnan(want)) {
          ASSERT_TRUE(std::isnan(back[i])) << i;
        } else {
          ASSERT_EQ(back[i], want) << NameOf(format) << " of " << from[i + 1];
          ASSERT_EQ(std::signbit(back[i]), std::signbit(from[i + 1]));
        }
      }
      ASSERT_TRUE(
          ConvertCpu(from.data() + 1, NumberFormat::kFloat32, n, other.data(), format, 1).ok());
      EXPECT_EQ(narrow, other);
    }
  }
}

TEST(ConversionTest, QuantizesEveryRowByItsLargest) {
  RandomStream random(8);
  for (const int64_t rows : {0, 1, 3, 1000}) {
    for (const int64_t columns : {0, 1, 15, 64, 1001}) {
      std::vector<float> from(rows * columns);
      for (int64_t i = 0; i < rows * columns; ++i) {
        const int64_t row = i / columns;
        from[i] =
            row % 5 == 4 ? 0.0f : static_cast<float>(random.Normal() * std::exp(0.1 * (row % 300)));
      }
      std::vector<int8_t> to(rows * columns), other(rows * columns);
      std::vector<float> scales(rows), other_scales(rows), back(rows * columns);
      ASSERT_TRUE(QuantizeRowsCpu(from.data(), rows, columns, to.data(), scales.data(), 3).ok());
      ASSERT_TRUE(
          QuantizeRowsCpu(from.data(), rows, columns, other.data(), other_scales.data(), 1).ok());
      EXPECT_EQ(to, other);
      EXPECT_EQ(scales, other_scales);
      ASSERT_TRUE(DequantizeRowsCpu(to.data(), scales.data(), rows, columns, back.data(), 2).ok());
      for (int64_t r = 0; r < rows; ++r) {
        double largest = 0;
        for (int64_t c = 0; c < columns; ++c) {
          largest = std::max(largest, std::abs(static_cast<double>(from[r * columns + c])));
        }
        ASSERT_NEAR(scales[r], largest / 127, 1e-7 * largest);
        for (int64_t c = 0; c < columns; ++c) {
          const int64_t i = r * columns + c;
          ASSERT_NEAR(back[i], from[i], largest / 127 * 0.50002) << r << " " << c;
          ASSERT_EQ(back[i], static_cast<float>(to[i]) * scales[r]);
        }
      }
    }
  }
}

TEST(ConversionTest, NamesTheFirstRowThatIsNotFinite) {
  const int64_t rows = 4000, columns = 100;
  std::vector<float> from(rows * columns, 1);
  std::vector<int8_t> to(rows * columns);
  std::vector<float> scales(rows);
  from[3999 * columns] = HUGE_VALF;
  from[1234 * columns + 99] = std::nanf("");
  for (const int threads : {1, 2, 5}) {
    EXPECT_EQ(
        QuantizeRowsCpu(from.data(), rows, columns, to.data(), scales.data(), threads).message(),
        "conversion: from has a number that is not finite in row 1234");
  }
}

TEST(ConversionTest, NamesTheArgumentAtFault) {
  float x = 0;
  uint16_t h = 0;
  int8_t q = 0;
  auto message = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  const auto f32 = NumberFormat::kFloat32, f16 = NumberFormat::kFloat16;
  EXPECT_THAT(message(ConvertCpu(&x, f32, 1, &x, f32, 1)),
              HasSubstr("to_format is float32 and from_format float32"));
  EXPECT_THAT(message(ConvertCpu(&x, NumberFormat::kInt8, 1, &x, f32, 1)), HasSubstr("int8"));
  EXPECT_THAT(message(ConvertCpu(&h, f16, 1, &h, NumberFormat::kBfloat16, 1)),
              HasSubstr("to_format"));
  EXPECT_THAT(message(ConvertCpu(&x, f32, -1, &h, f16, 1)), HasSubstr("n is -1"));
  EXPECT_THAT(message(ConvertCpu(nullptr, f32, 1, &h, f16, 1)), HasSubstr("from is null"));
  EXPECT_THAT(message(ConvertCpu(&x, f32, 1, nullptr, f16, 1)), HasSubstr("to is null"));
  EXPECT_THAT(message(QuantizeRowsCpu(&x, -1, 1, &q, &x, 1)), HasSubstr("rows is -1"));
  EXPECT_THAT(message(QuantizeRowsCpu(&x, 1, -1, &q, &x, 1)), HasSubstr("columns is -1"));
  EXPECT_THAT(message(QuantizeRowsCpu(&x, 1, 1, &q, nullptr, 1)), HasSubstr("scales is null"));
  EXPECT_THAT(message(DequantizeRowsCpu(nullptr, &x, 1, 1, &x, 1)), HasSubstr("from is null"));
  EXPECT_THAT(message(DequantizeRowsCpu(&q, &x, int64_t{1} << 40, int64_t{1} << 40, &x, 1)),
              HasSubstr("64 bits"));
}

}  // namespace
}  // namespace codistill
