// What the loss says of inputs that are wrong, and what it makes of rows that do not count.

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cuda/loss.h"
#include "cuda/loss_combinations.h"
#include "cuda/loss_reference.h"
#include "cuda/loss_testing.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kRows = 6;

const LossOptions::LabelLoss kLabelLosses[] = {LossOptions::kSoftmaxCrossEntropy,
                                               LossOptions::kSigmoidCrossEntropy};
const NumberFormat kFloats[] = {NumberFormat::kFloat32, NumberFormat::kFloat16,
                                NumberFormat::kBfloat16};

class LossInputTest : public LossTargetTest {};

INSTANTIATE_TEST_SUITE_P(Targets, LossInputTest, ::testing::ValuesIn(LossTargets()),
                         [](const ::testing::TestParamInfo<int64_t>& info) {
                           return std::string(hwy::TargetName(info.param));
                         });

// A batch with two teachers, the second of which can be spoilt.
struct Spoilt {
  LossOptions options;
  int64_t classes;
  CombinationBatch batch;
  std::vector<float> values;

  static LossCombination Of(const LossOptions& options, DenseTeacher::Kind kind) {
    LossCombination combination;
    combination.options = options;
    combination.teachers = {{kind, NumberFormat::kFloat32}, {kind, NumberFormat::kFloat32}};
    return combination;
  }

  Spoilt(const LossOptions& options, int64_t classes, DenseTeacher::Kind kind)
      : options(options), classes(classes), batch(Of(options, kind), kRows, classes, 1.0, 3) {
    const auto* const floats = static_cast<const float*>(batch.inputs().teachers[1].values);
    values.assign(floats, floats + kRows * classes);
  }

  // With element `at` of teacher 1 as `value` and all of it in `format`.
  AnyResult Compute(int64_t at, float value, NumberFormat format) const {
    std::vector<float> changed = values;
    changed[at] = value;
    LossInputs inputs = batch.inputs();
    const EncodedTeacher teacher(changed, kRows, classes, inputs.teachers[1].kind, format);
    const DenseTeacher teachers[] = {inputs.teachers[0], teacher.view};
    inputs.teachers = teachers;
    return ComputeAny(options, inputs, 2);
  }
};

std::string Message(const AnyResult& result) {
  EXPECT_EQ(result.status.code(), absl::StatusCode::kInvalidArgument);
  return std::string(result.status.message());
}

TEST_P(LossInputTest, NamesTheTeacherAndRowThatIsNotFinite) {
  for (auto label_loss : kLabelLosses) {
    for (auto kind : {DenseTeacher::kLogits, DenseTeacher::kProbabilities}) {
      for (int64_t classes : {3, 500, 5000}) {
        LossOptions options;
        options.label_loss = label_loss;
        const Spoilt spoilt(options, classes, kind);
        for (NumberFormat format : kFloats) {
          const int64_t row = 2, c = classes - 2;
          const AnyResult result = spoilt.Compute(row * classes + c, kNan, format);
          EXPECT_FALSE(result.outputs.finite);
          EXPECT_THAT(Message(result),
                      HasSubstr(absl::StrCat("teachers 1 holds nan in row ", row, " for class ", c,
                                             "; want a finite number")));
        }
        // Sound again.
        EXPECT_TRUE(spoilt.Compute(0, spoilt.values[0], NumberFormat::kFloat32).status.ok());
      }
    }
  }
}

TEST_P(LossInputTest, NamesAScaleThatIsNotFinite) {
  const Spoilt spoilt(LossOptions(), 40, DenseTeacher::kLogits);
  EncodedTeacher teacher(spoilt.values, kRows, 40, DenseTeacher::kLogits, NumberFormat::kInt8);
  teacher.scale[4] = kNan;
  LossInputs inputs = spoilt.batch.inputs();
  inputs.teachers = absl::MakeConstSpan(&teacher.view, 1);
  const AnyResult result = ComputeAny(LossOptions(), inputs);
  EXPECT_FALSE(result.outputs.finite);
  EXPECT_THAT(Message(result), HasSubstr("teachers 0 has the scale nan in row 4"));
}

