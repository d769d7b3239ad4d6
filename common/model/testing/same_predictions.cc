#include "common/model/testing/same_predictions.h"

#include <atomic>
#include <cmath>
#include <thread>
#include <utility>
#include <vector>

#include "common/model/test_archive.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

TestedArchive Export(const std::string& module, const std::vector<std::string>& options,
                     const std::string& config) {
  TestedArchive archive;
  archive.folder = ExportForTest("m", module, options);
  archive.path = archive.folder + "/m.pt";
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(config, &archive.config));
  return archive;
}

void ExpectSameSequence(const Model& got, const Model& want, int64_t rows) {
  Model::States got_states, want_states;
  for (int64_t i = 0; i < 6; ++i) {
    std::vector<int64_t> tokens(rows * 4);
    for (size_t j = 0; j < tokens.size(); ++j) tokens[j] = (7 * j + 3 * i + rows) % 30;
    const Tensor input = Int64Tensor({rows, 4}, tokens);
    const auto x = got.Predict({input}, &got_states);
    const auto y = want.Predict({input}, &want_states);
    ASSERT_TRUE(x.ok()) << x.status();
    ASSERT_TRUE(y.ok()) << y.status();
    ExpectNear(x->values, y->values);
    ASSERT_EQ(got_states.size(), want_states.size());
    for (size_t s = 0; s < want_states.size(); ++s) ExpectNear(got_states[s], want_states[s]);
  }
}

}  // namespace

TestedArchive ResNetForTest() {
  return Export("resnet", {"depth=8", "num_classes=10"}, R"pb(
    inputs { name: "image" dtype: DT_FLOAT shape: 3 shape: 32 shape: 32 }
    num_outputs: 10
  )pb");
}

TestedArchive LstmForTest() {
  return Export("lstm_lm", {"vocabulary=30", "embedding=8", "hidden=16", "layers=2"}, R"pb(
    inputs { name: "tokens" dtype: DT_INT64 shape: 4 }
    states { name: "h" shape: 2 shape: -1 shape: 16 }
    states { name: "c" shape: 2 shape: -1 shape: 16 }
    num_outputs: 30
  )pb");
}

std::unique_ptr<Model> LoadForTest(const TestedArchive& archive, bool optimize_predict) {
  Model::Options options;
  options.archive = archive.path;
  options.config = archive.config;
  options.optimize_predict = optimize_predict;
  auto model = Model::Load(options);
  EXPECT_TRUE(model.ok()) << model.status();
  return model.ok() ? *std::move(model) : nullptr;
}

void ScaleWeights(const Model& model, float by) {
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

void ExpectSameOfImages(const Model& got, const Model& want, int64_t rows, uint64_t seed) {
  const Tensor images = RandomFloats({rows, 3, 32, 32}, seed);
  const auto x = got.Predict({images}, nullptr), y = want.Predict({images}, nullptr);
  ASSERT_TRUE(x.ok()) << x.status();
  ASSERT_TRUE(y.ok()) << y.status();
  ExpectNear(x->values, y->values);
}

void ExpectSameOfSequences(const Model& got, const Model& want) {
  std::atomic<int> compared{0};
  std::vector<std::thread> threads;
  for (int64_t rows = 1; rows <= 3; ++rows) {
    threads.emplace_back([&got, &want, &compared, rows] {
      ExpectSameSequence(got, want, rows);
      ++compared;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(compared, 3);
}

}  // namespace codistill
