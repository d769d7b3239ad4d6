#include "worker/training_pass.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/model/test_archive.h"
#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "worker/testing/linear_model.h"

namespace codistill {
namespace {

using testing::Each;
using testing::HasSubstr;

std::vector<float> ToVector(const Tensor& tensor) {
  const auto span = tensor.As<float>();
  return std::vector<float>(span.begin(), span.end());
}

// One batch and what belongs to it.
struct Problem {
  std::string archive;
  std::string job;  // model and codistillation
  StudentBatch batch;
  std::vector<Tensor> inputs;  // as forward() takes them
  Model::States states;
  TeacherPredictions predictions;
};

// What became of it.
struct Outcome {
  absl::Status status;
  TrainingPass::Result result;
  std::map<std::string, std::vector<float>> gradients, buffers;
  std::vector<std::string> order;
  Model::States states;
  std::vector<Tensor> input_gradients;
  int takes = 0;
};

// A worker of its own.
class Worker {
 public:
  Worker(const Problem& problem, int micro_batches, int rank = 0, Precision precision = FP32,
         std::vector<float> label_prior = {}) {
    JobConfig job;
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(problem.job, &job)) << problem.job;
    job.add_groups()->set_name("alpha");
    job.mutable_training()->set_micro_batches(micro_batches);
    Model::Options options;
    options.archive = problem.archive + "/m.pt";
    options.config = job.model();
    options.precision = precision;
    auto model = Model::Load(options);
    EXPECT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    TrainingPass::Options pass;
    pass.job = job;
    pass.rank = rank;
    pass.model = model_.get();
    pass.label_prior = std::move(label_prior);
    auto created = TrainingPass::Create(pass);
    EXPECT_TRUE(created.ok()) << created.status();
    pass_ = *std::move(created);
  }

  Outcome Run(const Problem& problem, int64_t step_number = 1) {
    Outcome out;
    BatchPipeline::Step step;
    step.assignment.set_step(step_number);
    step.assignment.set_teacher_weight(problem.predictions.teachers() > 0 ? 0.7f : 0);
    step.batch = problem.batch;
    out.states = problem.states;
    const auto result = pass_->Run(
        step, problem.inputs, &out.states,
        [&]() -> absl::StatusOr<const TeacherPredictions*> {
          ++out.takes;
          return &problem.predictions;
        },
        [&]() -> Model::OnGradient {
          return [&](int index, const float* data, std::shared_ptr<const void>) {
            const TensorSpec& spec = model_->tensors().tensors(index);
            const std::vector<int64_t> shape(spec.shape().begin(), spec.shape().end());
            out.gradients[spec.name()] = std::vector<float>(data, data + ElementCount(shape));
            out.order.push_back(spec.name());
          };
        });
    out.status = result.status();
    if (result.ok()) out.result = *result;
    out.input_gradients = pass_->InputGradients();
    for (int i = 0; i < model_->tensors().tensors_size(); ++i) {
      const TensorView& view = model_->storage()[i];
      if (model_->tensors().tensors(i).role() != TensorSpec::BUFFER) continue;
      if (view.dtype != DT_FLOAT) continue;
      const auto* data = static_cast<const float*>(view.data);
      out.buffers[view.name] = std::vector<float>(data, data + view.elements());
    }
    return out;
  }

 private:
  std::unique_ptr<Model> model_;
  std::unique_ptr<TrainingPass> pass_;
};

void ExpectNear(const std::vector<float>& got, const std::vector<float>& want,
                const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double size = 0;
  for (const float value : want) size = std::max<double>(size, std::abs(value));
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_NEAR(got[i], want[i], 2e-6 * (size + 1e-3)) << what << "[" << i << "]";
  }
}

// Exported once for all tests.
std::string Archive(const std::string& module, const std::vector<std::string>& options) {
  static auto* folders = new std::map<std::vector<std::string>, std::string>;
  std::vector<std::string> key = options;
  key.push_back(module);
  std::string& folder = (*folders)[key];
  if (folder.empty()) folder = ExportForTest("m", module, options);
  return folder;
}

StudentBatch Batch(int64_t examples, std::vector<int64_t> labels, std::vector<float> targets = {}) {
  StudentBatch batch;
  batch.examples = examples;
  batch.rows = static_cast<int64_t>(std::max(labels.size(), targets.size()));
  if (!labels.empty()) batch.labels = Int64Tensor({batch.rows}, labels);
  if (!targets.empty()) batch.targets = FloatTensor({batch.rows, 1}, targets);
  return batch;
}

