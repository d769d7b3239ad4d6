#include "cuda/row_topk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "common/base/random.h"
#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Answer {
  std::vector<int32_t> index;
  std::vector<float> value, tail;
};

Answer Ask(const RowTopKInputs& inputs, int threads) {
  Answer answer;
  answer.index.resize(inputs.rows * inputs.k);
  answer.value.resize(inputs.rows * inputs.k);
  answer.tail.resize(inputs.rows);
  RowTopKOutputs outputs;
  outputs.index = answer.index.data();
  outputs.value = answer.value.data();
  outputs.tail = answer.tail.data();
  const absl::Status status = RowTopKCpu(inputs, outputs, threads);
  EXPECT_TRUE(status.ok()) << status;
  return answer;
}

// By sorting, in double.
void Check(const RowTopKInputs& inputs, const Answer& answer) {
  std::vector<int32_t> order(inputs.classes);
  std::vector<double> p(inputs.classes);
  for (int64_t r = 0; r < inputs.rows; ++r) {
    const float* z = inputs.logits + r * inputs.classes;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [z](int32_t a, int32_t b) { return z[a] > z[b]; });
    double sum = 0;
    for (int64_t c = 0; c < inputs.classes; ++c) {
      sum += p[c] = std::exp((static_cast<double>(z[c]) - z[order[0]]) / inputs.temperature);
    }
    double tail = 0;
    for (int64_t i = inputs.k; i < inputs.classes; ++i) tail += p[order[i]];
    for (int64_t i = 0; i < inputs.k; ++i) {
      ASSERT_EQ(answer.index[r * inputs.k + i], order[i]) << "row " << r << " place " << i;
      const double want = p[order[i]] / sum;
      ASSERT_NEAR(answer.value[r * inputs.k + i], want, 2e-6 * want + 1e-37) << r << " " << i;
    }
    ASSERT_NEAR(answer.tail[r], tail / sum, 2e-6 * (tail / sum) + 1e-37) << "row " << r;
  }
}

