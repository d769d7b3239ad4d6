#include <initializer_list>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/leader.h"
#include "server/leader_harness.h"

// Workers that come and go (training.membership ELASTIC).
namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class ElasticTest : public LeaderTest {
 protected:
  void SetUp() override {
    LeaderTest::SetUp();
    job_.mutable_training()->set_membership(TrainingConfig::ELASTIC);
    job_.mutable_training()->set_lease_s(3);
    job_.mutable_groups(0)->set_max_workers(4);
  }
  void EndWhole(int rank, int64_t step) {
    for (int shard = 0; shard < kShards; ++shard) MustEnd(rank, shard, step);
  }
  // Lets time go by while these send heartbeats.
  void PassWith(std::initializer_list<int> ranks, absl::Duration time) {
    for (absl::Duration done; done < time; done += absl::Milliseconds(500)) {
      for (const int rank : ranks) ASSERT_TRUE(HeartbeatStatus(rank).ok());
      Pass(absl::Milliseconds(500));
    }
  }
  static std::vector<int> Contributors(const CommitRequest& commit) {
    std::vector<int> ranks;
    for (const Contributor& c : commit.contributors()) ranks.push_back(c.rank());
    return ranks;
  }
  MembershipCounts Counts() { return leader_->GetHistory().membership(); }
};

TEST_F(ElasticTest, AKilledWorkersLeaseEndsAndTheGroupGoesOn) {
  Start();
  Ask(0, 0, 2);
  Ask(1, 0, 2);
  EndWhole(0, 1);
  PassWith({0}, absl::Milliseconds(2500));
  EXPECT_EQ(StepNow(), 0);  // worker 1 may still come
  PassWith({0}, absl::Seconds(1));
  EXPECT_EQ(StepNow(), 1);
  EXPECT_THAT(Contributors(shards_[0]->commits.at(0)), ElementsAre(0));
  EXPECT_THAT(shards_[0]->commits.at(0).dropped(), ElementsAre(1));
  // Step 2 had been handed out and stays what it was; nobody waits for worker 1 any more.
  const auto second = Ask(0, 2, 1);
  EXPECT_EQ(second->reply->assignments(0).first_example(), 8u);
  EXPECT_THAT(second->reply->assignments(0).members(), ElementsAre(0, 1));
  EndWhole(0, 2);
  EXPECT_EQ(StepNow(), 2);
  const auto third = Ask(0, 3, 2);
  EXPECT_THAT(third->reply->assignments(0).members(), ElementsAre(0));
  EXPECT_EQ(third->reply->assignments(0).first_example(), 16u);
  EXPECT_EQ(third->reply->assignments(1).first_example(), 20u);
  EXPECT_EQ(Counts().leases_ended(), 1);
  EXPECT_EQ(Counts().members(), 1);
  PassWith({0}, absl::Minutes(2));  // rejoin_timeout_s is nothing to an elastic group
  EXPECT_EQ(Phase(), GroupState::TRAINING);
}

TEST_F(ElasticTest, APushThatReachedOneShardOnlyIsPartOnNone) {
  Start();
  Ask(0);
  Ask(1);
  EndWhole(0, 1);
  MustEnd(1, 0, 1);  // killed before shard 1 had it
  PassWith({0}, absl::Seconds(4));
  ASSERT_EQ(StepNow(), 1);
  for (const auto& shard : shards_) {
    EXPECT_THAT(Contributors(shard->commits.at(0)), ElementsAre(0));
  }
}

TEST_F(ElasticTest, AWholePushOfADeadWorkerCounts) {
  Start();
  Ask(0);
  Ask(1);
  EndWhole(1, 1);
  PassWith({0}, absl::Seconds(4));
  EXPECT_EQ(StepNow(), 0);
  EndWhole(0, 1);
  EXPECT_THAT(Contributors(shards_[0]->commits.at(0)), ElementsAre(0, 1));
}

TEST_F(ElasticTest, AWorkerNeverSeenBeforeJoinsAfterWhatIsHandedOut) {
  Start();
  Ask(0, 0, 3);
  ASSERT_TRUE(Register(3).ok());
  EXPECT_EQ(Counts().members(), 3);
  const auto newcomer = Ask(3, 0, 4);
  ASSERT_TRUE(newcomer->answered);
  ASSERT_EQ(newcomer->reply->assignments_size(), 1);
  const Assignment& first = newcomer->reply->assignments(0);
  EXPECT_EQ(first.step(), 4);
  EXPECT_THAT(first.members(), ElementsAre(0, 1, 3));
  EXPECT_EQ(first.first_example(), 3 * 8u + 8);
  // Until then the two go on without it.
  for (int64_t step = 1; step <= 3; ++step) {
    EndWhole(0, step);
    EndWhole(1, step);
    EXPECT_EQ(StepNow(), step);
  }
  EndWhole(0, 4);
  EndWhole(1, 4);
  EXPECT_EQ(StepNow(), 3);
  EndWhole(3, 4);
  EXPECT_EQ(StepNow(), 4);
  EXPECT_EQ(Register(4).code(), absl::StatusCode::kInvalidArgument);  // max_workers
}