Tensor Int32Tensor(std::vector<int64_t> shape, const std::vector<int32_t>& values) {
  Tensor tensor = Tensor::Allocate(DT_INT32, std::move(shape));
  std::copy(values.begin(), values.end(), tensor.As<int32_t>().begin());
  return tensor;
}

// A classifier, label smoothing, two teachers.
Problem Classifier() {
  Problem problem;
  problem.archive = Archive("mlp", {"in_features=6", "hidden=16,8", "num_classes=5"});
  problem.job = R"pb(model {
                       inputs { name: "x" shape: 6 }
                       num_outputs: 5
                       label_smoothing: 0.1
                     }
                     codistillation { temperature: 2 })pb";
  problem.batch = Batch(8, {0, 1, 2, 3, 4, 0, 1, 2});
  problem.inputs = {RandomFloats({8, 6}, 1)};
  problem.predictions.logits = {RandomFloats({8, 5}, 2), RandomFloats({8, 5}, 3)};
  return problem;
}

// A classifier whose teacher names two classes a row.
Problem TopK() {
  Problem problem = Classifier();
  problem.predictions.logits.clear();
  std::vector<int32_t> index;
  std::vector<float> value, tail;
  for (int r = 0; r < 8; ++r) {
    index.insert(index.end(), {r % 5, (r + 2) % 5});
    value.insert(value.end(), {0.5f, 0.02f * static_cast<float>(r)});
    tail.push_back(0.5f - 0.02f * static_cast<float>(r));
  }
  problem.predictions.top_k = {
      {Int32Tensor({8, 2}, index), FloatTensor({8, 2}, value), FloatTensor({8}, tail)}};
  return problem;
}

// Two inputs of different types, one sigmoid logit.
Problem Columns() {
  Problem problem;
  problem.archive = Archive("ctr", {"numeric=2", "cardinalities=4,6", "cross=1"});
  problem.job = R"pb(model {
                       inputs { name: "numeric" shape: 2 }
                       inputs { name: "categorical" dtype: DT_INT64 shape: 2 }
                       num_outputs: 1
                       label_loss: SIGMOID_CROSS_ENTROPY
                     })pb";
  problem.batch = Batch(8, {}, {0, 1, 1, 0, 1, 0, 0, 1});
  problem.inputs = {RandomFloats({8, 2}, 1),
                    Int64Tensor({8, 2}, {0, 1, 1, 2, 2, 5, 3, 0, 3, 3, 0, 0, 2, 2, 1, 4})};
  problem.predictions.logits = {RandomFloats({8, 1}, 2)};
  return problem;
}

// Lanes of a text, with state from the batch before.
Problem Lanes() {
  Problem problem;
  problem.archive = Archive("lstm_lm", {"vocabulary=7", "embedding=4", "hidden=5", "layers=2"});
  problem.job = R"pb(model {
                       inputs { name: "tokens" dtype: DT_INT64 shape: 3 }
                       states { name: "h" shape: 2 shape: -1 shape: 5 }
                       states { name: "c" shape: 2 shape: -1 shape: 5 }
                       num_outputs: 7
                     })pb";
  std::vector<int64_t> tokens, labels;
  for (int i = 0; i < 24; ++i) {
    tokens.push_back(i * 5 % 7);
    labels.push_back(i * 3 % 7);
  }
  problem.batch = Batch(8, labels);
  problem.batch.labels = Int64Tensor({8, 3}, labels);  // as readers of text have them
  problem.inputs = {Int64Tensor({8, 3}, tokens)};
  problem.states = {RandomFloats({2, 8, 5}, 5), RandomFloats({2, 8, 5}, 6)};
  problem.predictions.logits = {RandomFloats({24, 7}, 2)};
  return problem;
}

// Rows of an embedding table, and a frozen part.
Problem Rows() {
  Problem problem;
  problem.archive = Archive("ctr", {"numeric=2", "rows=3", "embedding=4"});
  problem.job = R"pb(model {
                       inputs { name: "numeric" shape: 2 }
                       inputs { name: "rows" shape: 3 shape: 4 embedding_table: "t" }
                       num_outputs: 1
                       label_loss: SIGMOID_CROSS_ENTROPY
                     })pb";
  problem.batch = Batch(8, {}, {0, 1, 1, 0, 1, 0, 0, 1});
  problem.inputs = {RandomFloats({8, 2}, 1), RandomFloats({8, 3, 4}, 2)};
  return problem;
}

