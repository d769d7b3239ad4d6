#include "common/model/model_compiler.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/base/file.h"
#include "common/model/test_archive.h"
#include "common/model/testing/puppet_model.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::HasSubstr;

constexpr char kResNet[] = R"pb(
  inputs { name: "image" dtype: DT_FLOAT shape: 3 shape: 32 shape: 32 }
  num_outputs: 10
)pb";
constexpr char kLstm[] = R"pb(
  inputs { name: "tokens" dtype: DT_INT64 shape: 4 }
  states { name: "h" shape: 2 shape: -1 shape: 16 }
  states { name: "c" shape: 2 shape: -1 shape: 16 }
  num_outputs: 30
)pb";

ModelConfig Config(const std::string& text) {
  ModelConfig config;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &config));
  return config;
}

std::shared_ptr<Model> Load(const std::string& archive, const std::string& config) {
  Model::Options options;
  options.archive = archive;
  options.config = Config(config);
  options.optimize_predict = true;
  auto model = Model::Load(options);
  EXPECT_TRUE(model.ok()) << model.status();
  return model.ok() ? *std::move(model) : nullptr;
}

std::string ResNetArchive() {
  return ExportForTest("m", "resnet", {"depth=8", "num_classes=10"}) + "/m.pt";
}

void Scale(const Model& model, float by) {
  for (const TensorView& view : model.storage()) {
    if (view.dtype != DT_FLOAT) continue;
    auto* const values = static_cast<float*>(view.data);
    for (int64_t i = 0; i < view.elements(); ++i) values[i] *= by;
  }
}

void ExpectNear(const Tensor& got, const Tensor& want) {
  ASSERT_EQ(got.shape(), want.shape());
  for (int64_t i = 0; i < got.elements(); ++i) {
    const float x = got.As<float>()[i], y = want.As<float>()[i];
    ASSERT_NEAR(x, y, 1e-5 * (1 + std::abs(y))) << i;
  }
}

void ExpectSame(const Model& got, const Model& want, int64_t rows, uint64_t seed) {
  const Tensor images = RandomFloats({rows, 3, 32, 32}, seed);
  const auto x = got.Predict({images}, nullptr), y = want.Predict({images}, nullptr);
  ASSERT_TRUE(x.ok()) << x.status();
  ASSERT_TRUE(y.ok()) << y.status();
  ExpectNear(x->values, y->values);
}

TEST(CompileTest, SaysTheSameForEveryBatchSize) {
  const auto model = Load(ResNetArchive(), kResNet);
  const auto compiled = Model::Compile(model);
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  EXPECT_NE(compiled->get(), model.get());
  EXPECT_EQ((*compiled)->tensors().tensors_size(), model->tensors().tensors_size());
  EXPECT_EQ((*compiled)->storage()[0].data, model->storage()[0].data);
  int seed = 0;
  for (const int64_t rows : {1, 1, 1, 7, 64, 1, 3}) ExpectSame(**compiled, *model, rows, ++seed);
}

// What is compiled in is what the weights were then, not what stands in the archive, and it does
// not need the archive any more.
TEST(CompileTest, HasTheWeightsOfItsVersion) {
  const std::string path = ResNetArchive();
  const auto first = Load(path, kResNet), second = Load(path, kResNet);
  Scale(*second, 1.5f);
  const auto compiled_first = Model::Compile(first), compiled_second = Model::Compile(second);
  ASSERT_TRUE(compiled_first.ok() && compiled_second.ok());
  for (const uint64_t seed : {1, 2, 3}) {
    ExpectSame(**compiled_first, *first, 2, seed);
    ExpectSame(**compiled_second, *second, 2, seed);
  }
}

TEST(CompileTest, KeepsTheModelAsLongAsItLives) {
  const auto model = Load(ResNetArchive(), kResNet);
  std::atomic<bool> returned{false};
  std::shared_ptr<const Model> lent(model.get(), [&](const Model*) { returned = true; });
  auto compiled = Model::Compile(std::move(lent));
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  EXPECT_FALSE(returned);
  ExpectSame(**compiled, *model, 2, 1);
  compiled = absl::CancelledError("");
  EXPECT_TRUE(returned);
}