TEST_F(ElasticTest, ANewcomerWaitsUntilItsStepIsNear) {
  Start();
  Ask(0, 0, 5);
  ASSERT_TRUE(Register(2).ok());
  const auto asked = Ask(2, 0, 1);
  EXPECT_FALSE(asked->answered);
  for (int64_t step = 1; step <= 5; ++step) {
    EndWhole(0, step);
    EndWhole(1, step);
  }
  ASSERT_TRUE(asked->answered);
  EXPECT_EQ(asked->reply->assignments(0).step(), 6);
}

TEST_F(ElasticTest, WhoSaysThatItLeavesIsNotWaitedFor) {
  Start();
  Ask(0, 0, 2);
  Ask(1, 0, 2);
  EndWhole(0, 1);
  EndWhole(1, 1);
  EndWhole(0, 2);
  EXPECT_EQ(StepNow(), 1);
  ASSERT_TRUE(HeartbeatStatus(1, "", /*leaving=*/true).ok());
  EXPECT_EQ(StepNow(), 2);  // at once
  EXPECT_THAT(Ask(0, 3)->reply->assignments(0).members(), ElementsAre(0));
  EXPECT_EQ(Counts().left(), 1);
  EXPECT_EQ(Counts().leases_ended(), 0);
  Pass(absl::Milliseconds(200));
  EXPECT_EQ(Counts().members(), 1);  // nothing brings it back
}

TEST_F(ElasticTest, ANewProcessOfARankIsAnotherMember) {
  Start();
  Ask(0, 0, 2);
  Ask(1, 0, 2);
  EndWhole(1, 1);
  EndWhole(1, 2);
  MustEnd(0, 0, 1);
  ASSERT_TRUE(Register(0, /*process=*/77).ok());
  // The old one's push was not whole; of the step nobody is waited for any more.
  EXPECT_EQ(StepNow(), 2);
  EXPECT_THAT(Contributors(shards_[0]->commits.at(0)), ElementsAre(1));
  const auto asked = Ask(0, 0, 3);
  ASSERT_TRUE(asked->answered);
  EXPECT_EQ(asked->reply->assignments(0).step(), 3);
  EXPECT_EQ(Counts().replaced(), 1);
  // What is whole of an older process is not lost with it.
  Ask(1, 3);
  EndWhole(0, 3);
  ASSERT_TRUE(Register(0, 78).ok());
  EndWhole(1, 3);
  EXPECT_THAT(Contributors(shards_[1]->commits.back()), ElementsAre(0, 1));
}

TEST_F(ElasticTest, ASignOfLifeBringsAWorkerBack) {
  Start();
  Ask(0, 0, 2);
  Ask(1, 0, 2);
  PassWith({0}, absl::Seconds(4));
  EXPECT_EQ(Counts().members(), 1);
  EndWhole(0, 1);
  EXPECT_EQ(StepNow(), 1);
  ASSERT_TRUE(HeartbeatStatus(1).ok());  // it had only been stopped
  EXPECT_EQ(Counts().members(), 2);
  // What it holds of step 2 it may bring; the next it is given are after what is handed out.
  EndWhole(0, 2);
  EXPECT_EQ(StepNow(), 1);
  EndWhole(1, 2);
  EXPECT_EQ(StepNow(), 2);
  EXPECT_THAT(Contributors(shards_[0]->commits.back()), ElementsAre(0, 1));
  EXPECT_THAT(Ask(1, 3)->reply->assignments(0).members(), ElementsAre(0, 1));
}

TEST_F(ElasticTest, BelowMinWorkersTheGroupWaits) {
  job_.mutable_groups(0)->set_min_workers(2);
  Start();
  Ask(0);
  Ask(1);
  EndWhole(0, 1);
  PassWith({0}, absl::Minutes(3));
  EXPECT_EQ(StepNow(), 0);
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  EXPECT_FALSE(Ask(0, 2)->answered);
  DaemonStatus status;
  leader_->FillStatus(&status);
  EXPECT_THAT(status.detail(), HasSubstr("waiting for workers: 1 are there, 2 are needed"));
  ASSERT_TRUE(Register(2).ok());  // any other will do
  EXPECT_EQ(StepNow(), 1);
  EXPECT_THAT(Contributors(shards_[0]->commits.at(0)), ElementsAre(0));
  EXPECT_THAT(Ask(2)->reply->assignments(0).members(), ElementsAre(0, 2));
}

