#include "worker/evaluate_models.h"

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/testing/linear_model.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kInputs = 3;

// Examples by formula; text-like (lanes and one label an example) if asked.
class FormulaDataset : public Dataset {
 public:
  FormulaDataset(const DatasetConfig& config, LabelLoss loss, int64_t size, int64_t classes,
                 int64_t lanes = 0)
      : Dataset(config, loss, MakeShape(size, classes, lanes)), classes_(classes) {}

  static float Input(int64_t example, int64_t i) {
    return std::cos(static_cast<float>(example * 5 + i * 2));
  }
  int64_t Label(int64_t example) const { return example * 3 % 7 % classes_; }

  absl::Status Fill(absl::Span<const ExampleRef> refs, Batch* batch) const override {
    if (fails_at >= 0 && refs.front().index >= fails_at) {
      return absl::DataLossError("images.tar: damaged");
    }
    Allocate(static_cast<int64_t>(refs.size()), batch);
    batch->labels = Tensor::Allocate(batch->labels.dtype(), {static_cast<int64_t>(refs.size())});
    for (size_t r = 0; r < refs.size(); ++r) {
      for (int64_t i = 0; i < kInputs; ++i) {
        batch->fields[0].tensor.As<float>()[r * kInputs + i] = Input(refs[r].index, i);
      }
      SetClass(static_cast<int64_t>(r), Label(refs[r].index), batch);
      batch->example_ids.As<int64_t>()[r] = refs[r].index;
    }
    batch->reset_state = sequential() && refs[0].index == 0;
    return absl::OkStatus();
  }

  void CountLabels(absl::Span<const ExampleRef> refs, absl::Span<int64_t> counts) const override {
    for (const ExampleRef& ref : refs) ++counts[Label(ref.index)];
  }

  int64_t fails_at = -1;

 private:
  static Shape MakeShape(int64_t size, int64_t classes, int64_t lanes) {
    Shape shape;
    shape.size = size;
    shape.num_classes = classes;
    shape.lanes = lanes;
    return shape;
  }
  const int64_t classes_;
};

JobConfig Job(LabelLoss loss, int64_t outputs) {
  JobConfig job;
  job.mutable_model()->set_label_loss(loss);
  job.mutable_model()->set_num_outputs(outputs);
  auto* input = job.mutable_model()->add_inputs();
  input->set_name("x");
  input->add_shape(kInputs);
  job.mutable_data()->mutable_validation()->mutable_synthetic()->set_inputs(kInputs);
  job.mutable_evaluation()->set_batch_size(8);
  return job;
}

void SetWeights(int salt, LinearModel* model) {
  for (int t = 0; t < 2; ++t) {
    const TensorView& view = model->storage()[t];
    for (int64_t i = 0; i < view.elements(); ++i) {
      static_cast<float*>(view.data)[i] = std::sin(static_cast<float>(i * 3 + t + salt * 11));
    }
  }
}

std::vector<double> LogitsOf(const LinearModel& model, int64_t example, int64_t outputs) {
  const float* w = static_cast<const float*>(model.storage()[0].data);
  const float* b = static_cast<const float*>(model.storage()[1].data);
  std::vector<double> z(outputs);
  for (int64_t o = 0; o < outputs; ++o) {
    z[o] = b[o];
    for (int64_t i = 0; i < kInputs; ++i) {
      z[o] += static_cast<double>(FormulaDataset::Input(example, i)) * w[i * outputs + o];
    }
  }
  return z;
}

std::vector<double> Softmax(std::vector<double> z) {
  double sum = 0;
  for (double& value : z) sum += value = std::exp(value);
  for (double& value : z) value /= sum;
  return z;
}

