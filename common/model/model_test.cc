#include "common/model/model.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <thread>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/model/test_archive.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

ModelConfig ParseConfig(const std::string& text) {
  ModelConfig config;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &config)) << text;
  return config;
}

absl::StatusOr<std::unique_ptr<Model>> TryLoad(const std::string& folder, const std::string& config,
                                               int threads = 1) {
  Model::Options options;
  options.archive = folder + "/m.pt";
  options.config = ParseConfig(config);
  options.threads = threads;
  return Model::Load(options);
}

std::unique_ptr<Model> Load(const std::string& folder, const std::string& config) {
  auto model = TryLoad(folder, config);
  if (!model.ok()) ADD_FAILURE() << model.status();
  return model.ok() ? *std::move(model) : nullptr;
}

TensorList ExportedList(const std::string& folder) {
  std::ifstream file(folder + "/m.tensors.textproto");
  std::stringstream text;
  text << file.rdbuf();
  TensorList list;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text.str(), &list));
  return list;
}

int IndexOf(const Model& model, const std::string& name) {
  for (int i = 0; i < model.tensors().tensors_size(); ++i) {
    if (model.tensors().tensors(i).name() == name) return i;
  }
  ADD_FAILURE() << "no tensor " << name;
  return -1;
}

absl::Span<float> Values(const Model& model, const std::string& name) {
  const TensorView& view = model.storage()[IndexOf(model, name)];
  return absl::Span<float>(static_cast<float*>(view.data), view.elements());
}

// Gradients by name, in the order in which they came.
struct Gradients {
  std::vector<std::string> order;
  std::map<std::string, std::vector<float>> values;
};

absl::Status Backward(Model* model, const Tensor& gradient, Gradients* out) {
  return model->Backward(
      gradient, [&](int index, const float* data, std::shared_ptr<const void> owner) {
        EXPECT_NE(owner, nullptr);
        const TensorSpec& spec = model->tensors().tensors(index);
        out->order.push_back(spec.name());
        const int64_t count =
            ElementCount(std::vector<int64_t>(spec.shape().begin(), spec.shape().end()));
        EXPECT_TRUE(out->values.emplace(spec.name(), std::vector<float>(data, data + count)).second)
            << spec.name() << " came twice";
      });
}

std::vector<float> ToVector(const Tensor& tensor) {
  const auto span = tensor.As<float>();
  return std::vector<float>(span.begin(), span.end());
}

// Loss of the tests: the logits' scalar product with a fixed tensor, which is then d loss / d
// logits.
double Loss(const Tensor& logits, const Tensor& weights) {
  double sum = 0;
  for (int64_t i = 0; i < logits.elements(); ++i) {
    sum += static_cast<double>(logits.As<float>()[i]) * weights.As<float>()[i];
  }
  return sum;
}

// Compares every gradient of some elements with central differences of the loss.
void ExpectGradientsMatchDifferences(Model* model, absl::Span<const Tensor> inputs,
                                     Model::States* states) {
  Model::States first = states == nullptr ? Model::States() : *states;
  auto logits = model->Forward(inputs, states == nullptr ? nullptr : &first, 1);
  ASSERT_TRUE(logits.ok()) << logits.status();
  const Tensor weights = RandomFloats(logits->values.shape(), 99);
  Gradients gradients;
  ASSERT_TRUE(Backward(model, weights, &gradients).ok());

  auto loss = [&] {
    Model::States again = states == nullptr ? Model::States() : *states;
    auto result = model->Predict(inputs, states == nullptr ? nullptr : &again);
    EXPECT_TRUE(result.ok()) << result.status();
    return Loss(result->values, weights);
  };
  int checked = 0;
  for (int i = 0; i < model->tensors().tensors_size(); ++i) {
    const TensorSpec& spec = model->tensors().tensors(i);
    if (spec.role() != TensorSpec::PARAMETER) {
      EXPECT_EQ(gradients.values.count(spec.name()), 0u) << spec.name();
      continue;
    }
    ASSERT_EQ(gradients.values.count(spec.name()), 1u) << spec.name();
    absl::Span<float> values = Values(*model, spec.name());
    for (size_t j = 0; j < values.size(); j += std::max<size_t>(1, values.size() / 5)) {
      const float kept = values[j];
      constexpr float kStep = 1e-2f;
      values[j] = kept + kStep;
      const double above = loss();
      values[j] = kept - kStep;
      const double below = loss();
      values[j] = kept;
      const double expected = (above - below) / (2 * kStep);
      EXPECT_NEAR(gradients.values[spec.name()][j], expected, 2e-2 * (1 + std::abs(expected)))
          << spec.name() << "[" << j << "]";
      ++checked;
    }
  }
  EXPECT_GT(checked, 0);
}