TEST_P(LossInputTest, NamesTheLogitsOrTargetsThatAreNotFinite) {
  for (auto label_loss : {LossOptions::kSoftmaxCrossEntropy, LossOptions::kSigmoidCrossEntropy,
                          LossOptions::kSquaredError}) {
    for (auto format : {NumberFormat::kFloat32, NumberFormat::kBfloat16}) {
      for (bool in_place : {false, true}) {
        LossCombination combination;
        combination.options.label_loss = label_loss;
        combination.options.teacher_loss = label_loss == LossOptions::kSquaredError
                                               ? LossOptions::kSquaredErrorLogits
                                               : LossOptions::kSoftCrossEntropy;
        combination.logits_format = format;
        combination.teachers = {{DenseTeacher::kLogits, NumberFormat::kFloat32}};
        const CombinationBatch batch(combination, kRows, 30, 1.0, 8);
        std::vector<float> logits(kRows * 30, 0.5f);
        logits[4 * 30 + 7] = kNan;
        logits[5 * 30 + 1] = kNan;
        std::vector<char> bytes = Encode(logits, format);
        LossInputs inputs = batch.inputs();
        inputs.logits = bytes.data();
        LossOutputs outputs;
        std::vector<char> apart(bytes.size());
        outputs.gradient = in_place ? bytes.data() : apart.data();
        const absl::Status status = ComputeLossCpu(combination.options, inputs, &outputs, 3);
        EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
        EXPECT_FALSE(outputs.finite);
        EXPECT_THAT(std::string(status.message()),
                    HasSubstr("logits holds nan in row 4 for class 7; want a finite number"));
      }
    }
    if (label_loss == LossOptions::kSoftmaxCrossEntropy) continue;
    LossCombination combination;
    combination.options.label_loss = label_loss;
    const CombinationBatch batch(combination, kRows, 30, 1.0, 8);
    std::vector<float> targets(kRows * 30, 0.5f);
    targets[3 * 30] = kNan;
    LossInputs inputs = batch.inputs();
    inputs.teacher_weight = 0;
    inputs.targets = targets.data();
    EXPECT_THAT(Message(ComputeAny(combination.options, inputs)),
                HasSubstr("targets holds nan in row 3 for class 0"));
  }
}

TEST_P(LossInputTest, ALogitOfMinusInfinityRulesAClassOut) {
  const std::vector<float> logits = {0, -kInf, 0};
  const int64_t label = 0;
  LossInputs inputs;
  inputs.rows = 1;
  inputs.classes = 3;
  inputs.logits = logits.data();
  inputs.labels = &label;
  const AnyResult result = ComputeAny(LossOptions(), inputs);
  ASSERT_TRUE(result.status.ok()) << result.status;
  EXPECT_NEAR(result.outputs.sums.label_loss_sum, std::log(2.0), 1e-6);
  const double expected[] = {-0.5, 0, 0.5};
  for (int i = 0; i < 3; ++i) EXPECT_NEAR(result.gradient(inputs, i), expected[i], 1e-6);
}

TEST_P(LossInputTest, NamesTheRowThatDoesNotAddUpToOne) {
  for (float temperature : {1.0f, 2.0f, 3.0f}) {
    for (auto teacher_loss : {LossOptions::kSoftCrossEntropy, LossOptions::kKlTeacherStudent,
                              LossOptions::kKlStudentTeacher}) {
      for (int64_t classes : {1, 3, 500, 5000}) {
        LossOptions options;
        options.temperature = temperature;
        options.teacher_loss = teacher_loss;
        const Spoilt spoilt(options, classes, DenseTeacher::kProbabilities);
        for (NumberFormat format : kFloats) {
          const int64_t at = 3 * classes + classes / 2;
          const AnyResult result = spoilt.Compute(at, spoilt.values[at] + 0.02f, format);
          EXPECT_TRUE(result.outputs.finite);
          EXPECT_THAT(Message(result), HasSubstr("teachers 1 has probabilities in row 3 that add "
                                                 "up to 1.0"));
          // What is negative may not be made up for by the rest.
          const AnyResult negative = spoilt.Compute(at, -1e-3f, format);
          EXPECT_THAT(Message(negative), HasSubstr(absl::StrCat("in row 3 for class ", classes / 2,
                                                                "; want a probability")));
        }
      }
    }
  }
}

