#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/leader.h"
#include "server/leader_harness.h"

// The round of norms before a commit.
namespace codistill {
namespace {

using ::testing::HasSubstr;

void SetNorm(PuppetShard* shard, double gradient_squared, double weight_squared) {
  PrepareReply reply;
  TensorNorm* norm = reply.add_norms();
  norm->set_tensor(0);
  norm->set_gradient_squared(gradient_squared);
  norm->set_weight_squared(weight_squared);
  shard->prepared = reply;
}

TEST_F(LeaderTest, NobodyIsAskedForNormsThatAreNotUsed) {
  Start();
  EndAll(1);
  EXPECT_EQ(StepNow(), 1);
  EXPECT_TRUE(shards_[0]->prepares.empty());
  EXPECT_EQ(shards_[0]->commits.back().clip_scale(), 1);
}

TEST_F(LeaderTest, ClipsByTheNormOfAllShards) {
  job_.mutable_training()->mutable_optimizer()->set_clip_norm(1);
  Start();
  SetNorm(shards_[0].get(), 9, 0);
  SetNorm(shards_[1].get(), 16, 0);
  EndAll(1);
  EXPECT_EQ(StepNow(), 1);
  for (const auto& shard : shards_) {
    ASSERT_EQ(shard->prepares.size(), 1u);
    EXPECT_EQ(shard->prepares[0].step(), 1);
    EXPECT_EQ(shard->prepares[0].contributors_size(), 2);
    EXPECT_FALSE(shard->prepares[0].weights());
    EXPECT_DOUBLE_EQ(shard->commits.back().clip_scale(), 1 / (5 + 1e-6));
    EXPECT_EQ(shard->commits.back().norms_size(), 0);
  }
  SetNorm(shards_[0].get(), 0.25, 0);
  SetNorm(shards_[1].get(), 0, 0);
  EndAll(2);
  EXPECT_EQ(shards_[0]->commits.back().clip_scale(), 1);
}

TEST_F(LeaderTest, LarsBringsTheNormsOfWholeTensors) {
  job_.mutable_training()->mutable_optimizer()->set_kind(OptimizerConfig::LARS);
  Start();
  SetNorm(shards_[0].get(), 9, 1);
  SetNorm(shards_[1].get(), 16, 2);
  EndAll(1);
  EXPECT_TRUE(shards_[0]->prepares[0].weights());
  ASSERT_EQ(shards_[1]->commits.back().norms_size(), 1);
  EXPECT_EQ(shards_[1]->commits.back().norms(0).gradient_squared(), 25);
  EXPECT_EQ(shards_[1]->commits.back().norms(0).weight_squared(), 3);
  EXPECT_EQ(shards_[1]->commits.back().clip_scale(), 1);
}

TEST_F(LeaderTest, ARejectedStepNeedsNoNorms) {
  job_.mutable_training()->mutable_optimizer()->set_clip_norm(1);
  Start();
  for (int rank = 0; rank < 2; ++rank) {
    for (int shard = 0; shard < kShards; ++shard) MustEnd(rank, shard, 1, /*finite=*/false);
  }
  EXPECT_EQ(StepNow(), 1);
  EXPECT_TRUE(shards_[0]->prepares.empty());
}

TEST_F(LeaderTest, ASlowShardIsAskedAgain) {
  job_.mutable_training()->mutable_optimizer()->set_clip_norm(1);
  Start();
  SetNorm(shards_[0].get(), 9, 0);
  shards_[1]->prepared = absl::UnavailableError("connection reset");
  EndAll(1);
  EXPECT_EQ(StepNow(), 0);
  EXPECT_TRUE(shards_[0]->commits.empty());
  Pass(absl::Seconds(1));
  EXPECT_EQ(shards_[0]->prepares.size(), 1u);  // it has answered
  EXPECT_GT(shards_[1]->prepares.size(), 2u);
  SetNorm(shards_[1].get(), 16, 0);
  Pass(absl::Seconds(1));
  EXPECT_EQ(StepNow(), 1);
  EXPECT_DOUBLE_EQ(shards_[0]->commits.back().clip_scale(), 1 / (5 + 1e-6));
}

TEST_F(LeaderTest, AShardThatLostAPushTakesTheGroupBack) {
  job_.mutable_training()->mutable_optimizer()->set_clip_norm(1);
  Start();
  shards_[1]->prepared = absl::FailedPreconditionError("the push of rank 0 is not staged");
  EndAll(1);
  Pass(absl::Seconds(1));
  EXPECT_EQ(StepNow(), 0);
  EXPECT_TRUE(shards_[0]->commits.empty());
  EXPECT_EQ(shards_[0]->restores.size(), 2u);
}

TEST_F(LeaderTest, AnAnswerOfAnOlderGenerationDecidesNothing) {
  job_.mutable_training()->mutable_optimizer()->set_clip_norm(1);
  Start();
  shards_[0]->hold_prepares = true;
  EndAll(1);
  shards_[1]->nonce = 999;  // restarted meanwhile
  Pass(absl::Seconds(5));
  ASSERT_EQ(shards_[0]->restores.size(), 2u);
  shards_[0]->Release();
  EXPECT_EQ(StepNow(), 0);
  EXPECT_TRUE(shards_[0]->commits.empty());
}

}  // namespace
}  // namespace codistill
