#include "cuda/loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "common/base/random.h"
#include "cuda/loss_reference.h"
#include "cuda/loss_testing.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

// A batch with what it points to.
struct Batch {
  LossInputs inputs;
  std::vector<float> logits, targets;
  std::vector<int64_t> labels;
  std::vector<std::vector<float>> teachers;
  std::vector<DenseTeacher> views;

  Batch(int64_t rows, int64_t classes, int num_teachers, double spread, uint64_t seed) {
    RandomStream random(seed);
    auto fill = [&](std::vector<float>* values, double scale) {
      values->resize(rows * classes);
      for (float& value : *values) value = static_cast<float>(scale * random.Normal());
    };
    fill(&logits, spread);
    targets.resize(rows * classes);
    for (float& target : targets) target = random.Below(4) == 0 ? 1.0f : 0.0f;
    for (int64_t r = 0; r < rows; ++r) {
      labels.push_back(static_cast<int64_t>(random.Below(classes)));
      // Else hardly any row would be right among many classes.
      if (r % 2 == 0) logits[r * classes + labels[r]] += static_cast<float>(5 * spread);
    }
    teachers.resize(num_teachers);
    for (std::vector<float>& teacher : teachers) {
      fill(&teacher, spread);
      views.push_back(LogitsTeacher(teacher.data()));
    }
    inputs.rows = rows;
    inputs.classes = classes;
    inputs.logits = logits.data();
    inputs.labels = labels.data();
    inputs.targets = targets.data();
    inputs.teachers = views;
    inputs.teacher_weight = num_teachers > 0 ? 0.7f : 0;
  }
};

// Compares with the reference; tolerances are relative, with a floor.
void ExpectMatchesReference(const LossOptions& options, const LossInputs& inputs,
                            double loss_floor = 2e-6, double gradient_floor = 4e-7) {
  double relative = 4e-6;
  // p (log p / q - KL): the difference of logarithms around 10.
  if (options.teacher_loss == LossOptions::kKlStudentTeacher) gradient_floor *= 20;
  if (!HasVectors()) {
    relative *= 20;
    loss_floor *= 20;
    gradient_floor *= 20;
  }
  const ReferenceLoss expected = ComputeLossReference(options, inputs);
  const Result actual = Compute(options, inputs);
  ASSERT_TRUE(actual.status.ok()) << actual.status;
  const double t2 = options.temperature * options.temperature;
  auto near = [&](double a, double b, double floor) {
    return std::abs(a - b) <= floor + relative * std::abs(b);
  };
  const double rows = static_cast<double>(inputs.rows);
  EXPECT_TRUE(
      near(actual.outputs.sums.label_loss_sum, expected.sums.label_loss_sum, loss_floor * rows))
      << actual.outputs.sums.label_loss_sum << " for " << expected.sums.label_loss_sum;
  EXPECT_TRUE(near(actual.outputs.sums.teacher_loss_sum, expected.sums.teacher_loss_sum,
                   loss_floor * rows * t2))
      << actual.outputs.sums.teacher_loss_sum << " for " << expected.sums.teacher_loss_sum;
  EXPECT_EQ(actual.outputs.sums.correct, expected.sums.correct);
  EXPECT_TRUE(actual.outputs.finite);
  const double floor = gradient_floor * (1 + inputs.teacher_weight * options.temperature) / rows *
                       std::abs(inputs.gradient_scale);
  for (size_t i = 0; i < actual.gradient.size(); ++i) {
    ASSERT_TRUE(near(actual.gradient[i], expected.gradient[i], floor))
        << "element " << i << ": " << actual.gradient[i] << " for " << expected.gradient[i];
  }
}

class LossTest : public LossTargetTest {};

INSTANTIATE_TEST_SUITE_P(Targets, LossTest, ::testing::ValuesIn(LossTargets()),
                         [](const ::testing::TestParamInfo<int64_t>& info) {
                           return std::string(hwy::TargetName(info.param));
                         });

const LossOptions::LabelLoss kLabelLosses[] = {LossOptions::kSoftmaxCrossEntropy,
                                               LossOptions::kSigmoidCrossEntropy,
                                               LossOptions::kSquaredError};
const LossOptions::TeacherLoss kTeacherLosses[] = {
    LossOptions::kSoftCrossEntropy, LossOptions::kKlTeacherStudent, LossOptions::kKlStudentTeacher,
    LossOptions::kSquaredErrorLogits};

