// What is compared with what: the reference's loss, in double precision, is the definition. Its
// gradient is compared with central differences of that loss, to 1e-6; the kernel's sums and
// gradient with the reference's.

#include "cuda/loss_combinations.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "cuda/loss.h"
#include "cuda/loss_reference.h"
#include "cuda/loss_testing.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

class LossCombinationsTest : public LossTargetTest {};

INSTANTIATE_TEST_SUITE_P(Targets, LossCombinationsTest, ::testing::ValuesIn(LossTargets()),
                         [](const ::testing::TestParamInfo<int64_t>& info) {
                           return std::string(hwy::TargetName(info.param));
                         });

std::vector<double> Logits(const LossInputs& inputs) {
  std::vector<double> logits;
  for (int64_t i = 0; i < inputs.rows * inputs.classes; ++i) {
    logits.push_back(inputs.logits_format == NumberFormat::kFloat32
                         ? static_cast<const float*>(inputs.logits)[i]
                         : FromBfloat16(static_cast<const uint16_t*>(inputs.logits)[i]));
  }
  return logits;
}

// The loss as one number.
double Mean(const LossInputs& inputs, const LossSums& sums) {
  return (sums.label_loss_sum + inputs.teacher_weight * sums.teacher_loss_sum) / sums.weight_sum;
}

TEST(LossReferenceTest, ThereAreAboutTwoHundredCombinations) {
  std::set<std::string> names;
  for (const LossCombination& combination : AllLossCombinations()) names.insert(combination.name);
  EXPECT_GE(names.size(), 190u);
  EXPECT_LE(names.size(), 220u);
}

TEST(LossReferenceTest, GradientsAreCentralDifferences) {
  uint64_t seed = 0;
  for (const LossCombination& combination : AllLossCombinations()) {
    SCOPED_TRACE(combination.name);
    const CombinationBatch batch(combination, 5, 7, 2.0, ++seed);
    const LossInputs& inputs = batch.inputs();
    const std::vector<double> logits = Logits(inputs);
    const ReferenceLoss at = ComputeLossReference(combination.options, inputs, logits);
    for (size_t i = 0; i < logits.size(); ++i) {
      constexpr double kStep = 2e-5;
      const auto loss_at = [&](double logit) {
        std::vector<double> moved = logits;
        moved[i] = logit;
        return Mean(inputs, ComputeLossReference(combination.options, inputs, moved).sums);
      };
      const double slope = (loss_at(logits[i] + kStep) - loss_at(logits[i] - kStep)) / (2 * kStep);
      ASSERT_NEAR(at.gradient[i], slope, 1e-6 * std::abs(slope) + 2e-9) << "element " << i;
    }
  }
}

// `scale` widens the tolerances.
void ExpectMatchesReference(const LossOptions& options, const LossInputs& inputs,
                            double scale = 1) {
  if (!HasVectors()) scale *= 20;
  const ReferenceLoss expected = ComputeLossReference(options, inputs);
  const AnyResult actual = ComputeAny(options, inputs);
  ASSERT_TRUE(actual.status.ok()) << actual.status;
  EXPECT_TRUE(actual.outputs.finite);
  const LossSums& sums = actual.outputs.sums;
  const double weight = expected.sums.weight_sum, t2 = options.temperature * options.temperature;
  EXPECT_DOUBLE_EQ(sums.weight_sum, weight);
  EXPECT_EQ(sums.counted_rows, expected.sums.counted_rows);
  EXPECT_EQ(sums.correct, expected.sums.correct);
  EXPECT_NEAR(sums.label_loss_sum, expected.sums.label_loss_sum,
              scale * (2e-6 * weight + 4e-6 * std::abs(expected.sums.label_loss_sum)));
  EXPECT_NEAR(sums.teacher_loss_sum, expected.sums.teacher_loss_sum,
              scale * (2e-6 * weight * t2 + 4e-6 * std::abs(expected.sums.teacher_loss_sum)));
  double floor = 4e-7 * (1 + inputs.teacher_weight * options.temperature) / weight *
                 (inputs.row_weights == nullptr ? 1 : 2.5);
  // p (log p / q - KL): the difference of logarithms around 10.
  if (options.teacher_loss == LossOptions::kKlStudentTeacher) floor *= 20;
  const double relative =
      inputs.logits_format == NumberFormat::kBfloat16 ? 1.0 / 256 : scale * 6e-6;
  for (int64_t i = 0; i < inputs.rows * inputs.classes; ++i) {
    ASSERT_NEAR(actual.gradient(inputs, i), expected.gradient[i],
                scale * floor + relative * std::abs(expected.gradient[i]))
        << "row " << i / inputs.classes << " class " << i % inputs.classes;
  }
}

