#include "predserver/output_format.h"

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
#include "hwy/targets.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Instruction sets are a parameter: all that this processor has and the loops are compiled for.
std::vector<int64_t> Targets() {
  std::vector<int64_t> targets;
  for (int64_t target : {HWY_AVX3, HWY_AVX2, HWY_SSE4, HWY_NEON, HWY_EMU128, HWY_SCALAR}) {
    if (hwy::SupportedTargets() & HWY_TARGETS & target) targets.push_back(target);
  }
  return targets;
}

class OutputFormatTest : public ::testing::TestWithParam<int64_t> {
 protected:
  OutputFormatTest() { hwy::SetSupportedTargetsForTest(GetParam()); }
  ~OutputFormatTest() override { hwy::SetSupportedTargetsForTest(0); }
};

INSTANTIATE_TEST_SUITE_P(Targets, OutputFormatTest, ::testing::ValuesIn(Targets()),
                         [](const ::testing::TestParamInfo<int64_t>& info) {
                           return std::string(hwy::TargetName(info.param));
                         });

Tensor RandomLogits(int64_t rows, int64_t classes, uint64_t seed, double spread = 4) {
  RandomStream random(seed);
  Tensor logits = Tensor::Allocate(DT_FLOAT, {rows, classes});
  for (float& z : logits.As<float>()) z = static_cast<float>(spread * random.Normal() - 3);
  return logits;
}

std::vector<double> RowOf(const Tensor& logits, int64_t row) {
  const int64_t classes = logits.shape()[1];
  const float* from = logits.As<float>().data() + row * classes;
  return {from, from + classes};
}

std::vector<double> Softmax(std::vector<double> x, double temperature) {
  const double max = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double& value : x) sum += value = std::exp((value - max) / temperature);
  for (double& value : x) value /= sum;
  return x;
}

// Element i of a tensor of floats of any width, and how far rounding may move it.
double At(const Tensor& tensor, int64_t i) {
  if (tensor.dtype() == DT_HALF) return FromFloat16(tensor.As<uint16_t>()[i]);
  if (tensor.dtype() == DT_BFLOAT16) return FromBfloat16(tensor.As<uint16_t>()[i]);
  return tensor.As<float>()[i];
}
double Tolerance(DataType dtype, double value) {
  if (value == 0) return 1e-36;
  // Without a fused multiply-add an exponential is off by the rounding of its argument.
  const double exponential = (2e-6 + 1.5e-7 * std::abs(std::log(value))) * value;
  const double relative = dtype == DT_HALF ? 0x1p-11 : dtype == DT_BFLOAT16 ? 0x1p-8 : 0;
  return exponential + relative * value * 1.001 + (dtype == DT_HALF ? 0x1p-25 : 1e-36);
}

// Rows [begin, begin + rows), as a part of a batch.
Tensor RowRange(const Tensor& logits, int64_t begin, int64_t rows) {
  const int64_t classes = logits.shape()[1];
  return Tensor::Adopt(DT_FLOAT, {rows, classes},
                       const_cast<float*>(logits.As<float>().data()) + begin * classes,
                       logits.owner());
}

