// The loss with teachers that name their most likely classes only.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/random.h"
#include "cuda/loss.h"
#include "cuda/loss_reference.h"
#include "cuda/loss_testing.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

// The k largest of softmax(teacher / T) of each row, with what is left.
struct TopK {
  std::vector<int32_t> index;
  std::vector<float> value, tail;
  int64_t k;

  TopK(const std::vector<float>& teacher, int64_t rows, int64_t classes, int64_t k,
       double temperature)
      : k(k) {
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> p(teacher.begin() + r * classes, teacher.begin() + (r + 1) * classes);
      const double max = *std::max_element(p.begin(), p.end());
      double sum = 0;
      for (double& value : p) sum += value = std::exp((value - max) / temperature);
      std::vector<int32_t> order(classes);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return p[a] > p[b]; });
      double rest = 0;
      for (int64_t i = classes - 1; i >= k; --i) rest += p[order[i]] / sum;
      for (int64_t i = 0; i < k; ++i) {
        index.push_back(order[i]);
        value.push_back(static_cast<float>(p[order[i]] / sum));
      }
      tail.push_back(static_cast<float>(rest));
    }
  }

  TopKTeacher view() const { return {index.data(), value.data(), tail.data(), k}; }
};

struct Batch {
  LossInputs inputs;
  std::vector<float> logits;
  std::vector<int64_t> labels;
  std::vector<std::vector<float>> dense;
  std::vector<DenseTeacher> dense_views;
  std::vector<TopK> top_k;
  std::vector<TopKTeacher> views;

  Batch(int64_t rows, int64_t classes, int num_dense, const std::vector<int64_t>& ks,
        double temperature, double spread, uint64_t seed) {
    RandomStream random(seed);
    auto draw = [&] {
      std::vector<float> values(rows * classes);
      for (float& value : values) value = static_cast<float>(spread * random.Normal());
      return values;
    };
    logits = draw();
    for (int64_t r = 0; r < rows; ++r)
      labels.push_back(static_cast<int64_t>(random.Below(classes)));
    for (int i = 0; i < num_dense; ++i) dense.push_back(draw());
    for (int64_t k : ks) top_k.emplace_back(draw(), rows, classes, k, temperature);
    Connect(rows, classes);
  }

  void Connect(int64_t rows, int64_t classes) {
    dense_views.clear();
    views.clear();
    for (const auto& teacher : dense) dense_views.push_back(LogitsTeacher(teacher.data()));
    for (const TopK& teacher : top_k) views.push_back(teacher.view());
    inputs.rows = rows;
    inputs.classes = classes;
    inputs.logits = logits.data();
    inputs.labels = labels.data();
    inputs.teachers = dense_views;
    inputs.topk_teachers = views;
    inputs.teacher_weight = 0.7f;
  }
};

// Compares with the reference; `scale` widens the tolerances.
void ExpectMatchesReference(const LossOptions& options, const LossInputs& inputs,
                            double scale = 1) {
  if (!HasVectors()) scale *= 20;
  const ReferenceLoss expected = ComputeLossReference(options, inputs);
  const Result actual = Compute(options, inputs);
  ASSERT_TRUE(actual.status.ok()) << actual.status;
  EXPECT_TRUE(actual.outputs.finite);
  const double rows = static_cast<double>(inputs.rows);
  const double t2 = options.temperature * options.temperature;
  EXPECT_NEAR(actual.outputs.sums.label_loss_sum, expected.sums.label_loss_sum,
              scale * (2e-6 * rows + 4e-6 * std::abs(expected.sums.label_loss_sum)));
  EXPECT_NEAR(actual.outputs.sums.teacher_loss_sum, expected.sums.teacher_loss_sum,
              scale * (2e-6 * rows * t2 + 4e-6 * std::abs(expected.sums.teacher_loss_sum)));
  const double floor =
      4e-7 * (1 + inputs.teacher_weight * options.temperature) / rows * inputs.gradient_scale;
  for (size_t i = 0; i < actual.gradient.size(); ++i) {
    ASSERT_NEAR(actual.gradient[i], expected.gradient[i],
                scale * (floor + 6e-6 * std::abs(expected.gradient[i])))
        << "row " << i / inputs.classes << " class " << i % inputs.classes;
  }
}

class TopKLossTest : public LossTargetTest {};

INSTANTIATE_TEST_SUITE_P(Targets, TopKLossTest, ::testing::ValuesIn(LossTargets()),
                         [](const ::testing::TestParamInfo<int64_t>& info) {
                           return std::string(hwy::TargetName(info.param));
                         });

const LossOptions::TeacherLoss kTeacherLosses[] = {LossOptions::kSoftCrossEntropy,
                                                   LossOptions::kKlTeacherStudent};