TEST(EvaluateModelsTest, LossAccuracyAndDisagreementByTheBook) {
  constexpr int64_t kClasses = 4, kSize = 37;  // the last batch is short
  const JobConfig job = Job(SOFTMAX_CROSS_ENTROPY, kClasses);
  FormulaDataset data(job.data().validation(), SOFTMAX_CROSS_ENTROPY, kSize, kClasses);
  LinearModel models[3] = {
      {kInputs, kClasses, false}, {kInputs, kClasses, false}, {kInputs, kClasses, false}};
  for (int m = 0; m < 3; ++m) SetWeights(m, &models[m]);

  double loss[3] = {}, correct[3] = {}, difference = 0;
  for (int64_t example = 0; example < kSize; ++example) {
    std::vector<std::vector<double>> p;
    for (int m = 0; m < 3; ++m) {
      p.push_back(Softmax(LogitsOf(models[m], example, kClasses)));
      loss[m] -= std::log(p[m][data.Label(example)]);
      const auto best = std::max_element(p[m].begin(), p[m].end()) - p[m].begin();
      correct[m] += best == data.Label(example) ? 1 : 0;
    }
    for (int c = 0; c < kClasses; ++c) {
      difference +=
          std::abs(p[0][c] - p[1][c]) + std::abs(p[0][c] - p[2][c]) + std::abs(p[1][c] - p[2][c]);
    }
  }

  EvaluateOptions options;
  options.job = &job;
  options.validation = &data;
  std::vector<int64_t> progress;
  options.on_progress = [&](int64_t done, int64_t total) {
    EXPECT_EQ(total, kSize);
    progress.push_back(done);
  };
  auto evaluation = EvaluateModels(options, {&models[0], &models[1], &models[2]});
  ASSERT_TRUE(evaluation.ok()) << evaluation.status();
  ASSERT_EQ(evaluation->results.size(), 3u);
  for (int m = 0; m < 3; ++m) {
    const EvaluationResult& result = evaluation->results[m];
    EXPECT_EQ(result.examples(), kSize);
    EXPECT_NEAR(result.loss(), loss[m] / kSize, 1e-6);
    EXPECT_DOUBLE_EQ(result.accuracy(), correct[m] / kSize);
    EXPECT_FALSE(result.has_auc()) << "more than two classes";
  }
  EXPECT_NEAR(evaluation->disagreement, difference / (kSize * kClasses * 3), 1e-7);
  EXPECT_THAT(progress, ElementsAre(8, 16, 24, 32, 37));

  options.parallel_models = 3;
  auto parallel = EvaluateModels(options, {&models[0], &models[1], &models[2]});
  ASSERT_TRUE(parallel.ok()) << parallel.status();
  EXPECT_EQ(parallel->disagreement, evaluation->disagreement);
  for (int m = 0; m < 3; ++m) {
    EXPECT_EQ(parallel->results[m].loss(), evaluation->results[m].loss());
  }
}

TEST(EvaluateModelsTest, IgnoredLabelsDoNotCount) {
  for (const int64_t classes : {2, 4}) {
    constexpr int64_t kSize = 37, kIgnored = 1;
    JobConfig job = Job(SOFTMAX_CROSS_ENTROPY, classes);
    job.mutable_model()->set_ignored_label(kIgnored);
    FormulaDataset data(job.data().validation(), SOFTMAX_CROSS_ENTROPY, kSize, classes);
    LinearModel models[2] = {{kInputs, classes, false}, {kInputs, classes, false}};
    for (int m = 0; m < 2; ++m) SetWeights(m, &models[m]);
    double loss = 0, correct = 0, difference = 0, counted = 0;
    for (int64_t example = 0; example < kSize; ++example) {
      const int64_t label = data.Label(example);
      if (label == kIgnored) continue;
      ++counted;
      const std::vector<double> p = Softmax(LogitsOf(models[0], example, classes));
      const std::vector<double> q = Softmax(LogitsOf(models[1], example, classes));
      loss -= std::log(p[label]);
      correct += std::max_element(p.begin(), p.end()) - p.begin() == label ? 1 : 0;
      for (int c = 0; c < classes; ++c) difference += std::abs(p[c] - q[c]);
    }
    ASSERT_LT(counted, kSize);
    EvaluateOptions options;
    options.job = &job;
    options.validation = &data;
    const auto evaluation = EvaluateModels(options, {&models[0], &models[1]});
    ASSERT_TRUE(evaluation.ok()) << evaluation.status();
    const EvaluationResult& result = evaluation->results[0];
    EXPECT_EQ(result.examples(), kSize);
    EXPECT_NEAR(result.loss(), loss / counted, 1e-6);
    EXPECT_DOUBLE_EQ(result.accuracy(), correct / counted);
    EXPECT_NEAR(evaluation->disagreement, difference / (counted * classes), 1e-7);
    // Of two classes one is left: nothing to tell apart.
    EXPECT_FALSE(result.has_auc());
  }
}