TEST_P(LossInputTest, OneTeacherIsCheckedInEveryWayThereIs) {
  // Alone, the teacher is walked along with the student.
  for (float temperature : {1.0f, 2.0f}) {
    for (int64_t classes : {3, 5000}) {
      LossOptions options;
      options.temperature = temperature;
      const Spoilt spoilt(options, classes, DenseTeacher::kProbabilities);
      LossInputs inputs = spoilt.batch.inputs();
      for (const float bad : {-0.5f, 1.5f, kNan, kInf}) {
        std::vector<float> values = spoilt.values;
        values[5 * classes - 1] = bad;
        DenseTeacher teacher = spoilt.batch.inputs().teachers[1];
        teacher.values = values.data();
        inputs.teachers = absl::MakeConstSpan(&teacher, 1);
        EXPECT_THAT(Message(ComputeAny(options, inputs)), HasSubstr("in row 4"));
      }
    }
  }
}

TEST_P(LossInputTest, SigmoidsTakeProbabilitiesBetweenZeroAndOne) {
  for (int64_t classes : {1, 3, 5000}) {
    LossOptions options;
    options.label_loss = LossOptions::kSigmoidCrossEntropy;
    const Spoilt spoilt(options, classes, DenseTeacher::kProbabilities);
    for (float bad : {-0.25f, 1.25f}) {
      for (NumberFormat format : kFloats) {
        const AnyResult result = spoilt.Compute(4 * classes, bad, format);
        EXPECT_TRUE(result.outputs.finite);
        EXPECT_THAT(Message(result), HasSubstr(absl::StrCat("teachers 1 holds ", bad,
                                                            " in row 4 for class 0; want a "
                                                            "probability")));
      }
    }
    for (float certain : {0.0f, 1.0f}) {
      EXPECT_TRUE(spoilt.Compute(4 * classes, certain, NumberFormat::kFloat32).status.ok());
    }
  }
}

TEST_P(LossInputTest, RowsThatDoNotCountAreNotLookedAt) {
  for (bool by_weight : {false, true}) {
    for (auto format : {NumberFormat::kFloat32, NumberFormat::kBfloat16}) {
      for (auto kind : {DenseTeacher::kLogits, DenseTeacher::kProbabilities}) {
        for (int64_t classes : {5, 5000}) {
          LossCombination combination;
          combination.teachers = {{kind, NumberFormat::kFloat32}};
          combination.logits_format = format;
          const CombinationBatch batch(combination, kRows, classes, 1.0, 4);
          const LossInputs& whole = batch.inputs();
          const size_t row_bytes = classes * BytesOf(format);
          std::vector<char> logits(kRows * row_bytes);
          std::memcpy(logits.data(), whole.logits, logits.size());
          const auto* const said = static_cast<const float*>(whole.teachers[0].values);
          std::vector<float> teacher(said, said + kRows * classes);
          std::vector<int64_t> labels(whole.labels, whole.labels + kRows);
          std::vector<float> weights(kRows, 1);
          for (int64_t row : {0, 3, 5}) {
            std::memset(&logits[row * row_bytes], 0xff, row_bytes);  // NaN in either format
            std::fill_n(teacher.begin() + row * classes, classes, kNan);
            if (by_weight) {
              weights[row] = 0;
            } else {
              labels[row] = -100;
            }
          }
          LossOptions options;
          LossInputs inputs = whole;
          DenseTeacher view = whole.teachers[0];
          view.values = teacher.data();
          inputs.logits = logits.data();
          inputs.teachers = absl::MakeConstSpan(&view, 1);
          inputs.labels = labels.data();
          if (by_weight) {
            inputs.row_weights = weights.data();
          } else {
            options.ignored_label = -100;
          }
          const AnyResult result = ComputeAny(options, inputs);
          ASSERT_TRUE(result.status.ok()) << result.status;
          EXPECT_EQ(result.outputs.sums.counted_rows, 3);
          EXPECT_EQ(result.outputs.sums.weight_sum, 3);
          EXPECT_EQ(WeightOf(options, inputs), 3);
          // The same as of the three others by themselves.
          std::vector<char> some_logits;
          std::vector<float> some_teacher;
          std::vector<int64_t> some_labels;
          for (int64_t row : {1, 2, 4}) {
            some_logits.insert(some_logits.end(), &logits[row * row_bytes],
                               &logits[row * row_bytes] + row_bytes);
            some_teacher.insert(some_teacher.end(), teacher.begin() + row * classes,
                                teacher.begin() + (row + 1) * classes);
            some_labels.push_back(labels[row]);
          }
          LossInputs some = whole;
          some.rows = 3;
          some.logits = some_logits.data();
          some.labels = some_labels.data();
          DenseTeacher some_view = view;
          some_view.values = some_teacher.data();
          some.teachers = absl::MakeConstSpan(&some_view, 1);
          const AnyResult alone = ComputeAny(LossOptions(), some);
          EXPECT_EQ(alone.outputs.sums.label_loss_sum, result.outputs.sums.label_loss_sum);
          EXPECT_EQ(alone.outputs.sums.teacher_loss_sum, result.outputs.sums.teacher_loss_sum);
          EXPECT_EQ(alone.outputs.sums.correct, result.outputs.sums.correct);
          std::vector<char> expected(result.bytes.size(), 0);
          int i = 0;
          for (int64_t row : {1, 2, 4}) {
            std::memcpy(&expected[row * row_bytes], &alone.bytes[i++ * row_bytes], row_bytes);
          }
          EXPECT_EQ(result.bytes, expected);
        }
      }
    }
  }
}

