// Training in automatic mixed precision, against the same model in fp32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/model/model.h"
#include "common/model/test_archive.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::Each;
using testing::HasSubstr;
using testing::StartsWith;

std::unique_ptr<Model> Load(const std::string& folder, const std::string& config,
                            Precision precision) {
  Model::Options options;
  options.archive = folder + "/m.pt";
  options.precision = precision;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(config, &options.config)) << config;
  auto model = Model::Load(options);
  if (!model.ok()) ADD_FAILURE() << model.status();
  return model.ok() ? *std::move(model) : nullptr;
}

absl::Span<float> Values(const Model& model, const std::string& name) {
  for (const TensorView& view : model.storage()) {
    if (view.name == name) return {static_cast<float*>(view.data), size_t(view.elements())};
  }
  ADD_FAILURE() << "no tensor " << name;
  return {};
}

// A bfloat16 is the upper half of a float.
std::vector<float> ToVector(const Tensor& tensor) {
  if (tensor.dtype() == DT_BFLOAT16) {
    std::vector<float> values(tensor.elements());
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t bits = static_cast<const uint16_t*>(tensor.data())[i] << 16;
      std::memcpy(&values[i], &bits, sizeof(bits));
    }
    return values;
  }
  const auto span = tensor.As<float>();
  return std::vector<float>(span.begin(), span.end());
}

double Norm(const std::vector<float>& a) {
  double sum = 0;
  for (const float x : a) sum += static_cast<double>(x) * x;
  return std::sqrt(sum);
}

// Euclidean norm of the difference over that of `want`.
double Difference(const std::vector<float>& got, const std::vector<float>& want) {
  EXPECT_EQ(got.size(), want.size());
  std::vector<float> difference(want.size());
  for (size_t i = 0; i < want.size(); ++i) difference[i] = got[i] - want[i];
  return Norm(difference) / (Norm(want) + 1e-12);
}

struct Pass {
  DataType type = DT_INVALID;
  std::vector<float> logits;
  Model::States states;
  std::map<std::string, std::vector<float>> gradients;
  std::vector<std::string> order;
};

Pass Train(Model* model, absl::Span<const Tensor> inputs, const Model::States& states = {}) {
  Pass pass;
  pass.states = states;
  const auto logits = model->Forward(inputs, states.empty() ? nullptr : &pass.states, 1);
  if (!logits.ok()) {
    ADD_FAILURE() << logits.status();
    return pass;
  }
  pass.type = logits->values.dtype();
  pass.logits = ToVector(logits->values);
  const absl::Status status = model->Backward(
      RandomGradient(logits->values, 99),
      [&](int index, const float* data, std::shared_ptr<const void>) {
        const TensorSpec& spec = model->tensors().tensors(index);
        const std::vector<int64_t> shape(spec.shape().begin(), spec.shape().end());
        pass.gradients[spec.name()] = std::vector<float>(data, data + ElementCount(shape));
        pass.order.push_back(spec.name());
      });
  EXPECT_TRUE(status.ok()) << status;
  return pass;
}

constexpr char kMlp[] = "inputs { name: 'x' shape: 24 } num_outputs: 5";

std::string MlpFolder() {
  static const std::string folder = ExportForTest(
      "m", "mlp", {"in_features=24", "hidden=48,32", "num_classes=5", "activation=tanh"});
  return folder;
}