TEST(RowTopKTest, AgreesWithSortingInDouble) {
  RandomStream random(10);
  for (const int64_t classes : {1, 2, 17, 1000, 5003, 40000}) {
    for (const int64_t k : {int64_t{1}, int64_t{2}, int64_t{64}, int64_t{1024}, classes}) {
      if (k > classes || k > 5003) continue;
      for (const double temperature : {1.0, 3.0}) {
        const int64_t rows = 3;
        std::vector<float> logits(rows * classes);
        for (float& z : logits) z = static_cast<float>(3 * random.Normal());
        // Some equal ones, so that the order among them matters.
        for (int64_t i = 0; i < rows * classes; i += 3) logits[i] = std::round(logits[i]);
        RowTopKInputs inputs;
        inputs.logits = logits.data();
        inputs.rows = rows;
        inputs.classes = classes;
        inputs.temperature = temperature;
        inputs.k = k;
        SCOPED_TRACE(::testing::Message() << classes << " classes, k " << k);
        Check(inputs, Ask(inputs, 2));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(RowTopKTest, IsTheSameForAnyNumberOfThreads) {
  RandomStream random(11);
  std::vector<float> logits(300 * 3001);
  for (float& z : logits) z = static_cast<float>(random.Normal());
  RowTopKInputs inputs;
  inputs.logits = logits.data();
  inputs.rows = 300;
  inputs.classes = 3001;
  inputs.k = 20;
  const Answer one = Ask(inputs, 1), many = Ask(inputs, 7);
  EXPECT_EQ(one.index, many.index);
  EXPECT_EQ(one.value, many.value);
  EXPECT_EQ(one.tail, many.tail);
}

TEST(RowTopKTest, OfEqualLogitsTakesTheFirstClasses) {
  const std::vector<float> logits(5000, -2.5f);
  RowTopKInputs inputs;
  inputs.logits = logits.data();
  inputs.rows = 1;
  inputs.classes = 5000;
  inputs.k = 4;
  EXPECT_THAT(Ask(inputs, 1).index, ElementsAre(0, 1, 2, 3));
  const float zeros[] = {-0.0f, 0.0f, -0.0f};
  inputs.logits = zeros;
  inputs.classes = 3;
  inputs.k = 3;
  EXPECT_THAT(Ask(inputs, 1).index, ElementsAre(0, 1, 2));
}

TEST(RowTopKTest, WritesWhatIsWantedInTheFormatWanted) {
  const float logits[] = {1, 4, 2, 3};
  RowTopKInputs inputs;
  inputs.logits = logits;
  inputs.rows = 1;
  inputs.classes = 4;
  inputs.k = 2;
  const Answer full = Ask(inputs, 1);
  for (const NumberFormat format : {NumberFormat::kFloat16, NumberFormat::kBfloat16}) {
    uint16_t value[2];
    RowTopKOutputs outputs;
    outputs.value = value;
    outputs.value_format = format;
    ASSERT_TRUE(RowTopKCpu(inputs, outputs, 1).ok());
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(value[i], format == NumberFormat::kFloat16 ? ToFloat16(full.value[i])
                                                           : ToBfloat16(full.value[i]));
    }
  }
  ASSERT_TRUE(RowTopKCpu(inputs, RowTopKOutputs(), 1).ok());
}

TEST(RowTopKTest, NamesTheFirstRowThatIsNotFinite) {
  const int64_t rows = 400, classes = 3000;
  for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    std::vector<float> logits(rows * classes, 1);
    logits[399 * classes] = bad;
    logits[77 * classes + 2999] = bad;
    RowTopKInputs inputs;
    inputs.logits = logits.data();
    inputs.rows = rows;
    inputs.classes = classes;
    inputs.k = 3;
    for (const int threads : {1, 4}) {
      int64_t row = 0;
      EXPECT_EQ(RowTopKCpu(inputs, RowTopKOutputs(), threads, &row).message(),
                "row top-k: logits of row 77 has a number that is not finite");
      EXPECT_EQ(row, 77);
    }
  }
}

TEST(RowTopKTest, NamesTheArgumentAtFault) {
  const float logits[] = {1, 4, 2, 3};
  RowTopKInputs good;
  good.logits = logits;
  good.rows = 1;
  good.classes = 4;
  good.k = 4;
  auto message = [](const RowTopKInputs& inputs, const RowTopKOutputs& outputs = {}) {
    int64_t row = 5;
    const absl::Status status = RowTopKCpu(inputs, outputs, 1, &row);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(row, -1);
    return std::string(status.message());
  };
  ASSERT_TRUE(RowTopKCpu(good, {}, 1).ok());
  RowTopKInputs inputs = good;
  inputs.k = 5;
  EXPECT_EQ(message(inputs), "row top-k: k is 5; want 1 to the number of classes, 4");
  inputs.k = 0;
  EXPECT_THAT(message(inputs), HasSubstr("k is 0"));
  inputs = good;
  inputs.rows = -1;
  EXPECT_THAT(message(inputs), HasSubstr("rows is -1"));
  inputs = good;
  inputs.classes = 0;
  EXPECT_THAT(message(inputs), HasSubstr("classes is 0"));
  inputs = good;
  inputs.temperature = 0;
  EXPECT_THAT(message(inputs), HasSubstr("temperature is 0"));
  inputs = good;
  inputs.logits = nullptr;
  EXPECT_THAT(message(inputs), HasSubstr("logits is null"));
  RowTopKOutputs outputs;
  outputs.value_format = NumberFormat::kInt8;
  EXPECT_THAT(message(good, outputs), HasSubstr("value_format is int8"));
  inputs = good;
  inputs.rows = 0;
  EXPECT_TRUE(RowTopKCpu(inputs, {}, 1).ok());
}

}  // namespace
}  // namespace codistill