TEST_P(LossTest, MatchesTheReferenceOverAllOptions) {
  for (LossOptions::LabelLoss label_loss : kLabelLosses) {
    for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
      if (label_loss == LossOptions::kSquaredError &&
          teacher_loss != LossOptions::kSquaredErrorLogits) {
        continue;
      }
      for (int teachers : {0, 1, 2, 5}) {
        for (auto average : {LossOptions::kProbabilities, LossOptions::kLogits}) {
          for (float temperature : {1.0f, 2.5f}) {
            for (float smoothing : {0.0f, 0.1f}) {
              if (smoothing > 0 && label_loss == LossOptions::kSquaredError) continue;
              for (int64_t classes : {1, 2, 3, 17, 100}) {
                LossOptions options;
                options.label_loss = label_loss;
                options.teacher_loss = teacher_loss;
                options.teacher_average = average;
                options.temperature = temperature;
                options.label_smoothing = smoothing;
                SCOPED_TRACE(::testing::Message()
                             << "label " << label_loss << " teacher " << teacher_loss << " x "
                             << teachers << " average " << average << " T " << temperature
                             << " smoothing " << smoothing << " classes " << classes);
                Batch batch(7, classes, teachers, 3.0, 17 * classes + teachers);
                batch.inputs.gradient_scale = 0.25;
                ExpectMatchesReference(options, batch.inputs);
                if (HasFatalFailure()) return;
              }
            }
          }
        }
      }
    }
  }
}

TEST_P(LossTest, MatchesTheReferenceWithManyClasses) {
  for (int64_t classes : {1000, 4096, 4097, 13777}) {
    for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
      for (int teachers : {1, 2}) {
        LossOptions options;
        options.teacher_loss = teacher_loss;
        options.label_smoothing = teachers == 2 ? 0.1f : 0;
        options.temperature = teachers == 2 ? 2 : 1;
        SCOPED_TRACE(::testing::Message()
                     << classes << " classes, teacher " << teacher_loss << " x " << teachers);
        ExpectMatchesReference(options, Batch(5, classes, teachers, 2.0, classes).inputs);
      }
    }
  }
}

TEST_P(LossTest, SurvivesExtremeLogits) {
  for (LossOptions::LabelLoss label_loss : kLabelLosses) {
    for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
      if (label_loss == LossOptions::kSquaredError &&
          teacher_loss != LossOptions::kSquaredErrorLogits) {
        continue;
      }
      for (int64_t classes : {1, 3, 17, 5000}) {
        Batch batch(6, classes, 2, 1.0, 5);
        for (int64_t r = 0; r < 6; ++r) {
          for (int64_t c = 0; c < classes; ++c) {
            const int64_t i = r * classes + c;
            // Rows: all far up, all far down, both, the peak in the last chunk, teachers apart.
            const float up = 1e4f, far = c % 2 == 0 ? up : -up;
            if (r == 0) batch.logits[i] += up;
            if (r == 1) batch.logits[i] -= up;
            if (r == 2) batch.logits[i] += far;
            if (r == 3 && c == classes - 1) batch.logits[i] = up;
            if (r == 4) batch.teachers[0][i] += far;
            if (r == 5 && c == classes - 1) batch.teachers[1][i] -= up;
          }
        }
        LossOptions options;
        options.label_loss = label_loss;
        options.teacher_loss = teacher_loss;
        SCOPED_TRACE(::testing::Message() << "label " << label_loss << " teacher " << teacher_loss
                                          << " classes " << classes);
        // The floats themselves are 1e-3 apart up there; losses of 1e4 and squares of it occur.
        ExpectMatchesReference(options, batch.inputs, 2e-3, 1e-5);
      }
    }
  }
}

