#include "common/model/model_compiler.h"

#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "common/base/file.h"
#include "common/model/test_archive.h"
#include "common/model/testing/puppet_model.h"
#include "common/model/testing/same_predictions.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::HasSubstr;

TEST(CompileTest, SaysTheSameForEveryBatchSize) {
  const std::shared_ptr<const Model> model = LoadForTest(ResNetForTest(), true);
  const auto compiled = Model::Compile(model);
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  EXPECT_NE(compiled->get(), model.get());
  EXPECT_EQ((*compiled)->tensors().tensors_size(), model->tensors().tensors_size());
  EXPECT_EQ((*compiled)->storage()[0].data, model->storage()[0].data);
  int seed = 0;
  for (const int64_t rows : {1, 1, 1, 7, 64, 1, 3})
    ExpectSameOfImages(**compiled, *model, rows, ++seed);
}

// What is compiled in is what the weights were then, not what stands in the archive.
TEST(CompileTest, HasTheWeightsOfItsVersion) {
  const TestedArchive archive = ResNetForTest();
  const std::shared_ptr<const Model> first = LoadForTest(archive, true);
  const std::shared_ptr<const Model> second = LoadForTest(archive, true);
  ScaleWeights(*second, 1.5f);
  const auto compiled_first = Model::Compile(first), compiled_second = Model::Compile(second);
  ASSERT_TRUE(compiled_first.ok() && compiled_second.ok());
  for (const uint64_t seed : {1, 2, 3}) {
    ExpectSameOfImages(**compiled_first, *first, 2, seed);
    ExpectSameOfImages(**compiled_second, *second, 2, seed);
  }
}

TEST(CompileTest, KeepsTheModelAsLongAsItLives) {
  const std::shared_ptr<const Model> model = LoadForTest(ResNetForTest(), true);
  std::atomic<bool> returned{false};
  std::shared_ptr<const Model> lent(model.get(), [&](const Model*) { returned = true; });
  auto compiled = Model::Compile(std::move(lent));
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  EXPECT_FALSE(returned);
  ExpectSameOfImages(**compiled, *model, 2, 1);
  compiled = absl::CancelledError("");
  EXPECT_TRUE(returned);
}

TEST(CompileTest, CarriesStatesAndTakesSeveralThreads) {
  const std::shared_ptr<const Model> model = LoadForTest(LstmForTest(), true);
  const auto compiled = Model::Compile(model);
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  ExpectSameOfSequences(**compiled, *model);
}

TEST(CompileTest, BadInputIsToldAsByTheModel) {
  const std::shared_ptr<const Model> model = LoadForTest(ResNetForTest(), true);
  const auto compiled = Model::Compile(model);
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  const Tensor images = RandomFloats({2, 3, 32, 31}, 1);
  const auto got = (*compiled)->Predict({images}, nullptr);
  EXPECT_EQ(got.status(), model->Predict({images}, nullptr).status());
  EXPECT_TRUE(absl::IsInvalidArgument(got.status())) << got.status();
}

TEST(CompileTest, NotAnotherArchive) {
  const TestedArchive archive = ResNetForTest();
  const std::shared_ptr<const Model> model = LoadForTest(archive, true);
  const std::string other =
      ExportForTest("other", "resnet", {"depth=14", "num_classes=10"}) + "/other.pt";
  const auto bytes = ReadFile(other, 1 << 24);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  ASSERT_TRUE(WriteFileAtomically(archive.path, *bytes).ok());
  const auto compiled = Model::Compile(model);
  EXPECT_TRUE(absl::IsFailedPrecondition(compiled.status())) << compiled.status();
  EXPECT_THAT(
      std::string(compiled.status().message()),
      testing::AllOf(HasSubstr(archive.path), HasSubstr("not those it had when it was loaded")));
  // And then it goes on as it is.
  ModelCompiler compiler(archive.config, "resnet");
  EXPECT_EQ(compiler.Compile(model), model);
}

TEST(CompileTest, OnlyArchives) {
  const auto puppet = std::make_shared<PuppetModel>(
      [](absl::Span<const Tensor>, Model::States*) -> absl::StatusOr<Model::Logits> {
        return absl::InternalError("not asked for");
      });
  EXPECT_TRUE(absl::IsUnimplemented(Model::Compile(puppet).status()));
  ModelCompiler compiler(ModelConfig(), "puppet");
  EXPECT_EQ(compiler.Compile(puppet), puppet);
}

TEST(ModelCompilerTest, EveryVersionSaysWhatItsModelSays) {
  const TestedArchive archive = ResNetForTest();
  ModelCompiler compiler(archive.config, "resnet");
  float scale = 1;
  for (uint64_t version = 1; version <= 4; ++version, scale *= 1.1f) {
    const std::shared_ptr<const Model> model = LoadForTest(archive, true);
    ScaleWeights(*model, scale);
    const std::shared_ptr<const Model> served = compiler.Compile(model);
    ASSERT_NE(served, nullptr);
    ExpectSameOfImages(*served, *model, 1, version);
    ExpectSameOfImages(*served, *model, 5, version);
  }
}

}  // namespace
}  // namespace codistill
