#include "common/model/prepare_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "common/model/test_archive.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::HasSubstr;

constexpr int64_t kInputs = 16, kClasses = 5;

std::unique_ptr<Model> Load(const std::string& folder, const std::string& config) {
  Model::Options options;
  options.archive = folder + "/m.pt";
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(config, &options.config));
  auto model = Model::Load(std::move(options));
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

TensorView View(const Model& model, absl::string_view name) {
  for (const TensorView& view : model.storage()) {
    if (view.name == name) return view;
  }
  ADD_FAILURE() << "no tensor " << name;
  return TensorView();
}

std::vector<double> Softmax(const float* z) {
  std::vector<double> p(z, z + kClasses);
  const double largest = *std::max_element(p.begin(), p.end());
  double sum = 0;
  for (double& x : p) sum += x = std::exp(x - largest);
  for (double& x : p) x /= sum;
  return p;
}

// A classifier of which of five random directions an input points along most, trained until it
// knows.
class TrainedModel {
 public:
  TrainedModel()
      : model_(Load(ExportForTest("m", "mlp", {"in_features=16", "hidden=64,64", "num_classes=5"}),
                    "inputs { name: 'x' shape: 16 } num_outputs: 5")),
        directions_(RandomFloats({kClasses, kInputs}, 7)) {
    constexpr int64_t kBatch = 64;
    for (int step = 0; step < 400; ++step) {
      const Tensor x = RandomFloats({kBatch, kInputs}, 100 + step);
      const auto logits = model_->Forward({x}, nullptr, 0);
      EXPECT_TRUE(logits.ok()) << logits.status();
      Tensor gradient = Tensor::Allocate(DT_FLOAT, {kBatch, kClasses});
      for (int64_t i = 0; i < kBatch; ++i) {
        const std::vector<double> p = Softmax(logits->values.As<float>().data() + i * kClasses);
        for (int64_t c = 0; c < kClasses; ++c) {
          gradient.As<float>()[i * kClasses + c] =
              static_cast<float>(p[c] - (c == Label(x, i) ? 1 : 0)) / kBatch;
        }
      }
      const auto apply = [this](int index, const float* g, std::shared_ptr<const void>) {
        updates_.emplace_back(index,
                              std::vector<float>(g, g + model_->storage()[index].elements()));
      };
      EXPECT_TRUE(model_->Backward(gradient, apply).ok());
      for (const auto& [index, g] : updates_) {
        auto* w = static_cast<float*>(model_->storage()[index].data);
        for (size_t i = 0; i < g.size(); ++i) w[i] -= 0.5f * g[i];
      }
      updates_.clear();
    }
  }

  Model* model() { return model_.get(); }
  int64_t Label(const Tensor& x, int64_t row) const {
    int64_t best = 0;
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t c = 0; c < kClasses; ++c) {
      float sum = 0;
      for (int64_t i = 0; i < kInputs; ++i) {
        sum += x.As<float>()[row * kInputs + i] * directions_.As<float>()[c * kInputs + i];
      }
      if (sum > most) {
        most = sum;
        best = c;
      }
    }
    return best;
  }

 private:
  const std::unique_ptr<Model> model_;
  const Tensor directions_;
  std::vector<std::pair<int, std::vector<float>>> updates_;
};

TEST(PrepareModelTest, RoundedWeightsSayNearlyTheSame) {
  TrainedModel trained;
  Model* const model = trained.model();
  constexpr int64_t kRows = 1000;
  const Tensor x = RandomFloats({kRows, kInputs}, 5);
  const Tensor exact = model->Predict({x}, nullptr)->values;
  int right = 0;
  for (int64_t i = 0; i < kRows; ++i) {
    const float* const z = exact.As<float>().data() + i * kClasses;
    right += std::max_element(z, z + kClasses) - z == trained.Label(x, i);
  }
  ASSERT_GT(right, kRows * 8 / 10) << "the net has not learned its task";

  std::vector<std::vector<float>> weights;
  for (const TensorView& view : model->storage()) {
    const auto* const w = static_cast<const float*>(view.data);
    weights.emplace_back(w, w + view.elements());
  }
  const std::pair<DataType, double> cases[] = {{DT_BFLOAT16, 1e-4}, {DT_INT8, 1e-3}};
  double last = 0;
  for (const auto& [precision, most] : cases) {
    RoundWeights(precision, model);
    const Tensor rounded = model->Predict({x}, nullptr)->values;
    double kl = 0;
    int same = 0;
    for (int64_t i = 0; i < kRows; ++i) {
      const float* const a = exact.As<float>().data() + i * kClasses;
      const float* const b = rounded.As<float>().data() + i * kClasses;
      const std::vector<double> p = Softmax(a), q = Softmax(b);
      for (int64_t c = 0; c < kClasses; ++c) kl += p[c] * std::log(p[c] / q[c]) / kRows;
      same += std::max_element(a, a + kClasses) - a == std::max_element(b, b + kClasses) - b;
    }
    EXPECT_GT(kl, last) << "nothing was rounded, or not more than before";
    EXPECT_LT(kl, most) << DataType_Name(precision);
    EXPECT_GE(same, kRows * 98 / 100) << DataType_Name(precision);
    last = kl;
    for (size_t t = 0; t < weights.size(); ++t) {
      auto* const w = static_cast<float*>(model->storage()[t].data);
      const bool kept = std::equal(weights[t].begin(), weights[t].end(), w);
      EXPECT_EQ(kept, model->tensors().tensors(static_cast<int>(t)).shape_size() < 2);
      std::copy(weights[t].begin(), weights[t].end(), w);
    }
  }
}