TEST_P(LossTest, GradientIsTheDerivativeOfTheLoss) {
  // Of the reference in double precision, so that the step can be small: what the reference and the
  // kernel agree on elsewhere is then right.
  for (LossOptions::LabelLoss label_loss : kLabelLosses) {
    for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
      if (label_loss == LossOptions::kSquaredError &&
          teacher_loss != LossOptions::kSquaredErrorLogits) {
        continue;
      }
      for (auto average : {LossOptions::kProbabilities, LossOptions::kLogits}) {
        LossOptions options;
        options.label_loss = label_loss;
        options.teacher_loss = teacher_loss;
        options.teacher_average = average;
        options.temperature = 1.5;
        if (label_loss != LossOptions::kSquaredError) options.label_smoothing = 0.2f;
        Batch batch(3, 5, 2, 1.5, 99);
        const Result actual = Compute(options, batch.inputs);
        for (size_t i = 0; i < batch.logits.size(); ++i) {
          auto loss_at = [&](float logit) {
            std::vector<float> logits = batch.logits;
            logits[i] = logit;
            LossInputs inputs = batch.inputs;
            inputs.logits = logits.data();
            const LossSums sums = ComputeLossReference(options, inputs).sums;
            return (sums.label_loss_sum + inputs.teacher_weight * sums.teacher_loss_sum) /
                   static_cast<double>(inputs.rows);
          };
          const float up = batch.logits[i] + 1e-3f, down = batch.logits[i] - 1e-3f;
          const double slope = (loss_at(up) - loss_at(down)) / (static_cast<double>(up) - down);
          ASSERT_NEAR(actual.gradient[i], slope, 1e-6 + 1e-5 * std::abs(slope))
              << "label " << label_loss << " teacher " << teacher_loss << " average " << average
              << " element " << i;
        }
      }
    }
  }
}

TEST_P(LossTest, KnownValues) {
  const float logits[] = {0, 0, 0, 0, std::log(3.0f), 0};
  const int64_t labels[] = {2, 1};
  LossInputs inputs;
  inputs.rows = 2;
  inputs.classes = 3;
  inputs.logits = logits;
  inputs.labels = labels;
  const Result result = Compute(LossOptions(), inputs);
  ASSERT_TRUE(result.status.ok());
  EXPECT_NEAR(result.outputs.sums.label_loss_sum, std::log(3.0) + std::log(5.0 / 3), 1e-6);
  EXPECT_EQ(result.outputs.sums.teacher_loss_sum, 0);
  EXPECT_EQ(result.outputs.sums.correct, 1);  // of equal logits the first is the answer
  const float expected[] = {1 / 6.f, 1 / 6.f, -2 / 6.f, 0.1f, -0.2f, 0.1f};
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(result.gradient[i], expected[i], 1e-7) << i;
}

TEST_P(LossTest, DivergenceFromAnEqualTeacherIsZero) {
  for (LossOptions::TeacherLoss teacher_loss :
       {LossOptions::kKlTeacherStudent, LossOptions::kKlStudentTeacher,
        LossOptions::kSquaredErrorLogits}) {
    Batch batch(4, 1000, 1, 3.0, 3);
    const DenseTeacher self = LogitsTeacher(batch.logits.data());
    batch.inputs.teachers = absl::MakeConstSpan(&self, 1);
    LossOptions options;
    options.teacher_loss = teacher_loss;
    const Result with = Compute(options, batch.inputs);
    batch.inputs.teacher_weight = 0;
    const Result without = Compute(options, batch.inputs);
    EXPECT_NEAR(with.outputs.sums.teacher_loss_sum, 0, 1e-6);
    for (size_t i = 0; i < with.gradient.size(); ++i) {
      ASSERT_NEAR(with.gradient[i], without.gradient[i], 5e-8);
    }
  }
}

TEST_P(LossTest, WeightZeroIsBitIdenticalToNoTeacher) {
  for (LossOptions::LabelLoss label_loss : kLabelLosses) {
    for (int64_t classes : {3, 5000}) {
      LossOptions options;
      options.label_loss = label_loss;
      options.temperature = 3;
      Batch batch(9, classes, 2, 3.0, 8);
      std::fill(batch.teachers[0].begin(), batch.teachers[0].end(),
                std::numeric_limits<float>::quiet_NaN());
      batch.inputs.teacher_weight = 0;
      const Result with = Compute(options, batch.inputs);
      batch.inputs.teachers = {};
      LossOptions labels_only;
      labels_only.label_loss = label_loss;
      const Result without = Compute(labels_only, batch.inputs);
      EXPECT_EQ(with.gradient, without.gradient);
      EXPECT_EQ(with.outputs.sums.label_loss_sum, without.outputs.sums.label_loss_sum);
      EXPECT_EQ(with.outputs.sums.teacher_loss_sum, 0);
      EXPECT_TRUE(with.outputs.finite);
    }
  }
}