TEST(MixedPrecisionTest, LogitsStatesAndGradientsAgreeWithThoseOfFp32) {
  struct Case {
    std::string folder;
    std::string config;
    std::vector<Tensor> inputs;
    Model::States states;
    // Of the gradient of one parameter. Where ReLU and batch norm come after one another many
    // times, units near zero fall to the other side.
    double tolerance = 0.06;
  };
  const std::vector<Case> cases = {
      {MlpFolder(), kMlp, {RandomFloats({32, 24}, 1)}, {}},
      {ExportForTest("m", "ctr", {"numeric=2", "cardinalities=4,6", "cross=1"}),
       "inputs { name: 'numeric' shape: 2 } inputs { name: 'categorical' dtype: DT_INT64 shape: 2 }"
       "num_outputs: 1",
       {RandomFloats({4, 2}, 1), Int64Tensor({4, 2}, {0, 1, 1, 2, 2, 5, 3, 0})},
       {}},
      {ExportForTest("m", "resnet", {"depth=8", "width=4", "num_classes=10"}),
       "inputs { name: 'image' shape: [3, 16, 16] } num_outputs: 10",
       {RandomFloats({8, 3, 16, 16}, 1)},
       {},
       0.35},
      {ExportForTest("m", "lstm_lm", {"vocabulary=7", "embedding=16", "hidden=16", "layers=2"}),
       "inputs { name: 'tokens' dtype: DT_INT64 shape: 3 } states { name: 'h' shape: [2, -1, 16] }"
       "states { name: 'c' shape: [2, -1, 16] } num_outputs: 7",
       {Int64Tensor({2, 3}, {1, 2, 3, 6, 5, 0})},
       {RandomFloats({2, 2, 16}, 5), RandomFloats({2, 2, 16}, 6)}}};
  for (const Case& c : cases) {
    const auto exact = Load(c.folder, c.config, FP32), mixed = Load(c.folder, c.config, BF16);
    ASSERT_TRUE(exact != nullptr && mixed != nullptr) << c.config;
    const Pass want = Train(exact.get(), c.inputs, c.states);
    const Pass got = Train(mixed.get(), c.inputs, c.states);
    EXPECT_EQ(want.type, DT_FLOAT) << c.config;
    EXPECT_EQ(got.type, DT_BFLOAT16) << c.config;  // for the loss to read, without a copy
    EXPECT_NE(got.logits, want.logits) << c.config;
    EXPECT_LT(Difference(got.logits, want.logits), 0.05) << c.config;
    ASSERT_EQ(got.states.size(), want.states.size());
    for (size_t i = 0; i < want.states.size(); ++i) {
      EXPECT_EQ(got.states[i].dtype(), DT_FLOAT);
      EXPECT_LT(Difference(ToVector(got.states[i]), ToVector(want.states[i])), 0.02) << i;
    }
    ASSERT_EQ(got.gradients.size(), want.gradients.size());
    std::vector<float> all, all_wanted;
    for (const auto& [name, gradient] : want.gradients) {
      const std::vector<float>& mine = got.gradients.at(name);
      all.insert(all.end(), mine.begin(), mine.end());
      all_wanted.insert(all_wanted.end(), gradient.begin(), gradient.end());
      // Of parameters that batch norm makes void the gradient is noise in either precision.
      if (Norm(gradient) < 1e-4) continue;
      EXPECT_LT(Difference(mine, gradient), c.tolerance) << name << " of " << c.config;
    }
    EXPECT_LT(Difference(all, all_wanted), c.tolerance / 2) << c.config;
  }
}

// Tells the types that its layers compute in.
constexpr char kTypes[] = R"(
import torch
from torch import nn

class Types(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.hidden(x)
        z = self.output(torch.relu(self.norm(y)))
        low = y.dtype == torch.bfloat16 and z.dtype == torch.bfloat16
        return torch.full([x.size(0), 2], 1.0 if low else 0.0) + 0.0 * z.float()

def build(options):
    return Types()
)";

TEST(MixedPrecisionTest, LayersInsideAnArchiveComputeInBfloat16WhileItTrainsOnly) {
  const std::string folder = ExportSourceForTest("m", kTypes);
  const std::string config = "inputs { name: 'x' shape: 4 } num_outputs: 2";
  const Tensor x = RandomFloats({8, 4}, 1);
  const auto mixed = Load(folder, config, BF16), exact = Load(folder, config, FP32);
  ASSERT_TRUE(mixed != nullptr && exact != nullptr);
  for (int pass = 0; pass < 3; ++pass) {  // a JIT may change its mind after a pass or two
    EXPECT_THAT(Train(mixed.get(), {x}).logits, Each(1.0f));
    EXPECT_THAT(ToVector(mixed->Predict({x}, nullptr)->values), Each(0.0f));
    EXPECT_THAT(Train(exact.get(), {x}).logits, Each(0.0f));
  }
  // The statistics of the batches are fp32 and those that fp32 would have seen, but for rounding.
  for (const char* name : {"norm.running_mean", "norm.running_var"}) {
    const auto got = Values(*mixed, name), want = Values(*exact, name);
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 5e-3) << name;
  }
}

