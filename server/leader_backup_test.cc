#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/leader.h"
#include "server/leader_harness.h"

// Steps that are decided without the slowest (training.backup_workers).
namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class BackupTest : public LeaderTest {
 protected:
  void SetUp() override {
    LeaderTest::SetUp();
    job_.mutable_groups(0)->set_num_workers(3);
    job_.mutable_training()->set_backup_workers(1);
  }
  void EndWhole(int rank, int64_t step, bool finite = true) {
    for (int shard = 0; shard < kShards; ++shard) MustEnd(rank, shard, step, finite);
  }
};

TEST_F(BackupTest, AStepIsDecidedOnceAllButOneAreInOnAllShards) {
  Start();
  EndWhole(0, 1);
  MustEnd(1, 0, 1);
  MustEnd(2, 1, 1);  // both of these are on one shard only
  EXPECT_THAT(shards_[0]->commits, IsEmpty());
  MustEnd(2, 0, 1);
  for (const auto& shard : shards_) {
    ASSERT_EQ(shard->commits.size(), 1u);
    const CommitRequest& commit = shard->commits[0];
    ASSERT_EQ(commit.contributors_size(), 2);
    EXPECT_EQ(commit.contributors(0).rank(), 0);
    EXPECT_EQ(commit.contributors(1).rank(), 2);
    EXPECT_THAT(commit.dropped(), ElementsAre(1));
  }
  EXPECT_EQ(StepNow(), 1);
  EXPECT_EQ(leader_->GetHistory().examples(), 8);
  EXPECT_EQ(leader_->counters().dropped, 1);
  // The rest of the late push changes nothing.
  MustEnd(1, 1, 1);
  EXPECT_EQ(shards_[0]->commits.size(), 1u);
}

TEST_F(BackupTest, RangesAreTheSameWhoeverIsLate) {
  Start();
  EndWhole(0, 1);
  EndWhole(1, 1);
  EndWhole(2, 2);
  EndWhole(0, 2);
  for (int rank = 0; rank < 3; ++rank) {
    const auto asked = Ask(rank, 3, 2);
    ASSERT_EQ(asked->reply->assignments_size(), 2);
    EXPECT_EQ(asked->reply->assignments(0).first_example(), 24u + 4 * rank);
    EXPECT_EQ(asked->reply->assignments(1).first_example(), 36u + 4 * rank);
    EXPECT_THAT(asked->reply->assignments(0).members(), ElementsAre(0, 1, 2));
  }
}

TEST_F(BackupTest, AStragglerIsGivenNothingThatIsDecided) {
  Start();
  Ask(2, 0, 3);
  for (int64_t step = 1; step <= 6; ++step) {
    EndWhole(0, step);
    EndWhole(1, step);
  }
  EXPECT_EQ(Ask(2, 4, 1)->reply->assignments(0).step(), 7);
  shards_[1]->hold_commits = true;
  EndWhole(0, 7);
  EndWhole(1, 7);
  EXPECT_EQ(StepNow(), 6);  // decided, not yet committed everywhere
  EXPECT_EQ(Ask(2, 4, 2)->reply->assignments(0).step(), 8);
  shards_[1]->Release();
}

TEST_F(BackupTest, WhoIsInWhenTheDecisionIsTakenTakesPart) {
  UseCheckpoints(1);
  Start();
  shards_[0]->hold_writes = true;
  EndWhole(0, 1);
  EndWhole(1, 1);
  // The snapshot of step 1 is not yet on disk: step 2 waits, and all three come in time.
  for (int rank = 0; rank < 3; ++rank) EndWhole(rank, 2);
  EXPECT_EQ(StepNow(), 1);
  shards_[0]->hold_writes = false;
  shards_[0]->Release();
  EXPECT_EQ(StepNow(), 2);
  EXPECT_EQ(shards_[1]->commits.back().contributors_size(), 3);
}

TEST_F(BackupTest, APushThatIsNotFiniteIsInAllTheSame) {
  Start();
  EndWhole(0, 1, /*finite=*/false);
  EndWhole(1, 1);
  const CommitRequest& commit = shards_[0]->commits.at(0);
  EXPECT_THAT(commit.rejected(), ElementsAre(0));
  EXPECT_THAT(commit.dropped(), ElementsAre(2));
  ASSERT_EQ(commit.contributors_size(), 1);
}

TEST_F(BackupTest, OneLostWorkerIsBorneAndASecondFailsTheGroup) {
  Start();
  int64_t step = 0;
  for (int s = 0; s < 90; ++s) {
    if (s % 10 == 0) {
      ++step;
      Ask(0);
      Ask(1);
      EndWhole(0, step);
      EndWhole(1, step);
    }
    ASSERT_TRUE(HeartbeatStatus(0).ok());
    ASSERT_TRUE(HeartbeatStatus(1).ok());
    Pass(absl::Seconds(1));
  }
  EXPECT_EQ(Phase(), GroupState::TRAINING);  // worker 2 has been silent for 90 s
  for (int s = 0; s < 62; ++s) {
    HeartbeatStatus(0).IgnoreError();
    Pass(absl::Seconds(1));
  }
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_EQ(State().error(), "worker 1 of group alpha: not heard from for 60 s");
}

}  // namespace
}  // namespace codistill
