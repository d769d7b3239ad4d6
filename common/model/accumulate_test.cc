// Gradients of a batch that is computed in parts.

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/model/model.h"
#include "common/model/test_archive.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::Each;
using testing::ElementsAre;
using testing::SizeIs;

// A bias whose gradient is the very memory of the caller; two parameters whose gradients share
// theirs; one that is used for positive inputs only; and an embedding with sparse gradients.
constexpr char kSource[] = R"(
import torch
from torch import nn

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 4))
        self.flat = nn.Parameter(torch.zeros(4))
        self.square = nn.Parameter(torch.zeros(2, 2))
        self.seldom = nn.Parameter(torch.zeros(4))
        self.table = nn.Embedding(3, 4, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.bias + (self.square.view(-1) + self.flat)
        y = y + self.table(torch.zeros([1], dtype=torch.long))
        if bool((x > 0).all()):
            y = y + self.seldom
        return y

def build(options):
    return Shared()
)";

std::unique_ptr<Model> Load() {
  static const std::string folder = ExportSourceForTest("m", kSource);
  Model::Options options;
  options.archive = folder + "/m.pt";
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
      "inputs { name: 'x' shape: 4 } num_outputs: 4", &options.config));
  auto model = Model::Load(options);
  if (!model.ok()) ADD_FAILURE() << model.status();
  return model.ok() ? *std::move(model) : nullptr;
}

using Gradients = std::map<std::string, std::vector<float>>;

void Backward(Model* model, const Tensor& gradient, Gradients* out) {
  const absl::Status status =
      model->Backward(gradient, [&](int index, const float* data, std::shared_ptr<const void>) {
        const TensorSpec& spec = model->tensors().tensors(index);
        const std::vector<int64_t> shape(spec.shape().begin(), spec.shape().end());
        const bool first =
            out->emplace(spec.name(), std::vector<float>(data, data + ElementCount(shape))).second;
        EXPECT_TRUE(first) << spec.name() << " came twice";
      });
  EXPECT_TRUE(status.ok()) << status;
}

TEST(AccumulateTest, AddsUpWhateverTheGradientsShare) {
  const auto model = Load();
  ASSERT_NE(model, nullptr);
  const Tensor positive = FloatTensor({1, 4}, {1, 1, 1, 1});
  const Tensor negative = FloatTensor({1, 4}, {-1, -1, -1, -1});
  for (int round = 0; round < 2; ++round) {  // nothing is left behind
    Tensor gradient = FloatTensor({1, 4}, {1, 2, 3, 4});
    ASSERT_TRUE(model->Forward({positive}, nullptr, 1).ok());
    ASSERT_TRUE(model->Accumulate(gradient).ok());
    // The caller goes on with its own memory.
    for (float& value : gradient.As<float>()) value *= 10;
    ASSERT_TRUE(model->Forward({negative}, nullptr, 1).ok());
    ASSERT_TRUE(model->Accumulate(gradient).ok());
    for (float& value : gradient.As<float>()) value *= 10;
    ASSERT_TRUE(model->Forward({negative}, nullptr, 1).ok());
    Gradients gradients;
    Backward(model.get(), gradient, &gradients);
    std::memset(gradient.data(), 0, gradient.bytes());
    ASSERT_THAT(gradients, SizeIs(5));
    for (const char* name : {"bias", "flat", "square"}) {
      EXPECT_THAT(gradients[name], ElementsAre(111, 222, 333, 444)) << name;
    }
    EXPECT_THAT(gradients["seldom"], ElementsAre(1, 2, 3, 4));
    EXPECT_THAT(gradients["table.weight"], ElementsAre(111, 222, 333, 444, 0, 0, 0, 0, 0, 0, 0, 0));
  }
}

TEST(AccumulateTest, ForgetsWhatHasComeToNothing) {
  const auto model = Load();
  ASSERT_NE(model, nullptr);
  const Tensor x = FloatTensor({1, 4}, {1, 1, 1, 1}), gradient = FloatTensor({1, 4}, {1, 2, 3, 4});
  ASSERT_TRUE(model->Forward({x}, nullptr, 1).ok());
  ASSERT_TRUE(model->Accumulate(gradient).ok());
  model->ForgetGradients();
  ASSERT_TRUE(model->Forward({x}, nullptr, 1).ok());
  Gradients gradients;
  Backward(model.get(), gradient, &gradients);
  for (const char* name : {"bias", "flat", "square", "seldom"}) {
    EXPECT_THAT(gradients[name], ElementsAre(1, 2, 3, 4)) << name;
  }
}

TEST(AccumulateTest, NeedsAForwardPassOfItsOwn) {
  const auto model = Load();
  ASSERT_NE(model, nullptr);
  const Tensor gradient = Tensor::Zeros(DT_FLOAT, {1, 4});
  EXPECT_TRUE(absl::IsFailedPrecondition(model->Accumulate(gradient)));
  ASSERT_TRUE(model->Forward({FloatTensor({1, 4}, {1, 1, 1, 1})}, nullptr, 1).ok());
  EXPECT_TRUE(model->Accumulate(gradient).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(model->Accumulate(gradient)));
  Gradients none;
  ASSERT_TRUE(model->Forward({FloatTensor({1, 4}, {1, 1, 1, 1})}, nullptr, 1).ok());
  Backward(model.get(), gradient, &none);
  for (const auto& [name, values] : none) EXPECT_THAT(values, Each(0.0f)) << name;
}

}  // namespace
}  // namespace codistill