constexpr char kLinear[] = "inputs { name: 'x' shape: 3 } num_outputs: 2";

std::string LinearFolder() {
  static const std::string folder =
      ExportForTest("m", "mlp", {"in_features=3", "hidden=", "num_classes=2"});
  return folder;
}

TEST(ModelTest, ListsTensorsAsTheExporterDoes) {
  struct Case {
    std::string module;
    std::vector<std::string> options;
    std::string config;
  };
  const std::vector<Case> cases = {
      {"mlp",
       {"in_features=5", "hidden=4,3", "num_classes=2"},
       "inputs { name: 'x' shape: 5 } num_outputs: 2"},
      {"ctr",
       {"numeric=2", "cardinalities=4,6"},
       "inputs { name: 'numeric' shape: 2 } inputs { name: 'categorical' dtype: DT_INT64 shape: 2 }"
       "num_outputs: 1"},
      {"resnet",
       {"depth=8", "width=4", "num_classes=10"},
       "inputs { name: 'image' shape: [3, 16, 16] } num_outputs: 10"},
      {"lstm_lm",
       {"vocabulary=11", "embedding=6", "hidden=8", "layers=2"},
       "inputs { name: 'tokens' dtype: DT_INT64 shape: 3 } states { name: 'h' shape: [2, -1, 8] }"
       "states { name: 'c' shape: [2, -1, 8] } num_outputs: 11"}};
  for (const Case& c : cases) {
    const std::string folder = ExportForTest("m", c.module, c.options);
    const auto model = Load(folder, c.config);
    ASSERT_NE(model, nullptr) << c.module;
    EXPECT_EQ(model->tensors().DebugString(), ExportedList(folder).DebugString()) << c.module;
    ASSERT_EQ(model->storage().size(), static_cast<size_t>(model->tensors().tensors_size()));
    for (int i = 0; i < model->tensors().tensors_size(); ++i) {
      const TensorSpec& spec = model->tensors().tensors(i);
      const TensorView& view = model->storage()[i];
      EXPECT_EQ(view.name, spec.name());
      EXPECT_EQ(view.dtype, spec.dtype());
      EXPECT_EQ(view.shape, std::vector<int64_t>(spec.shape().begin(), spec.shape().end()));
      EXPECT_NE(view.data, nullptr);
    }
  }
}

TEST(ModelTest, PredictsWithWhatIsInStorage) {
  const auto model = Load(LinearFolder(), kLinear);
  ASSERT_NE(model, nullptr);
  const std::vector<float> w = {1, 2, 3, -1, 0, 1}, b = {10, 20};
  std::copy(w.begin(), w.end(), Values(*model, "fc1.weight").begin());
  std::copy(b.begin(), b.end(), Values(*model, "fc1.bias").begin());
  const auto logits = model->Predict({FloatTensor({2, 3}, {1, 1, 1, 0, 0, 2})}, nullptr);
  ASSERT_TRUE(logits.ok()) << logits.status();
  EXPECT_EQ(logits->rows, 2);
  EXPECT_THAT(logits->values.shape(), ElementsAre(2, 2));
  EXPECT_THAT(ToVector(logits->values), ElementsAre(16, 20, 16, 22));
}