void ExpectSame(const Outcome& got, const Outcome& want, const std::string& what) {
  ASSERT_TRUE(got.status.ok()) << what << ": " << got.status;
  EXPECT_EQ(got.takes, 1) << what;
  EXPECT_EQ(got.result.used_teacher, want.result.used_teacher) << what;
  EXPECT_EQ(got.result.sums.correct, want.result.sums.correct) << what;
  EXPECT_NEAR(got.result.sums.label_loss_sum, want.result.sums.label_loss_sum, 1e-4) << what;
  EXPECT_NEAR(got.result.sums.teacher_loss_sum, want.result.sums.teacher_loss_sum, 1e-4) << what;
  ASSERT_EQ(got.gradients.size(), want.gradients.size()) << what;
  // One that came twice would be seen here too.
  EXPECT_EQ(got.order, want.order) << what;
  for (const auto& [name, gradient] : want.gradients) {
    ExpectNear(got.gradients.at(name), gradient, what + ", " + name);
  }
  ASSERT_EQ(got.states.size(), want.states.size()) << what;
  for (size_t i = 0; i < want.states.size(); ++i) {
    EXPECT_EQ(got.states[i].shape(), want.states[i].shape()) << what;
    ExpectNear(ToVector(got.states[i]), ToVector(want.states[i]), what + ", a state");
  }
  ASSERT_EQ(got.input_gradients.size(), want.input_gradients.size()) << what;
  for (size_t i = 0; i < want.input_gradients.size(); ++i) {
    EXPECT_EQ(got.input_gradients[i].shape(), want.input_gradients[i].shape()) << what;
    if (want.input_gradients[i].empty()) continue;
    ExpectNear(ToVector(got.input_gradients[i]), ToVector(want.input_gradients[i]),
               what + ", gradient of an input");
  }
}

TEST(TrainingPassTest, ABatchInPartsLeadsToTheSameGradients) {
  const std::vector<std::pair<std::string, Problem>> problems = {{"classifier", Classifier()},
                                                                 {"top-k", TopK()},
                                                                 {"columns", Columns()},
                                                                 {"lanes", Lanes()},
                                                                 {"rows", Rows()}};
  for (const auto& [name, problem] : problems) {
    const Outcome whole = Worker(problem, 1).Run(problem);
    ASSERT_TRUE(whole.status.ok()) << name << ": " << whole.status;
    EXPECT_EQ(whole.result.used_teacher, problem.predictions.teachers() > 0);
    EXPECT_EQ(whole.states.size(), problem.states.size());
    bool any = false;
    for (const auto& [parameter, gradient] : whole.gradients) {
      any = any || std::any_of(gradient.begin(), gradient.end(), [](float g) { return g != 0; });
    }
    EXPECT_TRUE(any) << name;
    // 3: parts need not be equal. 100: no part is empty.
    for (const int parts : {2, 3, 4, 100}) {
      ExpectSame(Worker(problem, parts).Run(problem), whole, name + " in " + std::to_string(parts));
    }
  }
}

TEST(TrainingPassTest, RecurrentStateOfPartsIsThatOfTheirOwnLanes) {
  Problem problem = Lanes();
  Worker whole(problem, 1), parts(problem, 4);
  problem.states.clear();  // a text begins
  for (int64_t step = 1; step <= 3; ++step) {
    const Outcome want = whole.Run(problem, step), got = parts.Run(problem, step);
    ExpectSame(got, want, "step " + std::to_string(step));
    EXPECT_NE(ToVector(want.states[0]), std::vector<float>(80, 0.0f));
    problem.states = want.states;
  }
}

TEST(TrainingPassTest, PartsInBfloat16AddUpInFp32) {
  const Problem problem = Classifier();
  const Outcome want = Worker(problem, 1).Run(problem);
  const Outcome got = Worker(problem, 4, 0, BF16).Run(problem);
  ASSERT_TRUE(got.status.ok()) << got.status;
  for (const auto& [name, gradient] : want.gradients) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < gradient.size(); ++i) {
      difference += std::pow(got.gradients.at(name)[i] - gradient[i], 2);
      size += std::pow(gradient[i], 2);
    }
    EXPECT_LT(std::sqrt(difference / size), 0.1) << name;
    EXPECT_NE(got.gradients.at(name), gradient) << name;
  }
}

