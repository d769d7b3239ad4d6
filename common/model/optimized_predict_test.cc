// Model::Options::optimize_predict: passes with the JIT's graph optimisation say what passes
// without it say, whatever came before.

#include <atomic>
#include <cmath>
#include <thread>

#include "common/model/model.h"
#include "common/model/test_archive.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr char kResNet[] = R"(
  inputs { name: "image" dtype: DT_FLOAT shape: 3 shape: 32 shape: 32 } num_outputs: 10)";
constexpr char kLstm[] = R"(
  inputs { name: "tokens" dtype: DT_INT64 shape: 4 }
  states { name: "h" shape: 2 shape: -1 shape: 16 } states { name: "c" shape: 2 shape: -1 shape: 16 }
  num_outputs: 30)";

std::unique_ptr<Model> Load(const std::string& folder, const std::string& config, bool optimize) {
  Model::Options options;
  options.archive = folder + "/m.pt";
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(config, &options.config));
  options.optimize_predict = optimize;
  auto model = Model::Load(options);
  EXPECT_TRUE(model.ok()) << model.status();
  return model.ok() ? *std::move(model) : nullptr;
}

void ExpectNear(const Tensor& got, const Tensor& want) {
  ASSERT_EQ(got.shape(), want.shape());
  for (int64_t i = 0; i < got.elements(); ++i) {
    const float x = got.As<float>()[i], y = want.As<float>()[i];
    ASSERT_NEAR(x, y, 1e-5 * (1 + std::abs(y))) << i;
  }
}

TEST(OptimizedPredictTest, GivesTheSameForEveryBatchSizeAndAfterTraining) {
  const std::string folder = ExportForTest("m", "resnet", {"depth=8", "num_classes=10"});
  const auto plain = Load(folder, kResNet, false), optimized = Load(folder, kResNet, true);
  ASSERT_TRUE(plain != nullptr && optimized != nullptr);
  int seed = 0;
  for (const int64_t rows : {1, 1, 1, 7, 64, 1, 3}) {
    const Tensor images = RandomFloats({rows, 3, 32, 32}, ++seed);
    const auto want = plain->Predict({images}, nullptr);
    const auto got = optimized->Predict({images}, nullptr);
    ASSERT_TRUE(want.ok()) << want.status();
    ASSERT_TRUE(got.ok()) << got.status();
    ExpectNear(got->values, want->values);
    if (seed != 4) continue;
    // Training in between sets the running statistics of both, and does not disturb the rest.
    for (Model* model : {plain.get(), optimized.get()}) {
      const auto logits = model->Forward({images}, nullptr, 1);
      ASSERT_TRUE(logits.ok()) << logits.status();
      int gradients = 0;
      ASSERT_TRUE(model
                      ->Backward(logits->values, [&](int, const float*,
                                                     std::shared_ptr<const void>) { ++gradients; })
                      .ok());
      EXPECT_GT(gradients, 10);
    }
  }
}

// Weights change in place between versions; nothing of them may have been compiled in.
TEST(OptimizedPredictTest, SeesWeightsThatAreWritten) {
  const std::string folder = ExportForTest("m", "resnet", {"depth=8", "num_classes=10"});
  const auto plain = Load(folder, kResNet, false), optimized = Load(folder, kResNet, true);
  ASSERT_TRUE(plain != nullptr && optimized != nullptr);
  const Tensor images = RandomFloats({2, 3, 32, 32}, 5);
  for (int round = 1; round <= 4; ++round) {
    for (Model* model : {plain.get(), optimized.get()}) {
      for (const TensorView& view : model->storage()) {
        if (view.dtype != DT_FLOAT) continue;
        auto* const values = static_cast<float*>(view.data);
        for (int64_t i = 0; i < view.elements(); ++i) values[i] *= 1.1f;
      }
    }
    const auto want = plain->Predict({images}, nullptr);
    const auto got = optimized->Predict({images}, nullptr);
    ASSERT_TRUE(want.ok() && got.ok());
    ExpectNear(got->values, want->values);
  }
}

TEST(OptimizedPredictTest, CarriesStatesAndTakesSeveralThreads) {
  const std::string folder =
      ExportForTest("m", "lstm_lm", {"vocabulary=30", "embedding=8", "hidden=16", "layers=2"});
  const auto plain = Load(folder, kLstm, false), optimized = Load(folder, kLstm, true);
  ASSERT_TRUE(plain != nullptr && optimized != nullptr);
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
        const auto want = plain->Predict({input}, &want_states);
        const auto got = optimized->Predict({input}, &got_states);
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

}  // namespace
}  // namespace codistill