absl::StatusOr<std::vector<NamedTensor>> TryMake(LabelLoss loss, const OutputFormat& format,
                                                 const std::vector<std::string>& names,
                                                 const Tensor& logits, int64_t begin,
                                                 int64_t rows) {
  RequestPlan plan;
  auto wants = [&](const char* name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  plan.want_logits = wants(kLogitsOutput);
  plan.want_logits_scale = plan.want_logits && format.dtype == DT_INT8;
  plan.want_probabilities = wants(kProbabilitiesOutput);
  plan.want_top_k_index = wants(kTopKIndexOutput);
  plan.want_top_k_value = wants(kTopKValueOutput);
  plan.want_tail_mass = wants(kTailMassOutput);
  return FormatOutputs(RowRange(logits, begin, rows), loss, plan, format);
}

std::vector<NamedTensor> Make(const OutputFormat& format, const std::vector<std::string>& names,
                              const Tensor& logits, int64_t begin, int64_t rows,
                              LabelLoss loss = SOFTMAX_CROSS_ENTROPY) {
  auto outputs = TryMake(loss, format, names, logits, begin, rows);
  EXPECT_TRUE(outputs.ok()) << outputs.status();
  return outputs.ok() ? *std::move(outputs) : std::vector<NamedTensor>();
}

const std::vector<std::string> kLogits = {kLogitsOutput};
const std::vector<std::string> kTopK = {kTopKIndexOutput, kTopKValueOutput, kTailMassOutput};
const DataType kFloats[] = {DT_FLOAT, DT_HALF, DT_BFLOAT16};
const int64_t kClasses[] = {1, 2, 3, 15, 16, 17, 33, 100, 1000, 4096, 4097, 9001};

TEST_P(OutputFormatTest, LogitsInFloatsShareTheMemoryOrAreRounded) {
  for (const int64_t classes : kClasses) {
    const Tensor logits = RandomLogits(5, classes, classes);
    for (const DataType dtype : kFloats) {
      OutputFormat format;
      format.dtype = dtype;
      const auto outputs = Make(format, kLogits, logits, 1, 3);
      ASSERT_EQ(outputs.size(), 1u);
      EXPECT_EQ(outputs[0].name, "logits");
      const Tensor& made = outputs[0].tensor;
      EXPECT_EQ(made.dtype(), dtype);
      EXPECT_THAT(made.shape(), ElementsAre(3, classes));
      EXPECT_EQ(made.owner() == logits.owner(), dtype == DT_FLOAT);
      if (dtype == DT_FLOAT) {
        EXPECT_EQ(made.data(), logits.As<float>().data() + classes);
      }
      for (int64_t i = 0; i < made.elements(); ++i) {
        const float z = logits.As<float>()[classes + i];
        const float wanted = dtype == DT_FLOAT  ? z
                             : dtype == DT_HALF ? FromFloat16(ToFloat16(z))
                                                : FromBfloat16(ToBfloat16(z));
        ASSERT_EQ(At(made, i), wanted) << DataType_Name(dtype) << " " << i;
      }
    }
  }
}

TEST_P(OutputFormatTest, IntegerLogitsComeWithTheirScales) {
  const int64_t classes = 1003;
  const Tensor logits = RandomLogits(4, classes, 7);
  OutputFormat format;
  format.dtype = DT_INT8;
  const auto outputs = Make(format, kLogits, logits, 1, 2);
  ASSERT_EQ(outputs.size(), 2u);
  EXPECT_EQ(outputs[0].name, "logits");
  EXPECT_EQ(outputs[1].name, "logits_scale");
  EXPECT_THAT(outputs[1].tensor.shape(), ElementsAre(2));
  for (int64_t row = 0; row < 2; ++row) {
    const float scale = outputs[1].tensor.As<float>()[row];
    std::vector<double> z = RowOf(logits, row + 1), back;
    for (int64_t c = 0; c < classes; ++c) {
      back.push_back(scale * outputs[0].tensor.As<int8_t>()[row * classes + c]);
      ASSERT_NEAR(back[c], z[c], scale * 0.501);
    }
    const std::vector<double> p = Softmax(z, 1), q = Softmax(back, 1);
    double divergence = 0;
    for (int64_t c = 0; c < classes; ++c) divergence += p[c] * std::log(p[c] / q[c]);
    EXPECT_LT(divergence, 1e-2);
    EXPECT_GT(divergence, 0);
  }
}

TEST_P(OutputFormatTest, ProbabilitiesMatchTheirDefinition) {
  for (const LabelLoss loss : {SOFTMAX_CROSS_ENTROPY, SIGMOID_CROSS_ENTROPY}) {
    for (const int64_t classes : kClasses) {
      const Tensor logits = RandomLogits(3, classes, classes, classes == 100 ? 300 : 5);
      for (const DataType dtype : kFloats) {
        for (const double temperature : {1.0, 0.5, 3.0}) {
          OutputFormat format;
          format.dtype = dtype;
          format.temperature = temperature;
          const auto outputs = Make(format, {"probabilities"}, logits, 1, 2, loss);
          ASSERT_EQ(outputs.size(), 1u);
          EXPECT_EQ(outputs[0].tensor.dtype(), dtype);
          for (int64_t row = 0; row < 2; ++row) {
            std::vector<double> wanted = RowOf(logits, row + 1);
            if (loss == SOFTMAX_CROSS_ENTROPY) {
              wanted = Softmax(wanted, temperature);
            } else {
              for (double& z : wanted) z = 1 / (1 + std::exp(-z / temperature));
            }
            for (int64_t c = 0; c < classes; ++c) {
              ASSERT_NEAR(At(outputs[0].tensor, row * classes + c), wanted[c],
                          Tolerance(dtype, wanted[c]))
                  << LabelLoss_Name(loss) << " " << DataType_Name(dtype) << " classes " << classes
                  << " T " << temperature << " class " << c << " z " << RowOf(logits, row + 1)[c];
            }
          }
        }
      }
    }
  }
}

TEST_P(OutputFormatTest, TopKAreTheLargestInOrderAndTheTailIsTheRest) {
  for (const int64_t classes : {1, 2, 17, 100, 1000, 4097, 9001}) {
    for (const int64_t k :
         {int64_t{1}, int64_t{2}, int64_t{7}, int64_t{64}, classes - 1, classes}) {
      if (k < 1 || k > classes) continue;
      const Tensor logits = RandomLogits(4, classes, 31 * classes + k);
      for (const DataType dtype : kFloats) {
        OutputFormat format;
        format.dtype = dtype;
        format.top_k = k;
        format.temperature = dtype == DT_HALF ? 2 : 1;
        const auto outputs = Make(format, kTopK, logits, 1, 3);
        ASSERT_EQ(outputs.size(), 3u);
        EXPECT_EQ(outputs[0].name, "topk_index");
        EXPECT_EQ(outputs[1].name, "topk_value");
        EXPECT_EQ(outputs[2].name, "tail_mass");
        EXPECT_EQ(outputs[0].tensor.dtype(), DT_INT32);
        EXPECT_EQ(outputs[1].tensor.dtype(), dtype);
        EXPECT_EQ(outputs[2].tensor.dtype(), DT_FLOAT);
        EXPECT_THAT(outputs[0].tensor.shape(), ElementsAre(3, k));
        EXPECT_THAT(outputs[1].tensor.shape(), ElementsAre(3, k));
        EXPECT_THAT(outputs[2].tensor.shape(), ElementsAre(3));
        for (int64_t row = 0; row < 3; ++row) {
          const std::vector<double> z = RowOf(logits, row + 1);
          const std::vector<double> p = Softmax(z, format.temperature);
          std::vector<int> order(classes);
          std::iota(order.begin(), order.end(), 0);
          std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return z[a] > z[b]; });
          for (int64_t i = 0; i < k; ++i) {
            ASSERT_EQ(outputs[0].tensor.As<int32_t>()[row * k + i], order[i])
                << "classes " << classes << " k " << k << " place " << i;
            const double value = At(outputs[1].tensor, row * k + i);
            ASSERT_NEAR(value, p[order[i]], Tolerance(dtype, p[order[i]]));
            if (i > 0) {
              ASSERT_LE(value, At(outputs[1].tensor, row * k + i - 1));
            }
          }
          double rest = 0;
          for (int64_t i = classes - 1; i >= k; --i) rest += p[order[i]];
          const float tail = outputs[2].tensor.As<float>()[row];
          ASSERT_GE(tail, 0);
          ASSERT_NEAR(tail, rest, Tolerance(DT_FLOAT, rest)) << "classes " << classes << " k " << k;
        }
      }
    }
  }
}