TEST(TrainingPassTest, BatchNormSeesThePartsOneAfterAnother) {
  Problem problem;
  problem.archive = ExportSourceForTest("m", R"(
import torch
from torch import nn

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.output = nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.norm(x))

def build(options):
    return Norm()
)");
  problem.job = R"pb(model {
                       inputs { name: "x" shape: 1 }
                       num_outputs: 2
                     })pb";
  problem.batch = Batch(4, {0, 1, 0, 1});
  problem.inputs = {FloatTensor({4, 1}, {1, 3, 10, 30})};
  const Outcome whole = Worker(problem, 1).Run(problem);
  EXPECT_FLOAT_EQ(whole.buffers.at("norm.running_mean")[0], 0.1f * 11);
  const Outcome parts = Worker(problem, 2).Run(problem);
  ASSERT_TRUE(parts.status.ok()) << parts.status;
  EXPECT_FLOAT_EQ(parts.buffers.at("norm.running_mean")[0], 0.9f * (0.1f * 2) + 0.1f * 20);
}

Problem WithDropout() {
  Problem problem = Classifier();
  problem.archive = Archive("mlp", {"in_features=6", "hidden=64", "num_classes=5", "dropout=0.5"});
  return problem;
}

TEST(TrainingPassTest, DropoutIsTheWorkersOwnAndRepeatsToTheBit) {
  const Problem problem = WithDropout();
  for (const int parts : {1, 2}) {
    const Outcome first = Worker(problem, parts, /*rank=*/0).Run(problem);
    EXPECT_EQ(Worker(problem, parts, /*rank=*/0).Run(problem).gradients, first.gradients);
    EXPECT_NE(Worker(problem, parts, /*rank=*/1).Run(problem).gradients, first.gradients);
    EXPECT_NE(Worker(problem, parts, /*rank=*/0).Run(problem, 2).gradients, first.gradients);
  }
}

// `rows` of a [8, n] tensor.
Tensor Rows(const Tensor& all, const std::vector<int64_t>& rows) {
  const int64_t n = all.elements() / 8;
  Tensor some = Tensor::Allocate(DT_FLOAT, {static_cast<int64_t>(rows.size()), n});
  float* to = some.As<float>().data();
  for (int64_t row : rows) to = std::copy_n(all.As<float>().data() + row * n, n, to);
  return some;
}

TEST(TrainingPassTest, IgnoredLabelsCountForNothing) {
  Problem problem = Classifier();
  Problem without = problem;
  problem.job = R"pb(model {
                       inputs { name: "x" shape: 6 }
                       num_outputs: 5
                       label_smoothing: 0.1
                       ignored_label: 0
                     }
                     codistillation { temperature: 2 })pb";
  const std::vector<int64_t> rows = {1, 2, 3, 4, 6, 7};
  without.batch = Batch(6, {1, 2, 3, 4, 1, 2});
  without.inputs[0] = Rows(problem.inputs[0], rows);
  for (Tensor& teacher : without.predictions.logits) teacher = Rows(teacher, rows);
  const Outcome want = Worker(without, 1).Run(without);
  ASSERT_TRUE(want.status.ok()) << want.status;
  // Of eight parts two have nothing but an ignored label.
  for (const int parts : {1, 2, 8}) {
    const Outcome got = Worker(problem, parts).Run(problem);
    ASSERT_TRUE(got.status.ok()) << got.status;
    EXPECT_EQ(got.result.sums.counted_rows, 6);
    EXPECT_NEAR(got.result.sums.label_loss_sum, want.result.sums.label_loss_sum, 1e-5);
    EXPECT_NEAR(got.result.sums.teacher_loss_sum, want.result.sums.teacher_loss_sum, 1e-4);
    for (const auto& [name, gradient] : want.gradients) {
      ExpectNear(got.gradients.at(name), gradient, name);
    }
  }
}

TEST(TrainingPassTest, TeachersInSixteenBitsAreTakenAsTheyAre) {
  Problem narrow = Classifier();
  Problem wide = narrow;
  for (int t = 0; t < 2; ++t) {
    Tensor& logits = wide.predictions.logits[t];
    Tensor& halves = narrow.predictions.logits[t];
    halves = Tensor::Allocate(t == 0 ? DT_HALF : DT_BFLOAT16, logits.shape());
    auto* const bits = static_cast<uint16_t*>(halves.data());
    for (int64_t i = 0; i < logits.elements(); ++i) {
      float& value = logits.As<float>()[i];
      bits[i] = t == 0 ? ToFloat16(value) : ToBfloat16(value);
      value = t == 0 ? FromFloat16(bits[i]) : FromBfloat16(bits[i]);
    }
  }
  for (const int parts : {1, 4}) {
    const Outcome want = Worker(wide, parts).Run(wide), got = Worker(narrow, parts).Run(narrow);
    ASSERT_TRUE(got.status.ok()) << got.status;
    EXPECT_TRUE(got.result.used_teacher);
    EXPECT_EQ(got.gradients, want.gradients);
  }
}