TEST_P(LossInputTest, WhereNoRowCountsEverythingIsZero) {
  for (auto label_loss : {LossOptions::kSoftmaxCrossEntropy, LossOptions::kSigmoidCrossEntropy,
                          LossOptions::kSquaredError}) {
    LossCombination combination;
    combination.options.label_loss = label_loss;
    const CombinationBatch batch(combination, kRows, 20, 1.0, 4);
    LossInputs inputs = batch.inputs();
    const std::vector<float> weights(kRows, 0);
    inputs.row_weights = weights.data();
    inputs.teacher_weight = 0;
    const AnyResult result = ComputeAny(combination.options, inputs);
    ASSERT_TRUE(result.status.ok()) << result.status;
    EXPECT_TRUE(result.outputs.finite);
    EXPECT_EQ(result.outputs.sums.label_loss_sum, 0);
    EXPECT_EQ(result.outputs.sums.weight_sum, 0);
    EXPECT_EQ(result.outputs.sums.counted_rows, 0);
    EXPECT_EQ(result.outputs.sums.correct, 0);
    EXPECT_EQ(result.bytes, std::vector<char>(result.bytes.size(), 0));
  }
}

TEST_P(LossInputTest, PartsOfAWeightedBatchAddUp) {
  LossCombination combination;
  combination.weights = true;
  combination.options.ignored_label = 2;
  combination.teachers = {{DenseTeacher::kLogits, NumberFormat::kFloat32}};
  const CombinationBatch batch(combination, 12, 10, 2.0, 6);
  const LossInputs& whole = batch.inputs();
  const LossOptions& options = combination.options;
  const AnyResult all = ComputeAny(options, whole);
  ASSERT_TRUE(all.status.ok()) << all.status;
  for (int64_t begin : {0, 5}) {
    LossInputs part = whole;
    part.rows = begin == 0 ? 5 : 7;
    part.logits = static_cast<const float*>(whole.logits) + begin * 10;
    part.labels += begin;
    part.row_weights += begin;
    DenseTeacher teacher = whole.teachers[0];
    teacher.values = static_cast<const float*>(teacher.values) + begin * 10;
    part.teachers = absl::MakeConstSpan(&teacher, 1);
    part.gradient_scale = WeightOf(options, part) / WeightOf(options, whole);
    const AnyResult result = ComputeAny(options, part);
    for (int64_t i = 0; i < part.rows * 10; ++i) {
      EXPECT_NEAR(result.gradient(part, i), all.gradient(whole, begin * 10 + i), 1e-8);
    }
  }
}

