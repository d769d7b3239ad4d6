#include "common/model/row_batch.h"

#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::SizeIs;

ModelConfig Config() {
  ModelConfig config;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
      R"pb(
        inputs { name: "x" shape: 1 }
        inputs { name: "rows" field: "f" dtype: DT_INT64 shape: 2 embedding_table: "t" }
        inputs { name: "wide" field: "f" dtype: DT_INT64 shape: 2 embedding_table: "w" }
        inputs { name: "words" dtype: DT_INT64 shape: 3 embedding_table: "t" shared_keys: true }
        embedding_tables { name: "t" dim: 2 }
        embedding_tables { name: "w" dim: 1 }
        embedding_tables { name: "idle" dim: 1 }
      )pb",
      &config));
  return config;
}

Tensor Int64(std::vector<int64_t> shape, const std::vector<int64_t>& values) {
  Tensor tensor = Tensor::Allocate(DT_INT64, std::move(shape));
  std::copy(values.begin(), values.end(), tensor.As<int64_t>().begin());
  return tensor;
}

std::vector<Tensor> Inputs() {
  return {Tensor::Zeros(DT_FLOAT, {2, 1}), Int64({2, 2}, {7, 7, 7, -1}),
          Int64({2, 2}, {7, 7, 7, -1}), Int64({2, 3}, {7, 7, -1, 9, 7, -1})};
}

TEST(RowBatch, NamesEachKeyOnceInOrderOfAppearance) {
  const ModelConfig config = Config();
  const std::vector<RowBatch> batches = FindRows(config, Inputs());
  ASSERT_THAT(batches, SizeIs(2));
  const uint64_t a = RowKey(config.inputs(1), 7, 0);
  const uint64_t b = RowKey(config.inputs(1), 7, 1);
  const uint64_t c = RowKey(config.inputs(1), -1, 1);
  EXPECT_EQ((std::set<uint64_t>{a, b, c, 7}.size()), 4u);
  EXPECT_EQ(batches[0].table, 0);
  EXPECT_EQ(batches[0].dim, 2);
  EXPECT_THAT(batches[0].keys, ElementsAre(a, b, c, 7, ~uint64_t{0}, 9));
  ASSERT_THAT(batches[0].uses, SizeIs(2));
  EXPECT_EQ(batches[0].uses[0].input, 1);
  EXPECT_THAT(batches[0].uses[0].index, ElementsAre(0, 1, 0, 2));
  EXPECT_EQ(batches[0].uses[1].input, 3);
  EXPECT_THAT(batches[0].uses[1].index, ElementsAre(3, 3, 4, 5, 3, 4));
  // The same field, the same keys, in whichever table.
  EXPECT_EQ(batches[1].table, 1);
  EXPECT_THAT(batches[1].keys, ElementsAre(a, b, c));
}

TEST(RowBatch, GathersRowsForEveryPlace) {
  const ModelConfig config = Config();
  const std::vector<Tensor> inputs = Inputs();
  const std::vector<RowBatch> batches = FindRows(config, inputs);
  const std::vector<float> t = {0, 1, 10, 11, 20, 21, 30, 31, 40, 41, 50, 51};
  const std::vector<float> w = {5, 6, 7};
  const std::vector<Tensor> forward = GatherRows(inputs, batches, {t.data(), w.data()});
  ASSERT_THAT(forward, SizeIs(4));
  EXPECT_EQ(forward[0].data(), inputs[0].data());
  EXPECT_THAT(forward[1].shape(), ElementsAre(2, 2, 2));
  EXPECT_THAT(forward[1].As<float>(), ElementsAre(0, 1, 10, 11, 0, 1, 20, 21));
  EXPECT_THAT(forward[2].shape(), ElementsAre(2, 2, 1));
  EXPECT_THAT(forward[2].As<float>(), ElementsAre(5, 6, 5, 7));
  EXPECT_THAT(forward[3].As<float>(), ElementsAre(30, 31, 30, 31, 40, 41, 50, 51, 30, 31, 40, 41));
}

TEST(RowBatch, SumsTheGradientsOfEveryPlace) {
  const ModelConfig config = Config();
  const std::vector<RowBatch> batches = FindRows(config, Inputs());
  std::vector<Tensor> gradients(4);
  gradients[1] = Tensor::Allocate(DT_FLOAT, {2, 2, 2});
  gradients[3] = Tensor::Allocate(DT_FLOAT, {2, 3, 2});
  float next = 1;
  for (const int i : {1, 3}) {
    for (float& value : gradients[i].As<float>()) value = next++;
  }
  const Tensor sums = ScatterGradients(batches[0], gradients);
  EXPECT_THAT(sums.shape(), ElementsAre(6, 2));
  EXPECT_THAT(sums.As<float>(), ElementsAre(1 + 5, 2 + 6, 3, 4, 7, 8, 9 + 11 + 17, 10 + 12 + 18,
                                            13 + 19, 14 + 20, 15, 16));
}

}  // namespace
}  // namespace codistill
