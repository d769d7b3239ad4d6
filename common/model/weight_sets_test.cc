// Two sets of weights in one model: whoever uses one sees nothing of the other.

#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/model/model.h"
#include "common/model/test_archive.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::HasSubstr;

// A matrix under two names, a batch norm's buffers, a buffer that forward() assigns to, a frozen
// parameter.
constexpr char kSource[] = R"(
import torch
from torch import nn

class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen = self.seen + x.sum(0)
        return self.b(torch.tanh(self.norm(self.a(x)))) * self.frozen + self.seen

def build(options):
    return Everything()
)";

absl::StatusOr<std::unique_ptr<Model>> Load(const std::string& folder, int weight_sets) {
  Model::Options options;
  options.archive = folder + "/m.pt";
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
      "inputs { name: 'x' shape: 3 } num_outputs: 3", &options.config));
  options.weight_sets = weight_sets;
  return Model::Load(options);
}

// Other values for everything, which depend on `seed`.
void Fill(const Model& model, absl::Span<const TensorView> storage, uint64_t seed) {
  for (int i = 0; i < model.tensors().tensors_size(); ++i) {
    const TensorView& view = storage[i];
    if (model.tensors().tensors(i).role() == TensorSpec::TIED || view.dtype != DT_FLOAT) continue;
    const Tensor values = RandomFloats(view.shape, seed + static_cast<uint64_t>(i));
    auto* const to = static_cast<float*>(view.data);
    for (int64_t j = 0; j < values.elements(); ++j) {
      to[j] = 1 + 0.5f * values.As<float>()[j];  // variances are positive
    }
  }
}

std::string Bytes(absl::Span<const TensorView> storage) {
  std::string bytes;
  for (const TensorView& view : storage) {
    bytes.append(static_cast<const char*>(view.data), view.bytes());
  }
  return bytes;
}

// Logits, gradients by tensor and the weights and buffers after one step of training.
std::string Pass(Model* model, uint64_t seed) {
  const Tensor x = RandomFloats({4, 3}, seed);
  const auto logits = model->Forward({x}, nullptr, 1);
  EXPECT_TRUE(logits.ok()) << logits.status();
  std::string out(static_cast<const char*>(logits->values.data()), logits->values.bytes());
  std::vector<std::string> gradients(model->tensors().tensors_size());
  EXPECT_TRUE(model
                  ->Backward(RandomFloats({4, 3}, seed + 1),
                             [&](int index, const float* data, std::shared_ptr<const void>) {
                               EXPECT_EQ(gradients[index], "");
                               gradients[index].assign(reinterpret_cast<const char*>(data),
                                                       model->storage()[index].bytes());
                             })
                  .ok());
  for (const std::string& gradient : gradients) out += gradient;
  return out + Bytes(model->storage());
}

TEST(WeightSetsTest, EachSetComputesAsAModelOfItsOwn) {
  const std::string folder = ExportSourceForTest("m", kSource);
  auto both = Load(folder, 2);
  ASSERT_TRUE(both.ok()) << both.status();
  std::unique_ptr<Model> single[2] = {*Load(folder, 1), *Load(folder, 1)};
  ASSERT_EQ((*both)->weight_sets(), 2);
  EXPECT_EQ(single[0]->weight_sets(), 1);
  // They begin alike.
  EXPECT_EQ(Bytes((*both)->storage(0)), Bytes((*both)->storage(1)));
  EXPECT_EQ((*both)->storage().data(), (*both)->storage(0).data());

  uint64_t seed = 0;
  for (const int set : {0, 1, 1, 0, 1, 0, 0}) {
    SCOPED_TRACE(++seed);
    Fill(**both, (*both)->storage(set), 100 * seed);
    Fill(*single[set], single[set]->storage(), 100 * seed);
    ASSERT_TRUE((*both)->UseWeights(set).ok());
    EXPECT_EQ(Bytes((*both)->storage()), Bytes((*both)->storage(set)));
    const std::string other = Bytes((*both)->storage(1 - set));
    EXPECT_EQ(Pass(both->get(), seed), Pass(single[set].get(), seed));
    EXPECT_EQ(Bytes((*both)->storage(1 - set)), other);
    const auto said = (*both)->Predict({RandomFloats({2, 3}, seed)}, nullptr);
    const auto want = single[set]->Predict({RandomFloats({2, 3}, seed)}, nullptr);
    ASSERT_TRUE(said.ok() && want.ok());
    EXPECT_EQ(std::memcmp(said->values.data(), want->values.data(), want->values.bytes()), 0);
  }
}

TEST(WeightSetsTest, TheOtherSetMayBeWrittenDuringAPass) {
  const std::string folder =
      ExportForTest("m", "mlp", {"in_features=3", "hidden=512,512", "num_classes=3"});
  auto both = Load(folder, 2);
  auto alone = Load(folder, 1);
  ASSERT_TRUE(both.ok() && alone.ok());
  for (int round = 0; round < 4; ++round) {
    const int set = round % 2;
    Fill(**both, (*both)->storage(set), 7 * round);
    Fill(**alone, (*alone)->storage(), 7 * round);
    ASSERT_TRUE((*both)->UseWeights(set).ok());
    std::thread writer([&] {
      for (int i = 0; i < 20; ++i) Fill(**both, (*both)->storage(1 - set), i);
    });
    const std::string got = Pass(both->get(), round);
    writer.join();
    EXPECT_EQ(got, Pass(alone->get(), round));
  }
}

TEST(WeightSetsTest, SetsThatAreNotThere) {
  const std::string folder = ExportSourceForTest("m", kSource);
  EXPECT_THAT(std::string(Load(folder, 3).status().message()), HasSubstr("weight_sets is 3"));
  auto model = Load(folder, 1);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE((*model)->UseWeights(0).ok());
  EXPECT_THAT(std::string((*model)->UseWeights(1).message()), HasSubstr("no set 1"));
  EXPECT_FALSE((*model)->UseWeights(-1).ok());
}

}  // namespace
}  // namespace codistill