TEST(ModelTest, GradientOfALinearModel) {
  const auto model = Load(LinearFolder(), kLinear);
  ASSERT_NE(model, nullptr);
  for (int round = 0; round < 2; ++round) {  // the second time nothing has been left behind
    ASSERT_TRUE(model->Forward({FloatTensor({2, 3}, {1, 2, 3, 4, 5, 6})}, nullptr, 1).ok());
    Gradients gradients;
    const absl::Status status =
        Backward(model.get(), FloatTensor({2, 2}, {1, 10, 100, 1000}), &gradients);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_THAT(gradients.values["fc1.weight"], ElementsAre(401, 502, 603, 4010, 5020, 6030));
    EXPECT_THAT(gradients.values["fc1.bias"], ElementsAre(101, 1010));
  }
}

TEST(ModelTest, BackwardNeedsItsOwnForwardAndTheRightShape) {
  const auto model = Load(LinearFolder(), kLinear);
  ASSERT_NE(model, nullptr);
  Gradients gradients;
  const Tensor gradient = FloatTensor({1, 2}, {1, 1});
  EXPECT_TRUE(absl::IsFailedPrecondition(Backward(model.get(), gradient, &gradients)));
  ASSERT_TRUE(model->Forward({FloatTensor({1, 3}, {1, 2, 3})}, nullptr, 1).ok());
  EXPECT_EQ(Backward(model.get(), FloatTensor({2, 1}, {1, 1}), &gradients).message(),
            "gradient of the logits is FP32 [2, 1]; it must be FP32 [1, 2]");
  EXPECT_TRUE(Backward(model.get(), gradient, &gradients).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(Backward(model.get(), gradient, &gradients)));
}

TEST(ModelTest, GradientsOfADeepModelComeFromTheLastLayerWhileTheFirstIsStillToDo) {
  // Nearly all of the backward pass is in the first layers.
  const auto model =
      Load(ExportForTest("m", "mlp", {"in_features=512", "hidden=1024,1024,8", "num_classes=2"}),
           "inputs { name: 'x' shape: 512 } num_outputs: 2");
  ASSERT_NE(model, nullptr);
  const Tensor x = RandomFloats({256, 512}, 1), gradient = RandomFloats({256, 2}, 2);
  std::vector<double> first_fractions;
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
    const absl::Duration total = absl::Now() - start;
    // A JIT watches a few passes before it changes anything.
    if (round >= 4) first_fractions.push_back(absl::FDivDuration(first - start, total));
    ASSERT_EQ(order.size(), 8u);
    EXPECT_THAT(model->tensors().tensors(order.front()).name(), StartsWith("fc4."));
    EXPECT_THAT(model->tensors().tensors(order.back()).name(), StartsWith("fc1."));
  }
  // Under a JIT that has fused the pass, all gradients come in its last few percent.
  EXPECT_LT(*std::min_element(first_fractions.begin(), first_fractions.end()), 0.5);
}

TEST(ModelTest, LstmGradientsWithTiedEmbeddingMatchDifferences) {
  const auto model =
      Load(ExportForTest("m", "lstm_lm", {"vocabulary=7", "embedding=4", "hidden=4"}),
           "inputs { name: 'tokens' dtype: DT_INT64 shape: 3 }"
           "states { name: 'h' shape: [1, -1, 4] }"
           "states { name: 'c' shape: [1, -1, 4] } num_outputs: 7");
  ASSERT_NE(model, nullptr);
  Model::States states = {RandomFloats({1, 2, 4}, 5), RandomFloats({1, 2, 4}, 6)};
  ExpectGradientsMatchDifferences(model.get(), {Int64Tensor({2, 3}, {1, 2, 3, 6, 5, 0})}, &states);
}