TEST_P(LossTest, ResultsDoNotDependOnThreads) {
  for (LossOptions::LabelLoss label_loss : kLabelLosses) {
    LossOptions options;
    options.label_loss = label_loss;
    if (label_loss == LossOptions::kSquaredError) {
      options.teacher_loss = LossOptions::kSquaredErrorLogits;
    }
    for (const auto& [rows, classes] :
         std::vector<std::pair<int64_t, int64_t>>{{80, 9001}, {300001, 1}, {30000, 10}}) {
      Batch batch(rows, classes, 1, 3.0, 4);
      const Result one = Compute(options, batch.inputs, 1);
      for (int threads : {2, 3, 5}) {
        const Result more = Compute(options, batch.inputs, threads);
        EXPECT_EQ(one.gradient, more.gradient);
        EXPECT_EQ(one.outputs.sums.label_loss_sum, more.outputs.sums.label_loss_sum);
        EXPECT_EQ(one.outputs.sums.teacher_loss_sum, more.outputs.sums.teacher_loss_sum);
        EXPECT_EQ(one.outputs.sums.correct, more.outputs.sums.correct);
      }
    }
  }
}

TEST_P(LossTest, LargeGradientsMatchSmallOnes) {
  // Beyond the cache, stores take another way; rows start at every alignment.
  LossOptions options;
  options.label_smoothing = 0.1f;
  Batch large(1200, 2003, 1, 2.0, 6);
  large.inputs.gradient_scale = 1200;
  const Result all = Compute(options, large.inputs);
  for (int64_t row : {0, 1, 2, 3, 500, 1199}) {
    LossInputs one = large.inputs;
    one.rows = 1;
    one.gradient_scale = 1;
    one.logits = large.logits.data() + row * 2003;
    one.labels += row;
    const DenseTeacher teacher = LogitsTeacher(large.teachers[0].data() + row * 2003);
    one.teachers = absl::MakeConstSpan(&teacher, 1);
    const Result alone = Compute(options, one);
    EXPECT_EQ(alone.gradient, std::vector<float>(all.gradient.begin() + row * 2003,
                                                 all.gradient.begin() + (row + 1) * 2003))
        << row;
  }
}

TEST_P(LossTest, GradientMayReplaceTheLogitsOrBeLeftOut) {
  for (LossOptions::LabelLoss label_loss : kLabelLosses) {
    for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
      if (label_loss == LossOptions::kSquaredError &&
          teacher_loss != LossOptions::kSquaredErrorLogits) {
        continue;
      }
      LossOptions options;
      options.label_loss = label_loss;
      options.teacher_loss = teacher_loss;
      Batch batch(10, 4500, 2, 2.0, 2);
      const Result apart = Compute(options, batch.inputs);
      LossOutputs sums_only;
      ASSERT_TRUE(ComputeLossCpu(options, batch.inputs, &sums_only, 1).ok());
      LossOutputs in_place;
      in_place.gradient = batch.logits.data();
      ASSERT_TRUE(ComputeLossCpu(options, batch.inputs, &in_place, 1).ok());
      EXPECT_EQ(batch.logits, apart.gradient);
      for (const LossOutputs* other : {&sums_only, &in_place}) {
        EXPECT_EQ(other->sums.label_loss_sum, apart.outputs.sums.label_loss_sum);
        EXPECT_EQ(other->sums.teacher_loss_sum, apart.outputs.sums.teacher_loss_sum);
        EXPECT_EQ(other->sums.correct, apart.outputs.sums.correct);
      }
    }
  }
}

TEST_P(LossTest, PartsOfABatchAddUp) {
  Batch batch(8, 10, 1, 2.0, 12);
  const Result whole = Compute(LossOptions(), batch.inputs);
  for (int64_t begin : {0, 4}) {
    LossInputs part = batch.inputs;
    part.rows = 4;
    part.gradient_scale = 0.5;
    part.logits = batch.logits.data() + begin * 10;
    part.labels += begin;
    const DenseTeacher teacher = LogitsTeacher(batch.teachers[0].data() + begin * 10);
    part.teachers = absl::MakeConstSpan(&teacher, 1);
    const Result result = Compute(LossOptions(), part);
    for (int i = 0; i < 40; ++i) {
      EXPECT_NEAR(result.gradient[i], whole.gradient[begin * 10 + i], 1e-8);
    }
  }
}