TEST(EvaluateModelsTest, LabelSmoothingIsForTrainingOnly) {
  JobConfig job = Job(SOFTMAX_CROSS_ENTROPY, 4);
  FormulaDataset data(job.data().validation(), SOFTMAX_CROSS_ENTROPY, 20, 4);
  LinearModel model(kInputs, 4, false);
  SetWeights(1, &model);
  EvaluateOptions options;
  options.job = &job;
  options.validation = &data;
  const double plain = EvaluateModels(options, {&model})->results[0].loss();
  job.mutable_model()->set_label_smoothing(0.3f);
  EXPECT_EQ(EvaluateModels(options, {&model})->results[0].loss(), plain);
}

TEST(EvaluateModelsTest, TwoClassesAndOneLogitAgree) {
  constexpr int64_t kSize = 50;
  const JobConfig two = Job(SOFTMAX_CROSS_ENTROPY, 2), one = Job(SIGMOID_CROSS_ENTROPY, 1);
  FormulaDataset two_data(two.data().validation(), SOFTMAX_CROSS_ENTROPY, kSize, 2);
  FormulaDataset one_data(one.data().validation(), SIGMOID_CROSS_ENTROPY, kSize, 2);
  LinearModel two_a(kInputs, 2, false), two_b(kInputs, 2, false);
  LinearModel one_a(kInputs, 1, false), one_b(kInputs, 1, false);
  int salt = 0;
  for (auto [wide, narrow] : {std::pair(&two_a, &one_a), std::pair(&two_b, &one_b)}) {
    SetWeights(++salt, wide);
    // The logit of one output is the difference of two.
    for (int t = 0; t < 2; ++t) {
      const float* from = static_cast<const float*>(wide->storage()[t].data);
      float* to = static_cast<float*>(narrow->storage()[t].data);
      for (int64_t i = 0; i < narrow->storage()[t].elements(); ++i) {
        to[i] = from[2 * i + 1] - from[2 * i];
      }
    }
  }
  EvaluateOptions options;
  options.job = &two;
  options.validation = &two_data;
  auto wide = EvaluateModels(options, {&two_a, &two_b});
  options.job = &one;
  options.validation = &one_data;
  auto narrow = EvaluateModels(options, {&one_a, &one_b});
  ASSERT_TRUE(wide.ok() && narrow.ok()) << wide.status() << narrow.status();
  for (int m = 0; m < 2; ++m) {
    EXPECT_NEAR(wide->results[m].loss(), narrow->results[m].loss(), 1e-6);
    EXPECT_DOUBLE_EQ(wide->results[m].accuracy(), narrow->results[m].accuracy());
    ASSERT_TRUE(wide->results[m].has_auc() && narrow->results[m].has_auc());
    EXPECT_NEAR(wide->results[m].auc(), narrow->results[m].auc(), 1e-9);
  }
  EXPECT_GT(wide->disagreement, 0);
  EXPECT_NEAR(wide->disagreement, narrow->disagreement, 1e-6);
}