// One matrix under two names, in two modules; both uses count.
constexpr char kTied[] = R"(
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x))) * self.frozen

def build(options):
    return Tied()
)";

TEST(ModelTest, TiedParametersAreHandedOverOnceWithTheSum) {
  const std::string folder = ExportSourceForTest("m", kTied);
  const auto model = Load(folder, "inputs { name: 'x' shape: 3 } num_outputs: 3");
  ASSERT_NE(model, nullptr);
  EXPECT_EQ(model->tensors().DebugString(), ExportedList(folder).DebugString());
  const TensorSpec& tied = model->tensors().tensors(IndexOf(*model, "b.weight"));
  EXPECT_EQ(tied.role(), TensorSpec::TIED);
  EXPECT_EQ(tied.tied_to(), "a.weight");
  EXPECT_EQ(model->tensors().tensors(IndexOf(*model, "frozen")).role(), TensorSpec::FROZEN);
  EXPECT_EQ(Values(*model, "b.weight").data(), Values(*model, "a.weight").data());
  ExpectGradientsMatchDifferences(model.get(), {RandomFloats({4, 3}, 3)}, nullptr);
}

TEST(ModelTest, UnusedParametersComeLastWithZeros) {
  const auto model =
      Load(ExportSourceForTest("m", kTied), "inputs { name: 'x' shape: 3 } num_outputs: 3");
  ASSERT_NE(model, nullptr);
  ASSERT_TRUE(model->Forward({RandomFloats({4, 3}, 3)}, nullptr, 1).ok());
  Gradients gradients;
  ASSERT_TRUE(Backward(model.get(), RandomFloats({4, 3}, 4), &gradients).ok());
  EXPECT_EQ(gradients.order.size(), 4u);
  EXPECT_EQ(gradients.order.back(), "unused");
  EXPECT_THAT(gradients.values["unused"], ElementsAre(0, 0, 0, 0));
}

TEST(ModelTest, GradientIsNeverTheCallersMemory) {
  const auto model = Load(ExportSourceForTest("m", R"(
import torch
from torch import nn

class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias

def build(options):
    return Bias()
)"),
                          "inputs { name: 'x' shape: 3 } num_outputs: 3");
  ASSERT_NE(model, nullptr);
  ASSERT_TRUE(model->Forward({RandomFloats({1, 3}, 3)}, nullptr, 1).ok());
  Tensor gradient = FloatTensor({1, 3}, {1, 2, 3});
  const float* kept = nullptr;
  std::shared_ptr<const void> kept_owner;
  ASSERT_TRUE(model
                  ->Backward(gradient,
                             [&](int, const float* data, std::shared_ptr<const void> owner) {
                               kept = data;
                               kept_owner = std::move(owner);
                             })
                  .ok());
  std::memset(gradient.data(), 0, gradient.bytes());
  EXPECT_THAT(std::vector<float>(kept, kept + 3), ElementsAre(1, 2, 3));
}

TEST(ModelTest, DropoutDependsOnTheSeedAndIsOffInPredict) {
  const auto model = Load(
      ExportForTest("m", "mlp", {"in_features=8", "hidden=64", "num_classes=4", "dropout=0.5"}),
      "inputs { name: 'x' shape: 8 } num_outputs: 4");
  ASSERT_NE(model, nullptr);
  const Tensor x = RandomFloats({16, 8}, 1);
  auto forward = [&](uint64_t seed) {
    return ToVector(model->Forward({x}, nullptr, seed)->values);
  };
  auto predict = [&] { return ToVector(model->Predict({x}, nullptr)->values); };
  const std::vector<float> seven = forward(7);
  EXPECT_EQ(forward(7), seven);
  EXPECT_NE(forward(8), seven);
  const std::vector<float> predicted = predict();
  EXPECT_NE(predicted, seven);
  EXPECT_EQ(forward(7), seven);  // back in training mode
  EXPECT_EQ(predict(), predicted);
}