TEST_P(LossCombinationsTest, KernelsMatchTheReference) {
  uint64_t seed = 1000;
  const std::vector<int64_t> targets = LossTargets();
  for (const LossCombination& combination : AllLossCombinations()) {
    SCOPED_TRACE(combination.name);
    for (int64_t classes : {7, 33, 4999}) {
      // Of these the reference and the random numbers take long: on one of the targets each.
      if (classes > 1000 && targets[seed % targets.size()] != GetParam() && ++seed > 0) continue;
      SCOPED_TRACE(classes);
      const CombinationBatch batch(combination, 5, classes, 2.0, ++seed);
      ExpectMatchesReference(combination.options, batch.inputs());
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(LossCombinationsTest, LogitsOfEightyAndBeyond) {
  uint64_t seed = 2000;
  for (const LossCombination& combination : AllLossCombinations()) {
    SCOPED_TRACE(combination.name);
    const bool square = combination.options.label_loss == LossOptions::kSquaredError ||
                        combination.options.teacher_loss == LossOptions::kSquaredErrorLogits;
    for (double spread : {30.0, 1000.0}) {
      if (square && spread > 100) continue;
      SCOPED_TRACE(spread);
      // Differences of logits are exact to a part in 1e7 of what they are.
      const CombinationBatch batch(combination, 5, 300, spread, ++seed);
      ExpectMatchesReference(combination.options, batch.inputs(), spread);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(LossCombinationsTest, ResultsDoNotDependOnThreads) {
  uint64_t seed = 3000;
  const std::vector<LossCombination> list = AllLossCombinations();
  for (size_t i = 0; i < list.size(); i += 12) {
    SCOPED_TRACE(list[i].name);
    const CombinationBatch batch(list[i], 50, 9001, 2.0, ++seed);
    const AnyResult one = ComputeAny(list[i].options, batch.inputs(), 1);
    ASSERT_TRUE(one.status.ok()) << one.status;
    for (int threads : {2, 3}) {
      const AnyResult more = ComputeAny(list[i].options, batch.inputs(), threads);
      ASSERT_EQ(one.bytes, more.bytes);
      EXPECT_EQ(one.outputs.sums.label_loss_sum, more.outputs.sums.label_loss_sum);
      EXPECT_EQ(one.outputs.sums.teacher_loss_sum, more.outputs.sums.teacher_loss_sum);
      EXPECT_EQ(one.outputs.sums.correct, more.outputs.sums.correct);
    }
  }
}

TEST_P(LossCombinationsTest, GradientMayReplaceTheLogitsOrBeLeftOut) {
  uint64_t seed = 4000;
  for (const LossCombination& combination : AllLossCombinations()) {
    SCOPED_TRACE(combination.name);
    const CombinationBatch batch(combination, 7, 777, 2.0, ++seed);
    LossInputs inputs = batch.inputs();
    const AnyResult apart = ComputeAny(combination.options, inputs);
    const char* const logits = static_cast<const char*>(inputs.logits);
    std::vector<char> buffer(logits, logits + apart.bytes.size());
    inputs.logits = buffer.data();
    LossOutputs sums_only, in_place;
    ASSERT_TRUE(ComputeLossCpu(combination.options, inputs, &sums_only, 1).ok());
    in_place.gradient = buffer.data();
    ASSERT_TRUE(ComputeLossCpu(combination.options, inputs, &in_place, 1).ok());
    EXPECT_EQ(buffer, apart.bytes);
    for (const LossOutputs* other : {&sums_only, &in_place}) {
      EXPECT_EQ(other->sums.label_loss_sum, apart.outputs.sums.label_loss_sum);
      EXPECT_EQ(other->sums.teacher_loss_sum, apart.outputs.sums.teacher_loss_sum);
      EXPECT_EQ(other->sums.correct, apart.outputs.sums.correct);
    }
  }
}

// Rows of one another's weight, with no label to speak of: psi alone.
struct Pair {
  std::vector<float> logits, teacher;
  std::vector<int64_t> labels;
  DenseTeacher view;
  LossInputs inputs;

  Pair(std::vector<float> z, std::vector<float> q, int64_t classes, DenseTeacher::Kind kind)
      : logits(std::move(z)), teacher(std::move(q)) {
    view.values = teacher.data();
    view.kind = kind;
    inputs.rows = static_cast<int64_t>(logits.size()) / classes;
    inputs.classes = classes;
    inputs.logits = logits.data();
    labels.assign(inputs.rows, 0);
    inputs.labels = labels.data();
    inputs.teachers = absl::MakeConstSpan(&view, 1);
    inputs.teacher_weight = 1;
  }
};

TEST_P(LossCombinationsTest, DivergencesGoTheWayTheirNamesSay) {
  // p = (1/2, 1/4, 1/4) and q = (1/10, 6/10, 3/10): the two directions differ.
  const std::vector<float> q = {0.1f, 0.6f, 0.3f};
  std::vector<float> log_q;
  for (float value : q) log_q.push_back(std::log(value));
  const double p[] = {0.5, 0.25, 0.25};
  double teacher_student = 0, student_teacher = 0;
  for (int c = 0; c < 3; ++c) {
    teacher_student += q[c] * std::log(q[c] / p[c]);
    student_teacher += p[c] * std::log(p[c] / q[c]);
  }
  ASSERT_GT(std::abs(teacher_student - student_teacher), 0.05);
  for (auto kind : {DenseTeacher::kLogits, DenseTeacher::kProbabilities}) {
    const Pair pair({std::log(2.0f), 0, 0}, kind == DenseTeacher::kLogits ? log_q : q, 3, kind);
    LossOptions options;
    options.teacher_loss = LossOptions::kKlTeacherStudent;
    EXPECT_NEAR(ComputeAny(options, pair.inputs).outputs.sums.teacher_loss_sum, teacher_student,
                1e-6);
    EXPECT_NEAR(ComputeLossReference(options, pair.inputs).sums.teacher_loss_sum, teacher_student,
                1e-7);
    options.teacher_loss = LossOptions::kKlStudentTeacher;
    EXPECT_NEAR(ComputeAny(options, pair.inputs).outputs.sums.teacher_loss_sum, student_teacher,
                1e-6);
    EXPECT_NEAR(ComputeLossReference(options, pair.inputs).sums.teacher_loss_sum, student_teacher,
                1e-7);
  }
}

TEST_P(LossCombinationsTest, MeanOverTeachersInsideIsTheMeanOutside) {
  // Soft cross-entropy is linear in the teacher: of the average, it is the average. To 1e-12 in
  // double precision; the kernel to that of its floats.
  for (auto label_loss : {LossOptions::kSoftmaxCrossEntropy, LossOptions::kSigmoidCrossEntropy}) {
    for (auto kind : {DenseTeacher::kLogits, DenseTeacher::kProbabilities}) {
      LossCombination combination;
      combination.options.label_loss = label_loss;
      combination.options.temperature = 2;
      for (int k = 0; k < 3; ++k) {
        combination.teachers.push_back({kind, NumberFormat::kFloat32});
      }
      const CombinationBatch batch(combination, 4, 50, 2.0, 77);
      LossInputs inputs = batch.inputs();
      const ReferenceLoss inside = ComputeLossReference(combination.options, inputs);
      const AnyResult kernel = ComputeAny(combination.options, inputs);
      ASSERT_TRUE(kernel.status.ok()) << kernel.status;
      std::vector<double> outside(inside.gradient.size()), kernel_outside(outside.size());
      double loss = 0, kernel_loss = 0;
      const auto teachers = inputs.teachers;
      for (int k = 0; k < 3; ++k) {
        inputs.teachers = teachers.subspan(k, 1);
        const ReferenceLoss one = ComputeLossReference(combination.options, inputs);
        const AnyResult kernel_one = ComputeAny(combination.options, inputs);
        loss += one.sums.teacher_loss_sum / 3;
        kernel_loss += kernel_one.outputs.sums.teacher_loss_sum / 3;
        for (size_t i = 0; i < outside.size(); ++i) {
          outside[i] += one.gradient[i] / 3;
          kernel_outside[i] += kernel_one.gradient(inputs, i) / 3;
        }
      }
      EXPECT_NEAR(inside.sums.teacher_loss_sum, loss, 1e-12 * loss);
      EXPECT_NEAR(kernel.outputs.sums.teacher_loss_sum, kernel_loss,
                  (HasVectors() ? 2e-6 : 4e-5) * loss);
      for (size_t i = 0; i < outside.size(); ++i) {
        ASSERT_NEAR(inside.gradient[i], outside[i], 1e-12);
        ASSERT_NEAR(kernel.gradient(inputs, i), kernel_outside[i], HasVectors() ? 4e-7 : 8e-6);
      }
    }
  }
}

TEST_P(LossCombinationsTest, ATeacherThatIsTheStudentTeachesNothing) {
  for (float temperature : {1.0f, 2.0f, 3.0f}) {
    for (auto kind : {DenseTeacher::kLogits, DenseTeacher::kProbabilities}) {
      for (auto teacher_loss : {LossOptions::kKlTeacherStudent, LossOptions::kKlStudentTeacher}) {
        LossCombination combination;
        combination.options.teacher_loss = teacher_loss;
        combination.options.temperature = temperature;
        const CombinationBatch batch(combination, 4, 3000, 2.0, 5);
        const float* const z = static_cast<const float*>(batch.inputs().logits);
        const std::vector<float> logits(z, z + 4 * 3000);
        const EncodedTeacher self(kind == DenseTeacher::kLogits
                                      ? logits
                                      : ProbabilitiesOf(logits, 4, 3000, temperature, false),
                                  4, 3000, kind, NumberFormat::kFloat32);
        LossInputs inputs = batch.inputs();
        inputs.teachers = absl::MakeConstSpan(&self.view, 1);
        const AnyResult with = ComputeAny(combination.options, inputs);
        ASSERT_TRUE(with.status.ok()) << with.status;
        const ReferenceLoss reference = ComputeLossReference(combination.options, inputs);
        inputs.teacher_weight = 0;
        const AnyResult without = ComputeAny(combination.options, inputs);
        const double t2 = temperature * temperature;
        EXPECT_NEAR(with.outputs.sums.teacher_loss_sum, 0, (HasVectors() ? 8e-6 : 2e-4) * t2);
        // What the float probabilities have been rounded by shows in double precision.
        EXPECT_NEAR(reference.sums.teacher_loss_sum, 0,
                    kind == DenseTeacher::kLogits ? 1e-12 : 1e-6 * t2);
        for (int64_t i = 0; i < 4 * 3000; ++i) {
          ASSERT_NEAR(with.gradient(inputs, i), without.gradient(inputs, i), 2e-7);
        }
      }
    }
  }
}

TEST_P(LossCombinationsTest, TopKOfAllClassesIsADenseTeacher) {
  for (float temperature : {1.0f, 2.0f}) {
    for (auto teacher_loss : {LossOptions::kSoftCrossEntropy, LossOptions::kKlTeacherStudent}) {
      LossCombination combination;
      combination.options.teacher_loss = teacher_loss;
      combination.options.temperature = temperature;
      combination.topk_teachers = {0};
      const CombinationBatch batch(combination, 4, 500, 2.0, 9);
      LossInputs inputs = batch.inputs();
      const AnyResult all = ComputeAny(combination.options, inputs);
      const ReferenceLoss all_reference = ComputeLossReference(combination.options, inputs);
      ASSERT_TRUE(all.status.ok()) << all.status;
      std::vector<float> probabilities(4 * 500);
      const TopKTeacher& top_k = inputs.topk_teachers[0];
      ASSERT_EQ(top_k.k, 500);
      for (int64_t i = 0; i < 4 * 500; ++i) {
        probabilities[i / 500 * 500 + top_k.index[i]] = top_k.value[i];
      }
      const EncodedTeacher dense(probabilities, 4, 500, DenseTeacher::kProbabilities,
                                 NumberFormat::kFloat32);
      inputs.topk_teachers = {};
      inputs.teachers = absl::MakeConstSpan(&dense.view, 1);
      const AnyResult given = ComputeAny(combination.options, inputs);
      const ReferenceLoss reference = ComputeLossReference(combination.options, inputs);
      ASSERT_TRUE(given.status.ok()) << given.status;
      const double loss = given.outputs.sums.teacher_loss_sum;
      EXPECT_NEAR(all.outputs.sums.teacher_loss_sum, loss, 2e-5 * (1 + std::abs(loss)));
      EXPECT_NEAR(all_reference.sums.teacher_loss_sum, reference.sums.teacher_loss_sum, 1e-10);
      for (int64_t i = 0; i < 4 * 500; ++i) {
        ASSERT_NEAR(all_reference.gradient[i], reference.gradient[i], 1e-12);
        ASSERT_NEAR(all.gradient(inputs, i), given.gradient(inputs, i), 1e-6);
      }
    }
  }
}

TEST_P(LossCombinationsTest, AQuarterOfAMillionClasses) {
  constexpr int64_t kClasses = 262144;
  const auto f32 = NumberFormat::kFloat32;
  LossCombination given, logits, many;
  given.teachers = {{DenseTeacher::kProbabilities, f32}};
  logits.teachers = {{DenseTeacher::kLogits, NumberFormat::kInt8}};
  logits.options.temperature = 2;
  logits.logits_format = NumberFormat::kBfloat16;
  many.teachers = {{DenseTeacher::kLogits, f32}, {DenseTeacher::kProbabilities, f32}};
  many.topk_teachers = {64};
  many.options.label_smoothing = 0.1f;
  many.prior = true;
  for (const LossCombination& combination : {given, logits, many}) {
    const CombinationBatch batch(combination, 3, kClasses, 2.0, 31);
    // Sixty times as many exponentials are summed as elsewhere.
    ExpectMatchesReference(combination.options, batch.inputs(), 3);
  }
}

}  // namespace
}  // namespace codistill