TEST(CompileTest, CarriesStatesAndTakesSeveralThreads) {
  const auto model = Load(
      ExportForTest("m", "lstm_lm", {"vocabulary=30", "embedding=8", "hidden=16", "layers=2"}) +
          "/m.pt",
      kLstm);
  const auto compiled = Model::Compile(model);
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  std::atomic<int> compared{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      Model::States want_states, got_states;
      for (int64_t i = 0; i < 6; ++i) {
        const int64_t rows = 1 + t;
        std::vector<int64_t> tokens(rows * 4);
        for (size_t j = 0; j < tokens.size(); ++j) tokens[j] = (7 * j + 3 * i + t) % 30;
        const Tensor input = Int64Tensor({rows, 4}, tokens);
        const auto want = model->Predict({input}, &want_states);
        const auto got = (*compiled)->Predict({input}, &got_states);
        ASSERT_TRUE(want.ok()) << want.status();
        ASSERT_TRUE(got.ok()) << got.status();
        ExpectNear(got->values, want->values);
        for (size_t s = 0; s < 2; ++s) ExpectNear(got_states[s], want_states[s]);
        ++compared;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(compared, 18);
}

TEST(CompileTest, BadInputIsToldAsByTheModel) {
  const auto model = Load(ResNetArchive(), kResNet);
  const auto compiled = Model::Compile(model);
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  const Tensor images = RandomFloats({2, 3, 32, 31}, 1);
  const auto got = (*compiled)->Predict({images}, nullptr);
  EXPECT_EQ(got.status(), model->Predict({images}, nullptr).status());
  EXPECT_TRUE(absl::IsInvalidArgument(got.status())) << got.status();
}

TEST(CompileTest, NotAnotherArchive) {
  const std::string path = ResNetArchive();
  const auto model = Load(path, kResNet);
  const std::string other =
      ExportForTest("other", "resnet", {"depth=14", "num_classes=10"}) + "/other.pt";
  const auto bytes = ReadFile(other, 1 << 24);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  ASSERT_TRUE(WriteFileAtomically(path, *bytes).ok());
  const auto compiled = Model::Compile(model);
  EXPECT_TRUE(absl::IsFailedPrecondition(compiled.status())) << compiled.status();
  EXPECT_THAT(std::string(compiled.status().message()),
              testing::AllOf(HasSubstr(path), HasSubstr("not those it had when it was loaded")));
  // And then it goes on as it is.
  ModelCompiler compiler(Config(kResNet), "resnet");
  EXPECT_EQ(compiler.Compile(model), model);
}

TEST(CompileTest, OnlyArchives) {
  const auto puppet = std::make_shared<PuppetModel>(
      [](absl::Span<const Tensor>, Model::States*) -> absl::StatusOr<Model::Logits> {
        return absl::InternalError("not asked for");
      });
  EXPECT_TRUE(absl::IsUnimplemented(Model::Compile(puppet).status()));
  ModelCompiler compiler(Config(kResNet), "puppet");
  EXPECT_EQ(compiler.Compile(puppet), puppet);
}

TEST(ModelCompilerTest, EveryVersionSaysWhatItsModelSays) {
  const std::string path = ResNetArchive();
  ModelCompiler compiler(Config(kResNet), "resnet");
  float scale = 1;
  for (uint64_t version = 1; version <= 4; ++version, scale *= 1.1f) {
    const auto model = Load(path, kResNet);
    Scale(*model, scale);
    const std::shared_ptr<const Model> served = compiler.Compile(model);
    ASSERT_NE(served, nullptr);
    ExpectSame(*served, *model, 1, version);
    ExpectSame(*served, *model, 5, version);
  }
}

}  // namespace
}  // namespace codistill