// Batch statistics, kept once in place and once by assignment.
constexpr char kStatistics[] = R"(
import torch
from torch import nn

class Statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("seen", torch.zeros(2))
        self.output = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen = self.seen + x.sum(dim=0)
        return self.output(self.norm(x) + self.seen)

def build(options):
    return Statistics()
)";

TEST(ModelTest, BuffersStayWhereTheyAreHoweverTheScriptWritesThem) {
  const auto model =
      Load(ExportSourceForTest("m", kStatistics), "inputs { name: 'x' shape: 2 } num_outputs: 2");
  ASSERT_NE(model, nullptr);
  const Tensor x = FloatTensor({2, 2}, {1, 2, 3, 4});
  for (int step = 1; step <= 2; ++step) {
    ASSERT_TRUE(model->Forward({x}, nullptr, 1).ok());
    EXPECT_THAT(Values(*model, "seen"), ElementsAre(4 * step, 6 * step));
  }
  EXPECT_FLOAT_EQ(Values(*model, "norm.running_mean")[0], 2 * (0.1 + 0.9 * 0.1));
  const TensorView& count = model->storage()[IndexOf(*model, "norm.num_batches_tracked")];
  EXPECT_EQ(*static_cast<const int64_t*>(count.data), 2);

  // Prediction reads the same memory and writes none of it.
  const std::vector<float> before = ToVector(model->Predict({x}, nullptr)->values);
  EXPECT_EQ(ToVector(model->Predict({x}, nullptr)->values), before);
  Values(*model, "seen")[0] += 1;
  EXPECT_NE(ToVector(model->Predict({x}, nullptr)->values), before);
}

TEST(ModelTest, RecurrentStateContinuesATextWhereItWasLeft) {
  const std::string folder =
      ExportForTest("m", "lstm_lm", {"vocabulary=7", "embedding=4", "hidden=5", "layers=2"});
  const std::string states =
      "states { name: 'h' shape: [2, -1, 5] } states { name: 'c' shape: [2, -1, 5] } num_outputs: "
      "7";
  const auto whole = Load(folder, "inputs { name: 'tokens' dtype: DT_INT64 shape: 4 } " + states);
  const auto half = Load(folder, "inputs { name: 'tokens' dtype: DT_INT64 shape: 2 } " + states);
  ASSERT_NE(whole, nullptr);
  ASSERT_NE(half, nullptr);

  Model::States whole_states, half_states;
  const auto all = whole->Predict({Int64Tensor({2, 4}, {1, 2, 3, 4, 6, 5, 4, 3})}, &whole_states);
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ(all->rows, 8);
  const auto first = half->Predict({Int64Tensor({2, 2}, {1, 2, 6, 5})}, &half_states);
  const auto second = half->Predict({Int64Tensor({2, 2}, {3, 4, 4, 3})}, &half_states);
  ASSERT_TRUE(first.ok() && second.ok());
  const std::vector<float> want = ToVector(all->values);
  const std::vector<float> a = ToVector(first->values), b = ToVector(second->values);
  for (int lane = 0; lane < 2; ++lane) {
    for (int token = 0; token < 4; ++token) {
      for (int k = 0; k < 7; ++k) {
        const std::vector<float>& part = token < 2 ? a : b;
        EXPECT_NEAR(part[(lane * 2 + token % 2) * 7 + k], want[(lane * 4 + token) * 7 + k], 1e-6);
      }
    }
  }
  EXPECT_THAT(whole_states[0].shape(), ElementsAre(2, 2, 5));
  for (int i = 0; i < 2; ++i) {
    const auto w = ToVector(whole_states[i]), h = ToVector(half_states[i]);
    ASSERT_EQ(w.size(), h.size());
    for (size_t j = 0; j < w.size(); ++j) EXPECT_NEAR(w[j], h[j], 1e-6);
  }
  // A call that forgets its states says so.
  EXPECT_THAT(std::string(half->Predict({Int64Tensor({1, 2}, {1, 2})}, nullptr).status().message()),
              HasSubstr("recurrent states (h"));
}