TEST(LossInputValidationTest, NamesWhatIsWrongBeforeAnythingIsWritten) {
  LossCombination combination;
  combination.teachers = {{DenseTeacher::kLogits, NumberFormat::kFloat32}};
  const CombinationBatch batch(combination, 4, 3, 1.0, 1);
  const auto message = [](const LossOptions& options, const LossInputs& inputs) {
    std::vector<float> gradient(12, 7);
    LossOutputs outputs;
    outputs.gradient = gradient.data();
    const absl::Status status = ComputeLossCpu(options, inputs, &outputs, 1);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(gradient, std::vector<float>(12, 7));  // untouched
    EXPECT_TRUE(outputs.finite);
    return std::string(status.message());
  };
  const LossOptions options;

  LossInputs inputs = batch.inputs();
  inputs.logits_format = NumberFormat::kFloat16;
  EXPECT_THAT(message(options, inputs),
              HasSubstr("logits_format is float16; want float32 or bfloat16"));

  inputs = batch.inputs();
  const std::vector<int64_t> labels = {0, 1, 7, 2};
  inputs.labels = labels.data();
  EXPECT_THAT(message(options, inputs), HasSubstr("labels holds 7 in row 2; want 0 to 2"));
  LossOptions ignoring;
  ignoring.ignored_label = 7;
  LossOutputs outputs;
  EXPECT_TRUE(ComputeLossCpu(ignoring, inputs, &outputs, 1).ok());
  ignoring.ignored_label = -1;
  EXPECT_THAT(message(ignoring, inputs), HasSubstr("labels holds 7 in row 2"));

  for (const float bad : {-1.0f, kNan, kInf}) {
    inputs = batch.inputs();
    const std::vector<float> weights = {1, 1, 1, bad};
    inputs.row_weights = weights.data();
    EXPECT_THAT(message(options, inputs), HasSubstr("row_weights holds "));
    EXPECT_THAT(message(options, inputs), HasSubstr(" in row 3"));
    inputs = batch.inputs();
    const std::vector<float> prior = {0.5f, bad, 0.5f};
    inputs.label_prior = prior.data();
    EXPECT_THAT(message(options, inputs), HasSubstr("label_prior holds "));
    EXPECT_THAT(message(options, inputs), HasSubstr(" for class 1; want a probability"));
  }
  inputs = batch.inputs();
  const std::vector<float> prior = {0.5f, 0.25f, 0.5f};
  inputs.label_prior = prior.data();
  EXPECT_THAT(message(options, inputs), HasSubstr("label_prior adds up to 1.25; want 1"));

  inputs = batch.inputs();
  DenseTeacher teacher = inputs.teachers[0];
  inputs.teachers = absl::MakeConstSpan(&teacher, 1);
  teacher.format = NumberFormat::kInt8;
  EXPECT_THAT(message(options, inputs), HasSubstr("teachers 0: scale is null"));
  const std::vector<float> scale(4, 1);
  teacher.scale = scale.data();
  teacher.kind = DenseTeacher::kProbabilities;
  EXPECT_THAT(message(options, inputs), HasSubstr("teachers 0: int8 is for logits"));
  teacher.format = NumberFormat::kFloat32;
  LossOptions bad = options;
  bad.teacher_loss = LossOptions::kSquaredErrorLogits;
  EXPECT_THAT(message(bad, inputs), HasSubstr("teacher 0 gives probabilities"));
  bad = options;
  bad.teacher_average = LossOptions::kLogits;
  EXPECT_THAT(message(bad, inputs), HasSubstr("teacher_average is of logits, and teacher 0"));
  teacher.values = nullptr;
  EXPECT_THAT(message(options, inputs), HasSubstr("teachers 0 is null"));

  inputs = batch.inputs();
  const std::vector<float> targets(12);
  inputs.targets = targets.data();
  bad = options;
  bad.label_loss = LossOptions::kSigmoidCrossEntropy;
  bad.ignored_label = 0;
  EXPECT_THAT(message(bad, inputs), HasSubstr("ignored_label"));
  bad.ignored_label.reset();
  inputs.label_prior = prior.data();
  EXPECT_THAT(message(bad, inputs), HasSubstr("label_prior"));

  const int32_t index[4 * 4] = {};
  const float value[4 * 4] = {};
  TopKTeacher top_k;
  top_k.index = index;
  top_k.value = value;
  top_k.tail = value;
  top_k.k = 4;
  inputs = batch.inputs();
  inputs.topk_teachers = absl::MakeConstSpan(&top_k, 1);
  EXPECT_THAT(message(options, inputs), HasSubstr("topk_teachers 0: k is 4; want 1 to 3"));
}

TEST(LossInputValidationTest, OptionsCanBeCheckedAlone) {
  LossOptions options;
  EXPECT_TRUE(ValidateLossOptions(options, 10).ok());
  EXPECT_FALSE(ValidateLossOptions(options, 0).ok());
  options.label_loss = LossOptions::kSquaredError;
  EXPECT_THAT(std::string(ValidateLossOptions(options, 10).message()), HasSubstr("teacher_loss"));
  EXPECT_TRUE(ValidateLossOptions(options, 10, /*teach=*/false).ok());
  options.ignored_label = 3;
  EXPECT_THAT(std::string(ValidateLossOptions(options, 10, false).message()),
              HasSubstr("ignored_label"));
}

}  // namespace
}  // namespace codistill