TEST(MixedPrecisionTest, PredictionsAreThoseOfFp32ToTheBit) {
  const auto exact = Load(MlpFolder(), kMlp, FP32), mixed = Load(MlpFolder(), kMlp, BF16);
  ASSERT_TRUE(exact != nullptr && mixed != nullptr);
  const Tensor x = RandomFloats({8, 24}, 1);
  const std::vector<float> want = ToVector(exact->Predict({x}, nullptr)->values);
  EXPECT_EQ(ToVector(mixed->Predict({x}, nullptr)->values), want);
  Train(mixed.get(), {x});
  EXPECT_EQ(ToVector(mixed->Predict({x}, nullptr)->values), want);
}

TEST(MixedPrecisionTest, APassSeesTheWeightsOfItsTimeAndNotEarlierCastsOfThem) {
  const auto model = Load(MlpFolder(), kMlp, BF16), fresh = Load(MlpFolder(), kMlp, BF16);
  ASSERT_TRUE(model != nullptr && fresh != nullptr);
  const Tensor x = RandomFloats({8, 24}, 1);
  const Pass before = Train(model.get(), {x});
  // Also after a pass that has had no backward pass.
  ASSERT_TRUE(model->Forward({x}, nullptr, 1).ok());
  for (const auto& m : {model.get(), fresh.get()}) {
    for (float& value : Values(*m, "fc1.weight")) value *= 1.5f;
  }
  const Pass after = Train(model.get(), {x});
  EXPECT_NE(after.logits, before.logits);
  const Pass want = Train(fresh.get(), {x});
  EXPECT_EQ(after.logits, want.logits);
  EXPECT_EQ(after.gradients, want.gradients);
}

TEST(MixedPrecisionTest, GradientsComeFromTheLastLayerWhileTheFirstIsStillToDo) {
  const auto model =
      Load(ExportForTest("m", "mlp", {"in_features=512", "hidden=1024,1024,8", "num_classes=2"}),
           "inputs { name: 'x' shape: 512 } num_outputs: 2", BF16);
  ASSERT_NE(model, nullptr);
  const Tensor x = RandomFloats({256, 512}, 1);
  const Tensor gradient = RandomGradient(Tensor::Allocate(DT_BFLOAT16, {256, 2}), 2);
  double least = 1;
  for (int round = 0; round < 8; ++round) {
    ASSERT_TRUE(model->Forward({x}, nullptr, 1).ok());
    std::vector<int> order;
    absl::Time first = absl::InfiniteFuture();
    const absl::Time start = absl::Now();
    ASSERT_TRUE(model
                    ->Backward(gradient,
                               [&](int index, const float*, std::shared_ptr<const void>) {
                                 if (order.empty()) first = absl::Now();
                                 order.push_back(index);
                               })
                    .ok());
    least = std::min(least, absl::FDivDuration(first - start, absl::Now() - start));
    ASSERT_EQ(order.size(), 8u);
    EXPECT_THAT(model->tensors().tensors(order.front()).name(), StartsWith("fc4."));
    EXPECT_THAT(model->tensors().tensors(order.back()).name(), StartsWith("fc1."));
  }
  EXPECT_LT(least, 0.5);
}

// A forward() that takes it for granted that everything is fp32.
constexpr char kStubborn[] = R"(
import torch
from torch import nn

class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(x.size(0), 4)
        sums.index_add_(0, torch.arange(x.size(0)), self.hidden(x))
        return self.output(sums)

def build(options):
    return Stubborn()
)";

TEST(MixedPrecisionTest, AnArchiveThatCannotIsRefusedWhenItIsLoaded) {
  const std::string folder = ExportSourceForTest("m", kStubborn);
  const std::string config = "inputs { name: 'x' shape: 4 } num_outputs: 2";
  EXPECT_NE(Load(folder, config, FP32), nullptr);
  Model::Options options;
  options.archive = folder + "/m.pt";
  options.precision = BF16;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(config, &options.config));
  const absl::Status status = Model::Load(options).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()), StartsWith(options.archive));
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("a trial pass in bfloat16 (training.precision: BF16) failed: "));
  std::swap(options.precision, options.predict_precision);
  EXPECT_THAT(std::string(Model::Load(options).status().message()),
              HasSubstr("a trial pass in bfloat16 (prediction.precision: BF16) failed: "));
}