TEST_P(TopKLossTest, MatchesTheReferenceOverAllOptions) {
  for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
    for (int dense : {0, 1, 2}) {
      for (const int64_t classes : {1, 2, 17, 100, 5000}) {
        const std::vector<std::vector<int64_t>> sets = {
            {1}, {classes}, {std::min<int64_t>(classes, 7), 1, std::min<int64_t>(classes, 64)}};
        for (const std::vector<int64_t>& ks : sets) {
          for (float temperature : {1.0f, 2.5f}) {
            for (float smoothing : {0.0f, 0.1f}) {
              LossOptions options;
              options.teacher_loss = teacher_loss;
              options.temperature = temperature;
              options.label_smoothing = smoothing;
              SCOPED_TRACE(::testing::Message()
                           << "teacher loss " << teacher_loss << " dense " << dense << " classes "
                           << classes << " top-k " << ks.size() << " of " << ks[0] << " T "
                           << temperature << " smoothing " << smoothing);
              Batch batch(5, classes, dense, ks, temperature, 2.0, 31 * classes + dense);
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

TEST_P(TopKLossTest, GradientIsTheDerivativeOfTheLoss) {
  // Of the reference in double precision, so that the step can be small: what the reference and the
  // kernel agree on elsewhere is then right.
  for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
    for (int dense : {0, 1}) {
      for (const auto& ks : std::vector<std::vector<int64_t>>{{2}, {1, 3}}) {
        LossOptions options;
        options.teacher_loss = teacher_loss;
        options.temperature = 1.5;
        options.label_smoothing = 0.2f;
        Batch batch(3, 6, dense, ks, options.temperature, 1.5, 99);
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
          ASSERT_NEAR(actual.gradient[i], slope, 1e-6 + 1e-5 * std::abs(slope)) << "element " << i;
        }
      }
    }
  }
}

TEST_P(TopKLossTest, AllClassesAreADenseTeacher) {
  for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
    for (float temperature : {1.0f, 2.0f}) {
      for (const int64_t classes : {1, 3, 1000}) {
        LossOptions options;
        options.teacher_loss = teacher_loss;
        options.temperature = temperature;
        Batch batch(4, classes, 1, {}, temperature, 2.0, 7);
        const Result dense = Compute(options, batch.inputs);
        batch.top_k.emplace_back(batch.dense[0], 4, classes, classes, temperature);
        batch.dense.clear();
        batch.Connect(4, classes);
        const Result all = Compute(options, batch.inputs);
        ASSERT_TRUE(all.status.ok()) << all.status;
        const double loss = dense.outputs.sums.teacher_loss_sum;
        EXPECT_NEAR(all.outputs.sums.teacher_loss_sum, loss, 2e-5 * (1 + std::abs(loss)));
        for (size_t i = 0; i < dense.gradient.size(); ++i) {
          ASSERT_NEAR(all.gradient[i], dense.gradient[i],
                      1e-6 + 1e-5 * std::abs(dense.gradient[i]));
        }
      }
    }
  }
}

TEST_P(TopKLossTest, ATeacherThatIsTheStudentTeachesNothing) {
  LossOptions options;
  options.teacher_loss = LossOptions::kKlTeacherStudent;
  Batch batch(4, 3000, 0, {}, 1, 3.0, 5);
  batch.top_k.emplace_back(batch.logits, 4, 3000, 20, 1.0);
  batch.Connect(4, 3000);
  const Result with = Compute(options, batch.inputs);
  batch.inputs.teacher_weight = 0;
  const Result without = Compute(options, batch.inputs);
  EXPECT_NEAR(with.outputs.sums.teacher_loss_sum, 0, HasVectors() ? 1e-6 : 1e-5);
  for (size_t i = 0; i < with.gradient.size(); ++i) {
    ASSERT_NEAR(with.gradient[i], without.gradient[i], 2e-7);
  }
}

TEST_P(TopKLossTest, SurvivesTailsOfAnySize) {
  for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
    for (float temperature : {1.0f, 2.0f}) {
      for (int dense : {0, 1}) {
        for (int teachers : {1, 2}) {
          // How far above all others the student has the classes that the teacher names.
          for (const float lead :
               {0.0f, 5.0f, 15.0f, 30.0f, 60.0f, 80.0f, 150.0f, 3000.0f, -60.0f}) {
            const int64_t classes = 700;
            LossOptions options;
            options.teacher_loss = teacher_loss;
            options.temperature = temperature;
            Batch batch(3, classes, dense, std::vector<int64_t>(teachers, 5), temperature, 1.0, 3);
            for (int64_t r = 0; r < 3; ++r) {
              for (int t = 0; t < (r == 2 ? teachers : 1); ++t) {
                for (int i = 0; i < 5; ++i) {
                  batch.logits[r * classes + batch.top_k[t].index[r * 5 + i]] += lead;
                }
              }
            }
            SCOPED_TRACE(::testing::Message()
                         << "loss " << teacher_loss << " T " << temperature << " dense " << dense
                         << " teachers " << teachers << " lead " << lead);
            // Logits of thousands are 1e-4 apart; their exponentials as far as that.
            ExpectMatchesReference(options, batch.inputs, std::abs(lead) > 100 ? 100 : 5);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(TopKLossTest, ClassesThatNobodyNamesMayHaveNoGradient) {
  // P = 1/2 and t = 1: 1 + weight (1 - t / P) is 0.
  const std::vector<float> logits = {0, 0, 0, 0};
  const std::vector<int64_t> labels = {3};
  const std::vector<int32_t> index = {1, 2};
  const std::vector<float> value = {0, 0}, tail = {1};
  const TopKTeacher teacher = {index.data(), value.data(), tail.data(), 2};
  LossInputs inputs;
  inputs.rows = 1;
  inputs.classes = 4;
  inputs.logits = logits.data();
  inputs.labels = labels.data();
  inputs.topk_teachers = absl::MakeConstSpan(&teacher, 1);
  inputs.teacher_weight = 1;
  for (float temperature : {1.0f, 2.0f}) {
    LossOptions options;
    options.temperature = temperature;
    const Result result = Compute(options, inputs);
    ASSERT_TRUE(result.status.ok());
    EXPECT_NEAR(result.outputs.sums.teacher_loss_sum, temperature * temperature * std::log(2.0),
                1e-6);
    const float t = temperature / 4;
    const float expected[] = {0.25f - t, 0.25f + t, 0.25f + t, -0.75f - t};
    for (int i = 0; i < 4; ++i) EXPECT_NEAR(result.gradient[i], expected[i], 1e-7) << i;
  }
}

TEST_P(TopKLossTest, MassIsDividedByItsSum) {
  LossOptions options;
  Batch batch(3, 50, 0, {4}, 1, 1.0, 1);
  const Result exact = Compute(options, batch.inputs);
  for (float& value : batch.top_k[0].value) value *= 1.008f;
  for (float& value : batch.top_k[0].tail) value *= 1.008f;
  const Result off = Compute(options, batch.inputs);
  ASSERT_TRUE(off.status.ok());
  EXPECT_NEAR(off.outputs.sums.teacher_loss_sum, exact.outputs.sums.teacher_loss_sum, 1e-5);
  for (size_t i = 0; i < off.gradient.size(); ++i) {
    ASSERT_NEAR(off.gradient[i], exact.gradient[i], 1e-7);
  }
}

TEST_P(TopKLossTest, ResultsDoNotDependOnThreadsOrOnTheBatchAround) {
  Batch batch(90, 9001, 1, {64, 10}, 1, 3.0, 4);
  for (float temperature : {1.0f, 2.0f}) {
    LossOptions options;
    options.temperature = temperature;
    const Result one = Compute(options, batch.inputs, 1);
    ASSERT_TRUE(one.status.ok());
    for (int threads : {2, 3, 5}) {
      const Result more = Compute(options, batch.inputs, threads);
      EXPECT_EQ(one.gradient, more.gradient);
      EXPECT_EQ(one.outputs.sums.teacher_loss_sum, more.outputs.sums.teacher_loss_sum);
    }
    for (int64_t row : {0, 1, 50, 89}) {
      LossInputs alone = batch.inputs;
      alone.rows = 1;
      alone.gradient_scale = 1.0 / 90;
      alone.logits = batch.logits.data() + row * 9001;
      alone.labels += row;
      const DenseTeacher dense = LogitsTeacher(batch.dense[0].data() + row * 9001);
      alone.teachers = absl::MakeConstSpan(&dense, 1);
      std::vector<TopKTeacher> views = batch.views;
      for (TopKTeacher& view : views) {
        view.index += row * view.k;
        view.value += row * view.k;
        view.tail += row;
      }
      alone.topk_teachers = views;
      EXPECT_EQ(Compute(options, alone).gradient,
                std::vector<float>(one.gradient.begin() + row * 9001,
                                   one.gradient.begin() + (row + 1) * 9001));
    }
  }
}

TEST_P(TopKLossTest, GradientMayReplaceTheLogitsOrBeLeftOut) {
  for (float temperature : {1.0f, 2.0f}) {
    LossOptions options;
    options.temperature = temperature;
    Batch batch(10, 4500, 0, {5}, temperature, 2.0, 2);
    for (float& z : batch.logits) z = z < 3 ? z : 200;  // some rows take the exact way
    const Result apart = Compute(options, batch.inputs);
    LossOutputs sums_only, in_place;
    ASSERT_TRUE(ComputeLossCpu(options, batch.inputs, &sums_only, 1).ok());
    in_place.gradient = batch.logits.data();
    ASSERT_TRUE(ComputeLossCpu(options, batch.inputs, &in_place, 1).ok());
    EXPECT_EQ(batch.logits, apart.gradient);
    EXPECT_EQ(sums_only.sums.teacher_loss_sum, apart.outputs.sums.teacher_loss_sum);
    EXPECT_EQ(in_place.sums.teacher_loss_sum, apart.outputs.sums.teacher_loss_sum);
  }
}

TEST_P(TopKLossTest, SaysWhenTheStudentIsNotFinite) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (int64_t place : {0, 30, 149}) {
      Batch batch(3, 50, 0, {4}, 1, 1.0, 1);
      batch.logits[place] = bad;
      const Result result = Compute(LossOptions(), batch.inputs);
      EXPECT_EQ(result.status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_FALSE(result.outputs.finite);
    }
  }
}

TEST(TopKLossValidationTest, NamesTeacherAndRow) {
  const auto message = [](const LossOptions& options, const LossInputs& inputs) {
    std::vector<float> gradient(inputs.rows * inputs.classes, 7);
    LossOutputs outputs;
    outputs.gradient = gradient.data();
    const absl::Status status = ComputeLossCpu(options, inputs, &outputs, 2);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(gradient, std::vector<float>(gradient.size(), 7));  // untouched
    return std::string(status.message());
  };
  Batch batch(4, 50, 0, {3, 5}, 1, 1.0, 1);
  const LossOptions options;
  TopK& second = batch.top_k[1];
  ASSERT_TRUE(Compute(options, batch.inputs).status.ok());

  const std::vector<int32_t> index = second.index;
  second.index[2 * 5 + 1] = 50;
  EXPECT_THAT(message(options, batch.inputs),
              HasSubstr("topk_teachers 1: row 2 has the index 50; want 0 to 49"));
  second.index[2 * 5 + 1] = -1;
  EXPECT_THAT(message(options, batch.inputs), HasSubstr("1: row 2 has the index -1"));
  second.index[2 * 5 + 1] = second.index[2 * 5 + 4];
  EXPECT_THAT(message(options, batch.inputs),
              HasSubstr(absl::StrCat("1: row 2 names class ", second.index[2 * 5 + 4], " twice")));
  second.index = index;
  batch.Connect(4, 50);
  for (const float bad : {-0.1f, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    const float value = second.value[3 * 5], tail = second.tail[3];
    second.value[3 * 5] = bad;
    EXPECT_THAT(message(options, batch.inputs), HasSubstr("1: row 3 has the value "));
    second.value[3 * 5] = value;
    second.tail[3] = bad;
    EXPECT_THAT(message(options, batch.inputs), HasSubstr("1: row 3 has the tail mass "));
    second.tail[3] = tail;
  }
  second.tail[0] += 0.02f;
  EXPECT_THAT(message(options, batch.inputs),
              HasSubstr("1: row 0 has values and tail that add up to 1.02; want 1"));

  // None of it matters where the teachers are switched off.
  batch.inputs.teacher_weight = 0;
  const Result off = Compute(options, batch.inputs);
  EXPECT_TRUE(off.status.ok());
  batch.inputs.topk_teachers = {};
  EXPECT_EQ(Compute(options, batch.inputs).gradient, off.gradient);
}

TEST(TopKLossValidationTest, NamesOptionsThatNeedEveryClass) {
  Batch batch(4, 50, 0, {3}, 1, 1.0, 1);
  std::vector<float> targets(200);
  batch.inputs.targets = targets.data();
  const auto message = [&](const LossOptions& options) {
    const absl::Status status = ValidateLoss(options, batch.inputs);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  LossOptions options;
  for (auto teacher_loss : {LossOptions::kKlStudentTeacher, LossOptions::kSquaredErrorLogits}) {
    options.teacher_loss = teacher_loss;
    EXPECT_THAT(message(options), HasSubstr("teacher_loss"));
  }
  options = LossOptions();
  options.teacher_average = LossOptions::kLogits;
  EXPECT_THAT(message(options), HasSubstr("teacher_average"));
  options = LossOptions();
  options.label_loss = LossOptions::kSigmoidCrossEntropy;
  EXPECT_THAT(message(options), HasSubstr("topk_teachers"));
  options = LossOptions();
  for (int64_t k : {0, 51}) {
    batch.views[0].k = k;
    EXPECT_THAT(message(options), HasSubstr(absl::StrCat("topk_teachers 0: k is ", k)));
  }
  batch.views[0].k = 3;
  batch.views[0].tail = nullptr;
  EXPECT_THAT(message(options), HasSubstr("topk_teachers 0: index, value or tail is null"));
}

}  // namespace
}  // namespace codistill