TEST(ModelTest, PredictIsSafeInSeveralThreads) {
  const auto model = Load(ExportForTest("m", "resnet", {"depth=8", "width=4", "num_classes=10"}),
                          "inputs { name: 'image' shape: [3, 8, 8] } num_outputs: 10");
  ASSERT_NE(model, nullptr);
  const Tensor x = RandomFloats({4, 3, 8, 8}, 1);
  const std::vector<float> want = ToVector(model->Predict({x}, nullptr)->values);
  ASSERT_TRUE(model->Forward({x}, nullptr, 1).ok());  // the threads meet a model in training mode
  const std::vector<float> after = ToVector(model->Predict({x}, nullptr)->values);
  EXPECT_NE(after, want);  // the statistics have moved
  ASSERT_TRUE(model->Forward({x}, nullptr, 1).ok());
  std::vector<std::vector<float>> results(4);
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&] {
      for (int i = 0; i < 5; ++i) result = ToVector(model->Predict({x}, nullptr)->values);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) EXPECT_EQ(result, results[0]);
}

TEST(ModelTest, InputThatTheModelCannotTakeIsTheCallersMistake) {
  const auto model = Load(ExportForTest("m", "ctr", {"numeric=2", "cardinalities=4,6"}),
                          "inputs { name: 'numeric' shape: 2 }"
                          "inputs { name: 'categorical' dtype: DT_INT64 shape: 2 } num_outputs: 1");
  ASSERT_NE(model, nullptr);
  const Tensor numeric = Tensor::Zeros(DT_FLOAT, {1, 2});
  const auto bad = model->Predict({numeric, Int64Tensor({1, 2}, {3, 6})}, nullptr);
  EXPECT_TRUE(absl::IsInvalidArgument(bad.status()));
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr("index out of range"));
  EXPECT_THAT(std::string(bad.status().message()), testing::Not(HasSubstr("Traceback")));
  EXPECT_TRUE(model->Predict({numeric, Int64Tensor({1, 2}, {3, 5})}, nullptr).ok());
}

TEST(ModelTest, RefusesWhatItCannotLoad) {
  auto error = [](const absl::StatusOr<std::unique_ptr<Model>>& model) {
    return std::string(model.status().message());
  };
  auto missing = TryLoad("/nowhere", kLinear);
  EXPECT_TRUE(absl::IsNotFound(missing.status()));
  EXPECT_THAT(error(missing), HasSubstr("/nowhere/m.pt"));

  const std::string junk = testing::TempDir();
  std::ofstream(junk + "/m.pt") << "not an archive";
  auto damaged = TryLoad(junk, kLinear);
  EXPECT_TRUE(absl::IsDataLoss(damaged.status())) << damaged.status();
  EXPECT_THAT(error(damaged), HasSubstr(junk + "/m.pt"));

  auto names = TryLoad(LinearFolder(), "inputs { name: 'y' shape: 3 } num_outputs: 2");
  EXPECT_TRUE(absl::IsInvalidArgument(names.status()));
  EXPECT_THAT(error(names), HasSubstr("forward() takes (x)"));
  EXPECT_THAT(error(names), HasSubstr("are (y)"));
  EXPECT_THAT(error(TryLoad(LinearFolder(), "inputs { name: 'x' shape: 3 } num_outputs: 5")),
              HasSubstr("gave logits Float [2, 2] for 2 examples; they must be [2, ..., 5]"));
  EXPECT_THAT(error(TryLoad(LinearFolder(), "inputs { name: 'x' shape: 4 } num_outputs: 2")),
              HasSubstr("trial pass on two examples of zeros failed"));
  EXPECT_THAT(error(TryLoad(LinearFolder(), kLinear, 0)), HasSubstr("threads is 0"));

  Model::Options options;
  options.archive = LinearFolder() + "/m.pt";
  options.config = ParseConfig(kLinear);
  options.device = "cuda:0";
  EXPECT_TRUE(absl::IsFailedPrecondition(Model::Load(options).status()));
  options.device = "tpu";
  EXPECT_TRUE(absl::IsInvalidArgument(Model::Load(options).status()));
}