TEST_P(OutputFormatTest, OfEqualLogitsTheSmallerClassesAreTaken) {
  const int64_t classes = 5000, k = 300;
  Tensor logits = Tensor::Allocate(DT_FLOAT, {3, classes});
  for (int64_t c = 0; c < classes; ++c) {
    float* z = logits.As<float>().data();
    z[c] = 2;                                                       // all equal
    z[classes + c] = static_cast<float>(c % 50);                    // 100 of each
    z[2 * classes + c] = c % 2 == 0 ? -0.0f : (c % 3 ? 0.0f : -1);  // two zeros are equal
  }
  OutputFormat format;
  format.top_k = k;
  const auto outputs = Make(format, kTopK, logits, 0, 3);
  for (int64_t row = 0; row < 3; ++row) {
    const std::vector<double> z = RowOf(logits, row);
    std::vector<int> order(classes);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return z[a] > z[b]; });
    for (int64_t i = 0; i < k; ++i) {
      ASSERT_EQ(outputs[0].tensor.As<int32_t>()[row * k + i], order[i]) << row << " " << i;
    }
  }
}

TEST_P(OutputFormatTest, TheTailIsRightWhereHardlyAnythingIsLeft) {
  const int64_t classes = 3000;
  Tensor logits = Tensor::Allocate(DT_FLOAT, {1, classes});
  for (int64_t c = 0; c < classes; ++c) {
    logits.As<float>()[c] = c == 1234 ? 40.0f : c == 7 ? 39.0f : -static_cast<float>(c % 10);
  }
  OutputFormat format;
  format.top_k = 2;
  const auto outputs = Make(format, kTopK, logits, 0, 1);
  const std::vector<double> p = Softmax(RowOf(logits, 0), 1);
  double rest = 0;
  for (int64_t c = 0; c < classes; ++c) rest += c == 1234 || c == 7 ? 0 : p[c];
  EXPECT_LT(rest, 1e-13);  // 1 minus the rest would be 0 in single precision
  EXPECT_NEAR(outputs[2].tensor.As<float>()[0], rest, 1e-5 * rest);
  EXPECT_THAT(outputs[0].tensor.As<int32_t>(), ElementsAre(1234, 7));
}