std::unique_ptr<Model> LoadToPredict(const std::string& folder, const std::string& config,
                                     Precision precision, bool optimize) {
  Model::Options options;
  options.archive = folder + "/m.pt";
  options.predict_precision = precision;
  options.optimize_predict = optimize;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(config, &options.config)) << config;
  auto model = Model::Load(options);
  if (!model.ok()) ADD_FAILURE() << model.status();
  return model.ok() ? *std::move(model) : nullptr;
}

TEST(MixedPrecisionTest, PredictionsInBfloat16AgreeWithThoseOfFp32) {
  const std::string lstm =
      ExportForTest("m", "lstm_lm", {"vocabulary=7", "embedding=16", "hidden=16", "layers=2"});
  const std::string lstm_config =
      "inputs { name: 'tokens' dtype: DT_INT64 shape: 3 } states { name: 'h' shape: [2, -1, 16] }"
      "states { name: 'c' shape: [2, -1, 16] } num_outputs: 7";
  struct Case {
    std::string folder;
    std::string config;
    Tensor input;
  };
  const std::vector<Case> cases = {
      {MlpFolder(), kMlp, RandomFloats({32, 24}, 1)},
      {ExportForTest("m", "resnet", {"depth=8", "width=4", "num_classes=10"}),
       "inputs { name: 'image' shape: [3, 16, 16] } num_outputs: 10",
       RandomFloats({8, 3, 16, 16}, 1)},
      {lstm, lstm_config, Int64Tensor({2, 3}, {1, 2, 3, 6, 5, 0})}};
  for (const Case& c : cases) {
    for (const bool optimize : {false, true}) {
      const auto exact = LoadToPredict(c.folder, c.config, FP32, false);
      const auto low = LoadToPredict(c.folder, c.config, BF16, optimize);
      ASSERT_TRUE(exact != nullptr && low != nullptr) << c.config;
      Model::States want_states, states;
      for (int pass = 0; pass < 3; ++pass) {  // a JIT may change its mind after a pass or two
        const auto want = exact->Predict({c.input}, &want_states);
        const auto got = low->Predict({c.input}, &states);
        ASSERT_TRUE(want.ok() && got.ok()) << want.status() << got.status();
        ASSERT_EQ(got->values.dtype(), DT_FLOAT);
        EXPECT_NE(ToVector(got->values), ToVector(want->values)) << c.config;
        EXPECT_LT(Difference(ToVector(got->values), ToVector(want->values)), 0.03) << c.config;
        ASSERT_EQ(states.size(), want_states.size());
        for (const Tensor& state : states) EXPECT_EQ(state.dtype(), DT_FLOAT);
      }
      // Training is not touched by it.
      EXPECT_EQ(Train(low.get(), {c.input}, want_states).logits,
                Train(exact.get(), {c.input}, want_states).logits);
      EXPECT_TRUE(absl::IsUnimplemented(
          Model::Compile(std::shared_ptr<const Model>(low.get(), [](const Model*) {})).status()));
    }
  }
}

// Rows of an embedding table, which a linear layer multiplies.
constexpr char kRows[] = R"(
import torch
from torch import nn

class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = nn.Linear(6, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.output(rows.flatten(1))

def build(options):
    return Rows()
)";

TEST(MixedPrecisionTest, GradientsOfRowsAreFp32) {
  const std::string folder = ExportSourceForTest("m", kRows);
  const std::string config =
      "inputs { name: 'rows' shape: 2 shape: 3 embedding_table: 't' } num_outputs: 3";
  const auto exact = Load(folder, config, FP32), mixed = Load(folder, config, BF16);
  ASSERT_TRUE(exact != nullptr && mixed != nullptr);
  const Tensor rows = RandomFloats({4, 2, 3}, 2);
  Train(exact.get(), {rows});
  Train(mixed.get(), {rows});
  const Tensor got = mixed->InputGradient(0);
  ASSERT_EQ(got.dtype(), DT_FLOAT);
  ASSERT_EQ(got.shape(), rows.shape());
  EXPECT_LT(Difference(ToVector(got), ToVector(exact->InputGradient(0))), 0.02);
}

}  // namespace
}  // namespace codistill