TEST(EvaluateModelsTest, NumbersHaveNeitherAccuracyNorAuc) {
  const JobConfig job = Job(SQUARED_ERROR, 1);
  FormulaDataset data(job.data().validation(), SQUARED_ERROR, 20, 5);
  LinearModel a(kInputs, 1, false), b(kInputs, 1, false);
  SetWeights(1, &a);
  SetWeights(2, &b);
  double loss = 0, difference = 0;
  for (int64_t example = 0; example < 20; ++example) {
    const double za = LogitsOf(a, example, 1)[0], zb = LogitsOf(b, example, 1)[0];
    loss += (za - data.Label(example)) * (za - data.Label(example)) / 2;
    difference += std::abs(za - zb);
  }
  EvaluateOptions options;
  options.job = &job;
  options.validation = &data;
  auto evaluation = EvaluateModels(options, {&a, &b});
  ASSERT_TRUE(evaluation.ok()) << evaluation.status();
  EXPECT_NEAR(evaluation->results[0].loss(), loss / 20, 1e-5);
  EXPECT_NEAR(evaluation->disagreement, difference / 20, 1e-5);
  EXPECT_FALSE(evaluation->results[0].has_accuracy());
  EXPECT_FALSE(evaluation->results[0].has_auc());
}

TEST(EvaluateModelsTest, StateIsCarriedAlongTheLanesOfEachModel) {
  constexpr int64_t kClasses = 3, kLanes = 4, kSegments = 5;
  JobConfig job = Job(SOFTMAX_CROSS_ENTROPY, kClasses);
  auto* state = job.mutable_model()->add_states();
  state->set_name("h");
  for (int64_t dimension : {1, -1, 1}) state->add_shape(dimension);
  job.mutable_evaluation()->set_batch_size(kLanes);
  FormulaDataset data(job.data().validation(), SOFTMAX_CROSS_ENTROPY, kLanes * kSegments, kClasses,
                      kLanes);
  LinearModel a(kInputs, kClasses, true), b(kInputs, kClasses, true);
  SetWeights(1, &a);
  SetWeights(2, &b);
  double loss = 0;
  for (int64_t example = 0; example < kLanes * kSegments; ++example) {
    std::vector<double> z = LogitsOf(a, example, kClasses);
    // LinearModel: the state, here the number of the segment, adds 0.01 an output.
    for (int64_t o = 0; o < kClasses; ++o) z[o] += (example / kLanes) * o * 0.01;
    loss -= std::log(Softmax(z)[data.Label(example)]);
  }
  EvaluateOptions options;
  options.job = &job;
  options.validation = &data;
  auto evaluation = EvaluateModels(options, {&a, &b});
  ASSERT_TRUE(evaluation.ok()) << evaluation.status();
  EXPECT_NEAR(evaluation->results[0].loss(), loss / (kLanes * kSegments), 1e-6);
  options.max_examples = kLanes + 1;
  EXPECT_EQ(EvaluateModels(options, {&a})->results[0].examples(), 2 * kLanes) << "whole segments";
}

TEST(EvaluateModelsTest, MaxExamplesStopAndErrors) {
  const JobConfig job = Job(SOFTMAX_CROSS_ENTROPY, 4);
  FormulaDataset data(job.data().validation(), SOFTMAX_CROSS_ENTROPY, 40, 4);
  LinearModel model(kInputs, 4, false);
  EvaluateOptions options;
  options.job = &job;
  options.validation = &data;
  options.max_examples = 11;
  EXPECT_EQ(EvaluateModels(options, {&model})->results[0].examples(), 11);
  options.max_examples = 100;
  EXPECT_EQ(EvaluateModels(options, {&model})->results[0].examples(), 40);
  data.fails_at = 16;
  EXPECT_THAT(EvaluateModels(options, {&model}).status().ToString(), HasSubstr("images.tar"));
  int batches = 0;
  options.stop = [&] { return ++batches > 2; };
  EXPECT_TRUE(absl::IsCancelled(EvaluateModels(options, {&model}).status()));
}

}  // namespace
}  // namespace codistill