TEST_F(ElasticTest, WhenAllLeasesHaveEndedWhoeverComesTakesTheStepAnew) {
  Start();
  Ask(0, 0, 3);
  Ask(1, 0, 3);
  MustEnd(0, 0, 1);
  Pass(absl::Minutes(3));
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  EXPECT_EQ(Counts().members(), 0);
  ASSERT_TRUE(Register(2).ok());
  const auto asked = Ask(2, 0, 2);
  ASSERT_TRUE(asked->answered);
  EXPECT_EQ(asked->reply->assignments(0).step(), 1);
  EXPECT_EQ(asked->reply->assignments(0).first_example(), 0u);
  EXPECT_THAT(asked->reply->assignments(0).members(), ElementsAre(2));
  // The half of worker 0's push is of a plan that is no more.
  MustEnd(0, 1, 1);
  EXPECT_EQ(StepNow(), 0);
  EndWhole(2, 1);
  EXPECT_EQ(StepNow(), 1);
  EXPECT_THAT(Contributors(shards_[0]->commits.at(0)), ElementsAre(2));
  // Worker 0 holds steps 2 and 3 of the old plan, so it takes part from step 4 on.
  ASSERT_TRUE(HeartbeatStatus(0).ok());
  EndWhole(2, 2);
  EXPECT_EQ(StepNow(), 2);
  EXPECT_THAT(Ask(0, 0, 2)->reply->assignments(0).members(), ElementsAre(0, 2));
}

TEST_F(ElasticTest, JoiningDuringACommit) {
  Start();
  Ask(0);
  Ask(1);
  shards_[1]->hold_commits = true;
  EndWhole(0, 1);
  EndWhole(1, 1);
  ASSERT_TRUE(Register(2).ok());
  shards_[1]->hold_commits = false;
  shards_[1]->Release();
  EXPECT_EQ(StepNow(), 1);
  EXPECT_THAT(Contributors(shards_[1]->commits.at(0)), ElementsAre(0, 1));
  EXPECT_THAT(Ask(2)->reply->assignments(0).members(), ElementsAre(0, 1, 2));
  EXPECT_EQ(Ask(2)->reply->assignments(0).step(), 2);
}

TEST_F(ElasticTest, LeavingDuringACommit) {
  Start();
  Ask(0, 0, 2);
  Ask(1, 0, 2);
  shards_[1]->hold_commits = true;
  EndWhole(0, 1);
  EndWhole(1, 1);
  EndWhole(0, 2);
  ASSERT_TRUE(HeartbeatStatus(1, "", /*leaving=*/true).ok());
  ASSERT_TRUE(Register(1, 99).ok());  // and another takes its place at once
  shards_[1]->hold_commits = false;
  shards_[1]->Release();
  // The decision stays as it was taken, and the next one does without.
  for (const auto& shard : shards_) {
    EXPECT_THAT(Contributors(shard->commits.at(0)), ElementsAre(0, 1));
    EXPECT_THAT(Contributors(shard->commits.at(1)), ElementsAre(0));
  }
  EXPECT_EQ(StepNow(), 2);
}

TEST_F(ElasticTest, ARestoreBeginsWithWhoeverIsThere) {
  UseCheckpoints(4);
  job_.mutable_groups(0)->set_num_workers(3);
  Start();
  const auto run = [&](std::initializer_list<int> ranks, int64_t from, int64_t to) {
    for (int64_t step = from; step <= to; ++step) {
      for (const int rank : ranks) Ask(rank, step);
      for (const int rank : ranks) EndWhole(rank, step);
      ASSERT_EQ(StepNow(), step);
    }
  };
  run({0, 1, 2}, 1, 2);
  ASSERT_TRUE(HeartbeatStatus(1, "", /*leaving=*/true).ok());
  run({0, 2}, 3, 6);
  // A shard is lost while worker 2's lease runs out and worker 3 comes.
  shards_[1]->nonce = 200;
  shards_[1]->generation = 0;
  PassWith({0}, absl::Seconds(4));
  EXPECT_EQ(StepNow(), 4);
  ASSERT_TRUE(Register(3).ok());
  ASSERT_TRUE(Register(0).ok());
  const auto asked = Ask(3);
  ASSERT_TRUE(asked->answered);
  EXPECT_EQ(asked->reply->assignments(0).step(), 5);
  EXPECT_THAT(asked->reply->assignments(0).members(), ElementsAre(0, 3));
  // Two steps of three and two of two, each of four examples, are behind the checkpoint.
  EXPECT_EQ(asked->reply->assignments(0).first_example(), 2 * 12u + 2 * 8u + 4u);
  run({0, 3}, 5, 6);
}