TEST(ModelTest, RefusesAForwardWithSideEffects) {
  const std::string source = R"(
import torch
from torch import nn

class Bad(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        BODY
        return self.output(x)

def build(options):
    return Bad()
)";
  auto error = [&](const std::string& body) {
    std::string text = source;
    text.replace(text.find("BODY"), 4, body);
    auto model =
        TryLoad(ExportSourceForTest("m", text), "inputs { name: 'x' shape: 2 } num_outputs: 2");
    return std::string(model.status().message());
  };
  EXPECT_EQ(error("pass"), "");
  EXPECT_THAT(error("x.add_(1)"), HasSubstr("forward() writes into its argument x"));
  EXPECT_THAT(error("self.calls += 1"), HasSubstr("forward() changes calls in eval mode"));
  EXPECT_THAT(error("self.calls = self.calls + 1"),
              HasSubstr("forward() changes calls in eval mode"));
}

// Inputs from embedding tables.
constexpr char kRowsSource[] = R"(
import torch
from torch import nn

class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, rows: torch.Tensor, idle: torch.Tensor) -> torch.Tensor:
        return self.output(torch.cat([x, (rows * rows).flatten(1)], dim=1))

def build(options):
    return Rows()
)";
constexpr char kRowsConfig[] = R"pb(
  inputs { name: "x" shape: 2 }
  inputs { name: "rows" shape: 2 shape: 2 embedding_table: "t" }
  inputs { name: "idle" shape: 1 shape: 3 embedding_table: "u" }
  num_outputs: 1
)pb";

TEST(Rows, GetTheGradientOfTheLoss) {
  const auto model = Load(ExportSourceForTest("m", kRowsSource), kRowsConfig);
  ASSERT_NE(model, nullptr);
  const Tensor x = RandomFloats({3, 2}, 1);
  const Tensor rows = RandomFloats({3, 2, 2}, 2);
  const Tensor idle = RandomFloats({3, 1, 3}, 3);
  const Tensor gradient = FloatTensor({3, 1}, {1, -2, 0.5f});
  for (int pass = 0; pass < 2; ++pass) {
    ASSERT_TRUE(model->Forward({x, rows, idle}, nullptr, 1).ok());
    Gradients gradients;
    ASSERT_TRUE(Backward(model.get(), gradient, &gradients).ok());
    EXPECT_TRUE(model->InputGradient(0).empty());
    EXPECT_TRUE(model->InputGradient(7).empty());
    const Tensor of_rows = model->InputGradient(1);
    ASSERT_EQ(of_rows.shape(), rows.shape());
    const auto weight = Values(*model, "output.weight");
    for (int b = 0; b < 3; ++b) {
      for (int i = 0; i < 4; ++i) {
        // d/dr w r^2 = 2 w r, the same in each pass: nothing is left over from the one before.
        EXPECT_FLOAT_EQ(of_rows.As<float>()[b * 4 + i],
                        gradient.As<float>()[b] * weight[2 + i] * 2 * rows.As<float>()[b * 4 + i]);
      }
    }
    const Tensor of_idle = model->InputGradient(2);
    ASSERT_EQ(of_idle.shape(), idle.shape());
    EXPECT_THAT(of_idle.As<float>(), testing::Each(0.0f));
  }
  // Predicting neither wants nor keeps gradients.
  const auto logits = model->Predict({x, rows, idle}, nullptr);
  ASSERT_TRUE(logits.ok()) << logits.status();
}

}  // namespace
}  // namespace codistill