TEST_P(LossTest, SaysWhenSomethingIsNotFinite) {
  const float kNan = std::numeric_limits<float>::quiet_NaN();
  const float kInf = std::numeric_limits<float>::infinity();
  float signalling;  // a NaN with a payload, as uninitialised memory may hold
  const uint32_t bits = 0x7fc12345;
  std::memcpy(&signalling, &bits, sizeof(bits));
  for (int64_t classes : {1, 3, 40, 4500}) {
    Batch batch(3, classes, 1, 1.0, 1);
    for (LossOptions::LabelLoss label_loss : kLabelLosses) {
      for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
        if (label_loss == LossOptions::kSquaredError &&
            teacher_loss != LossOptions::kSquaredErrorLogits) {
          continue;
        }
        LossOptions options;
        options.label_loss = label_loss;
        options.teacher_loss = teacher_loss;
        for (float bad : {kNan, signalling, kInf}) {
          for (int64_t place : {int64_t{0}, classes / 2, 3 * classes - 1}) {
            for (bool in_teacher : {false, true}) {
              // A binary teacher that is certain is a fine one.
              if (bad == kInf && (in_teacher || label_loss != LossOptions::kSoftmaxCrossEntropy)) {
                continue;
              }
              float* const element = &(in_teacher ? batch.teachers[0] : batch.logits)[place];
              const float good = *element;
              *element = bad;
              const Result result = Compute(options, batch.inputs);
              *element = good;
              EXPECT_EQ(result.status.code(), absl::StatusCode::kInvalidArgument);
              EXPECT_FALSE(result.outputs.finite)
                  << "label " << label_loss << " teacher " << teacher_loss << " classes " << classes
                  << " place " << place << " bad " << bad << " in teacher " << in_teacher;
            }
          }
        }
      }
    }
    EXPECT_TRUE(Compute(LossOptions(), batch.inputs).outputs.finite);
  }
}

TEST(LossValidationTest, NamesWhatIsWrong) {
  LossOptions options;
  Batch batch(4, 3, 1, 1.0, 1);
  auto message = [&](const LossOptions& options, const LossInputs& inputs) {
    std::vector<float> gradient(12, 7);
    LossOutputs outputs;
    outputs.gradient = gradient.data();
    const absl::Status status = ComputeLossCpu(options, inputs, &outputs, 1);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(gradient, std::vector<float>(12, 7));  // untouched
    return std::string(status.message());
  };
  batch.labels[2] = 3;
  EXPECT_THAT(message(options, batch.inputs), HasSubstr("holds 3 in row 2; want 0 to 2"));
  batch.labels[2] = -1;
  EXPECT_THAT(message(options, batch.inputs), HasSubstr("holds -1 in row 2"));
  batch.labels[2] = 0;

  LossOptions bad = options;
  bad.temperature = 0;
  EXPECT_THAT(message(bad, batch.inputs), HasSubstr("temperature"));
  bad = options;
  bad.label_smoothing = 1;
  EXPECT_THAT(message(bad, batch.inputs), HasSubstr("label_smoothing"));
  bad = options;
  bad.label_loss = LossOptions::kSquaredError;
  EXPECT_THAT(message(bad, batch.inputs), HasSubstr("teacher_loss"));
  bad.label_smoothing = 0.1f;
  EXPECT_THAT(message(bad, batch.inputs), HasSubstr("label_smoothing"));

  LossInputs inputs = batch.inputs;
  inputs.teachers = {};
  EXPECT_THAT(message(options, inputs), HasSubstr("there are no teachers"));
  inputs = batch.inputs;
  inputs.teacher_weight = -1;
  EXPECT_THAT(message(options, inputs), HasSubstr("teacher_weight"));
  inputs = batch.inputs;
  inputs.logits = nullptr;
  EXPECT_THAT(message(options, inputs), HasSubstr("logits is null"));
  inputs = batch.inputs;
  inputs.labels = nullptr;
  EXPECT_THAT(message(options, inputs), HasSubstr("labels is null"));
  inputs = batch.inputs;
  inputs.classes = 0;
  EXPECT_THAT(message(options, inputs), HasSubstr("classes"));
}

TEST(LossValidationTest, NoRowsHaveNoMean) {
  LossInputs inputs;
  inputs.classes = 3;
  LossOutputs outputs;
  const absl::Status status = ComputeLossCpu(LossOptions(), inputs, &outputs, 4);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rows is 0; want at least 1"));
}

}  // namespace
}  // namespace codistill
