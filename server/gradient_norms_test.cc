#include "server/gradient_norms.h"

#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(GradientNorms, AreAskedForWhereTheyAreUsed) {
  OptimizerConfig config;
  EXPECT_FALSE(NeedsNorms(config));
  config.set_clip_norm(1);
  EXPECT_TRUE(NeedsNorms(config));
  EXPECT_FALSE(NeedsTensorNorms(config));
  config.set_clip_norm(0);
  config.set_kind(OptimizerConfig::LARS);
  EXPECT_TRUE(NeedsNorms(config));
  EXPECT_TRUE(NeedsTensorNorms(config));
}

TEST(GradientNorms, AddUpOverShards) {
  std::vector<PrepareReply> shards(2);
  const auto add = [](PrepareReply* shard, uint32_t tensor, double gradient, double weight) {
    TensorNorm* norm = shard->add_norms();
    norm->set_tensor(tensor);
    norm->set_gradient_squared(gradient);
    norm->set_weight_squared(weight);
  };
  add(&shards[0], 0, 4, 1);
  add(&shards[0], 2, 1, 2);
  add(&shards[1], 2, 8, 3);
  add(&shards[1], 5, 12, 0);
  const std::vector<TensorNorm> norms = SumOverShards(shards);
  ASSERT_EQ(norms.size(), 3u);
  EXPECT_EQ(norms[1].tensor(), 2u);
  EXPECT_EQ(norms[1].gradient_squared(), 9);
  EXPECT_EQ(norms[1].weight_squared(), 5);
  EXPECT_EQ(GlobalNorm(norms), 5);
  EXPECT_EQ(GlobalNorm({}), 0);
}

TEST(GradientNorms, ClipScaleIsThatOfTorch) {
  OptimizerConfig config;
  EXPECT_EQ(ClipScale(config, 1e30), 1);
  config.set_clip_norm(2);
  EXPECT_EQ(ClipScale(config, 1.5), 1);
  EXPECT_EQ(ClipScale(config, 0), 1);
  EXPECT_DOUBLE_EQ(ClipScale(config, 8), 2 / (8 + 1e-6));
}

}  // namespace
}  // namespace codistill