TEST(TrainingPassTest, SmoothsTowardsThePriorItIsGiven) {
  const Problem problem = Classifier();
  const Outcome uniform = Worker(problem, 1).Run(problem);
  const Outcome same = Worker(problem, 1, 0, FP32, {0.2f, 0.2f, 0.2f, 0.2f, 0.2f}).Run(problem);
  const Outcome unigram = Worker(problem, 1, 0, FP32, {0.7f, 0.1f, 0.1f, 0.1f, 0}).Run(problem);
  ASSERT_TRUE(same.status.ok()) << same.status;
  ASSERT_TRUE(unigram.status.ok()) << unigram.status;
  EXPECT_NEAR(same.result.sums.label_loss_sum, uniform.result.sums.label_loss_sum, 1e-5);
  EXPECT_GT(std::abs(unigram.result.sums.label_loss_sum - uniform.result.sums.label_loss_sum),
            1e-3);
  for (const auto& [name, gradient] : uniform.gradients) {
    ExpectNear(same.gradients.at(name), gradient, name);
    EXPECT_NE(unigram.gradients.at(name), gradient) << name;
  }
}

TEST(TrainingPassTest, PartsHaveDropoutOfTheirOwn) {
  LinearModel model(3, 2, /*recurrent=*/false);
  TrainingPass::Options options;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(
      "model { inputs { name: 'x' shape: 3 } num_outputs: 2 } groups { name: 'alpha' }"
      "training { micro_batches: 4 }",
      &options.job));
  options.model = &model;
  auto run = [&] {
    auto pass = TrainingPass::Create(options);
    ASSERT_TRUE(pass.ok()) << pass.status();
    BatchPipeline::Step step;
    step.assignment.set_step(1);
    step.batch = Batch(4, {0, 1, 0, 1});
    Model::States states;
    const auto result = (*pass)->Run(
        step, {RandomFloats({4, 3}, 1)}, &states, [] { return nullptr; },
        [] { return [](int, const float*, std::shared_ptr<const void>) {}; });
    ASSERT_TRUE(result.ok()) << result.status();
  };
  run();
  options.job.mutable_training()->set_micro_batches(1);
  run();
  const std::vector<uint64_t>& seeds = model.seeds();
  ASSERT_EQ(seeds.size(), 5u);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) EXPECT_NE(seeds[i], seeds[j]);
  }
  EXPECT_EQ(seeds[4], seeds[0]);
}

TEST(TrainingPassTest, APartThatFailsLeavesNothingBehind) {
  const Problem good = Columns();
  Problem bad = good;
  bad.inputs[1] = Int64Tensor({8, 2}, {0, 1, 1, 2, 2, 5, 3, 0, 3, 3, 0, 0, 2, 2, 1, 77});
  const Outcome want = Worker(good, 4).Run(good);
  Worker worker(good, 4);
  const Outcome failed = worker.Run(bad);
  EXPECT_THAT(std::string(failed.status.message()), HasSubstr("index out of range"));
  EXPECT_TRUE(failed.gradients.empty());
  const Outcome again = worker.Run(good);
  ASSERT_TRUE(again.status.ok()) << again.status;
  EXPECT_EQ(again.gradients, want.gradients);
}

TEST(TrainingPassTest, APartWhoseTeacherHasDivergedLearnsFromItsLabels) {
  Problem problem = Classifier();
  problem.predictions.logits.resize(1);
  problem.predictions.logits[0].As<float>()[7 * 5] = std::nanf("");
  const Outcome one = Worker(problem, 1).Run(problem);
  ASSERT_TRUE(one.status.ok()) << one.status;
  EXPECT_FALSE(one.result.used_teacher);
  const Outcome two = Worker(problem, 2).Run(problem);
  ASSERT_TRUE(two.status.ok()) << two.status;
  EXPECT_TRUE(two.result.finite);
  EXPECT_TRUE(two.result.used_teacher);  // by the part it has something to say about
  EXPECT_NEAR(two.result.sums.label_loss_sum, one.result.sums.label_loss_sum, 1e-4);
}

}  // namespace
}  // namespace codistill