TEST_F(ElasticTest, ALeaderThatTakesUpAGroupGoesOnWithThoseWhoAreStillThere) {
  UseCheckpoints(2);
  Start();
  Run(1, 2);
  Make();
  Pass(absl::Seconds(1));
  ASSERT_TRUE(Register(1).ok());  // of two
  EXPECT_FALSE(Ask(1)->answered);
  PassWith({1}, absl::Seconds(3));
  const auto asked = Ask(1);
  ASSERT_TRUE(asked->answered);
  EXPECT_EQ(asked->reply->assignments(0).step(), 3);
  EXPECT_THAT(asked->reply->assignments(0).members(), ElementsAre(1));
}

TEST_F(ElasticTest, TheGroupBeginsWithNumWorkersOrWhoeverHasComeInTime) {
  job_.mutable_groups(0)->set_num_workers(3);
  Make();
  Pass(absl::Milliseconds(600));
  ASSERT_TRUE(Register(1).ok());
  PassWith({1}, absl::Seconds(55));
  EXPECT_EQ(Phase(), GroupState::STARTING);
  PassWith({1}, absl::Seconds(6));
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  EXPECT_THAT(Ask(1)->reply->assignments(0).members(), ElementsAre(1));
}

TEST_F(ElasticTest, ALeaderThatWasStoppedItselfEndsNobodysLease) {
  Start();
  clock_.Advance(absl::Seconds(30));  // no tick meanwhile
  leader_->Tick();
  EXPECT_EQ(Counts().members(), 2);
  Pass(absl::Milliseconds(3500));
  EXPECT_EQ(Counts().members(), 0);
}

TEST_F(ElasticTest, BackupWorkersAreOfTheMembersThereAre) {
  job_.mutable_groups(0)->set_num_workers(3);
  job_.mutable_training()->set_backup_workers(1);
  Start();
  for (int rank = 0; rank < 3; ++rank) Ask(rank);
  EndWhole(0, 1);
  EXPECT_EQ(StepNow(), 0);
  EndWhole(1, 1);
  EXPECT_EQ(StepNow(), 1);
  ASSERT_TRUE(HeartbeatStatus(2, "", /*leaving=*/true).ok());
  ASSERT_TRUE(HeartbeatStatus(1, "", /*leaving=*/true).ok());
  Ask(0, 2);
  EndWhole(0, 2);  // one alone is still waited for
  EXPECT_EQ(StepNow(), 2);
}

TEST_F(ElasticTest, AsyncGroupsGoOnWithoutTheDeadAndTakeNewcomers) {
  job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  Start();
  EXPECT_THAT(Ask(0)->reply->assignments(0).members(), ElementsAre(0, 1));
  PassWith({0}, absl::Minutes(2));
  EXPECT_THAT(Ask(0, 2)->reply->assignments(0).members(), ElementsAre(0));
  ASSERT_TRUE(Register(3).ok());
  const auto asked = Ask(3);
  ASSERT_TRUE(asked->answered);
  EXPECT_THAT(asked->reply->assignments(0).members(), ElementsAre(0, 3));
  Pass(absl::Minutes(2));  // nobody is left
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  EXPECT_EQ(Counts().members(), 0);
}

TEST_F(ElasticTest, AnswersOfAllShardsAreAddedUpByRank) {
  Start();
  const auto count = [&](int shard, int rank, int64_t applied, int64_t lost, int64_t open) {
    RankPushes& of = shards_[shard]->pushes[rank];
    of.set_rank(rank);
    of.mutable_counts()->set_begun(applied + lost + open);
    of.mutable_counts()->set_applied(applied);
    of.mutable_counts()->set_lost(lost);
    of.mutable_counts()->set_open(open);
  };
  count(0, 0, 5, 0, 0);
  count(1, 0, 4, 0, 1);
  count(1, 1, 2, 1, 0);
  Pass(absl::Seconds(1));
  GetHistoryReply history = leader_->GetHistory();
  ASSERT_EQ(history.pushes_size(), 2);
  EXPECT_EQ(history.pushes(0).counts().applied(), 9);
  EXPECT_EQ(history.pushes(0).counts().open(), 1);
  EXPECT_EQ(history.pushes(1).counts().lost(), 1);
  // A shard's next process counts from zero; what the last one had open has no answer.
  shards_[1]->nonce = 201;
  count(1, 0, 1, 0, 0);
  count(1, 1, 0, 0, 0);
  Pass(absl::Seconds(1));
  DaemonStatus status;
  leader_->FillStatus(&status);
  EXPECT_EQ(status.members(0).pushes().applied(), 10);
  EXPECT_EQ(status.members(0).pushes().lost(), 1);
  EXPECT_EQ(status.members(0).pushes().begun(), 11);
  EXPECT_EQ(status.members(1).pushes().applied(), 2);
  EXPECT_TRUE(status.members(1).member());
  EXPECT_EQ(status.members_size(), 2);  // ranks never seen are not shown
}

}  // namespace
}  // namespace codistill