const char kWithBuffers[] = R"(
import torch
class M(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 2)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("count", torch.tensor([1, 2]))
    def forward(self, x):
        return self.fc(x) + torch.exp(self.mask)
def build(options):
    return M()
)";

TEST(PrepareModelTest, NamesWhatIsNotFinite) {
  const std::unique_ptr<Model> model =
      Load(ExportSourceForTest("m", kWithBuffers), "inputs { name: 'x' shape: 2 } num_outputs: 2");
  EXPECT_TRUE(CheckWeights(*model).ok()) << "infinities in buffers are masks";
  const float nan = std::numeric_limits<float>::quiet_NaN();
  auto* const mask = static_cast<float*>(View(*model, "mask").data);
  auto* const weight = static_cast<float*>(View(*model, "fc.weight").data);
  mask[1] = nan;
  EXPECT_THAT(std::string(CheckWeights(*model).message()),
              HasSubstr("tensor mask has a NaN at element 1"));
  mask[1] = 0;
  for (const float bad : {nan, -nan, std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    const float good = weight[3];
    weight[3] = bad;
    const absl::Status status = CheckWeights(*model);
    EXPECT_TRUE(absl::IsDataLoss(status));
    EXPECT_THAT(std::string(status.message()), HasSubstr("tensor fc.weight has a"));
    EXPECT_THAT(std::string(status.message()), HasSubstr("at element 3"));
    weight[3] = good;
  }
  weight[0] = std::numeric_limits<float>::max();
  weight[1] = std::numeric_limits<float>::denorm_min();
  EXPECT_TRUE(CheckWeights(*model).ok());
}

TEST(PrepareModelTest, WeightsThatNothingCanBeComputedWithAreRefused) {
  const std::string text = "inputs { name: 'x' shape: 2 } num_outputs: 2";
  ModelConfig config;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &config));
  const std::unique_ptr<Model> model = Load(ExportSourceForTest("m", kWithBuffers), text);
  EXPECT_TRUE(PrepareModel(config, DT_FLOAT, model.get()).ok());
  auto* const bias = static_cast<float*>(View(*model, "fc.bias").data);
  auto* const weight = static_cast<float*>(View(*model, "fc.weight").data);
  // Zeros times anything are fine.
  weight[0] = weight[1] = std::numeric_limits<float>::max();
  EXPECT_TRUE(PrepareModel(config, DT_FLOAT, model.get()).ok());
  bias[0] = weight[0];
  auto* const mask = static_cast<float*>(View(*model, "mask").data);
  mask[0] = 200;  // whose exponential is infinite
  const absl::Status status = PrepareModel(config, DT_FLOAT, model.get());
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("warming up: the logits"));
}

TEST(PrepareModelTest, WarmsUpWithStatesAndKeys) {
  ModelConfig config;
  const std::string text =
      "inputs { name: 'tokens' dtype: DT_INT64 shape: 3 } num_outputs: 7"
      " states { name: 'h' shape: 1 shape: -1 shape: 4 }"
      " states { name: 'c' shape: 1 shape: -1 shape: 4 }";
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &config));
  const std::unique_ptr<Model> model = Load(
      ExportForTest("m", "lstm_lm", {"vocabulary=7", "embedding=4", "hidden=4", "layers=1"}), text);
  EXPECT_TRUE(PrepareModel(config, DT_INT8, model.get()).ok());
}

}  // namespace
}  // namespace codistill