TEST_P(OutputFormatTest, SurvivesLogitsFarFromZero) {
  for (const float up : {1e4f, -1e4f, 3e38f, -3e38f}) {
    Tensor logits = RandomLogits(1, 700, 3);
    for (float& z : logits.As<float>()) z += up;
    OutputFormat format;
    format.top_k = 5;
    const auto outputs = Make(format, {"topk_value", "tail_mass", "probabilities"}, logits, 0, 1);
    ASSERT_EQ(outputs.size(), 3u);
    const std::vector<double> p = Softmax(RowOf(logits, 0), 1);
    double sum = outputs[2].tensor.As<float>()[0];
    for (float value : outputs[1].tensor.As<float>()) sum += value;
    EXPECT_NEAR(sum, 1, 1e-6);
    for (int64_t c = 0; c < 700; ++c) {
      ASSERT_NEAR(outputs[0].tensor.As<float>()[c], p[c], 1e-6 + 1e-5 * p[c]);
    }
  }
}

TEST_P(OutputFormatTest, NamesTheRowThatIsNotFinite) {
  const int64_t classes = 4500;
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    for (const int64_t at : {int64_t{0}, int64_t{63}, int64_t{4096}, classes - 1}) {
      Tensor logits = RandomLogits(6, classes, 1);
      logits.As<float>()[3 * classes + at] = bad;
      logits.As<float>()[5 * classes] = bad;  // not asked for
      for (const DataType dtype : {DT_FLOAT, DT_HALF, DT_BFLOAT16, DT_INT8}) {
        for (const char* name : {"logits", "probabilities", "topk_value"}) {
          if (dtype == DT_INT8 && name != std::string("logits")) continue;
          OutputFormat format;
          format.dtype = dtype;
          format.top_k = 64;
          const absl::Status status =
              TryMake(SOFTMAX_CROSS_ENTROPY, format, {name}, logits, 1, 4).status();
          EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
          EXPECT_THAT(std::string(status.message()), HasSubstr("row 2 ")) << name;
          EXPECT_TRUE(TryMake(SOFTMAX_CROSS_ENTROPY, format, {name}, logits, 0, 3).ok());
        }
      }
    }
  }
}

TEST_P(OutputFormatTest, NarrowTypesRefuseWhatTheyCannotHold) {
  struct Case {
    DataType dtype;
    float most, more;
    const char* message;
  };
  for (const Case& test :
       {Case{DT_HALF, -65519, -65520, "row 2 has the logit -65520, more than FP16"},
        Case{DT_BFLOAT16, 3.39e38f, 3.4e38f, "more than BF16"}}) {
    Tensor logits = RandomLogits(3, 50, 1);
    OutputFormat format;
    format.dtype = test.dtype;
    logits.As<float>()[2 * 50 + 7] = test.most;
    const auto outputs = Make(format, kLogits, logits, 0, 3);
    EXPECT_TRUE(std::isfinite(At(outputs[0].tensor, 107)));
    logits.As<float>()[2 * 50 + 7] = test.more;
    const absl::Status status =
        TryMake(SOFTMAX_CROSS_ENTROPY, format, kLogits, logits, 0, 3).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()), HasSubstr(test.message));
  }
}

TEST_P(OutputFormatTest, OutputsComeInTheOrderOfTheProtocolAndRowsMayBeNone) {
  const Tensor logits = RandomLogits(2, 10, 1);
  OutputFormat format;
  format.top_k = 3;
  const auto outputs =
      Make(format, {"tail_mass", "topk_index", "probabilities", "logits"}, logits, 2, 0);
  ASSERT_EQ(outputs.size(), 4u);
  const char* names[] = {"logits", "probabilities", "topk_index", "tail_mass"};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(outputs[i].name, names[i]);
    EXPECT_EQ(outputs[i].tensor.shape()[0], 0);
  }
  EXPECT_TRUE(Make(format, {}, logits, 0, 2).empty());
  EXPECT_EQ(
      FormatOutputs(Tensor::Zeros(DT_INT32, {1, 2}), SOFTMAX_CROSS_ENTROPY, {}, {}).status().code(),
      absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace codistill
