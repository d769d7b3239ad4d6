#include "server/leader.h"

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/leader_harness.h"
#include "server/test_model.h"

// The leader's run of a group: who registers, what is handed out, how steps are decided.
namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST_F(LeaderTest, WaitsForShardsThenForWorkers) {
  shards_[1]->reachable = false;
  Make();
  Pass(absl::Minutes(5));  // a shard never seen is waited for
  EXPECT_EQ(Phase(), GroupState::STARTING);
  EXPECT_THAT(shards_[0]->restores, IsEmpty());
  EXPECT_EQ(Register(0).code(), absl::StatusCode::kUnavailable);
  shards_[1]->reachable = true;
  Pass(absl::Seconds(1));
  EXPECT_EQ(Phase(), GroupState::STARTING);
  EXPECT_EQ(State().newest_cut().step(), 0);
  EXPECT_GT(State().newest_cut().generation(), 0u);  // followers can load at once
  ASSERT_EQ(shards_[1]->restores.size(), 1u);
  EXPECT_EQ(shards_[1]->restores[0].leader_address(), "leader:1");
  EXPECT_EQ(shards_[1]->restores[0].manifest(), "");
  ASSERT_TRUE(Register(0).ok());
  const auto asked = Ask(0);
  EXPECT_FALSE(asked->answered);
  ASSERT_TRUE(Register(1).ok());
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  ASSERT_TRUE(asked->answered);
  EXPECT_EQ(asked->reply->assignments_size(), 1);
}

TEST_F(LeaderTest, RefusesAnotherModel) {
  Start();
  RegisterRequest request;
  *request.mutable_tensors() = TestTensors().tensors();
  request.mutable_tensors(1)->set_shape(0, 64);
  const auto reply = leader_->Register(request);
  EXPECT_EQ(reply.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(reply.status().message()), HasSubstr("b"));
}

TEST_F(LeaderTest, AssignmentsAreAPureFunctionOfTheStep) {
  Start();
  const auto r0 = Ask(0, 0, 3), r1 = Ask(1, 0, 2);
  ASSERT_EQ(r0->reply->assignments_size(), 3);
  ASSERT_EQ(r1->reply->assignments_size(), 2);
  for (int i = 0; i < 3; ++i) {
    const Assignment& a = r0->reply->assignments(i);
    EXPECT_EQ(a.step(), i + 1);
    EXPECT_EQ(a.first_example(), 8u * i);
    EXPECT_EQ(a.num_examples(), 4);
    EXPECT_EQ(a.weights_step(), i);
    EXPECT_THAT(a.members(), ElementsAre(0, 1));
    EXPECT_FALSE(a.want_worker_state());
  }
  EXPECT_EQ(r1->reply->assignments(1).first_example(), 12u);
  // Further ones wait for the group.
  const auto later = Ask(0, 4, 3);
  EXPECT_FALSE(later->answered);
  EndAll(1);
  ASSERT_TRUE(later->answered);
  ASSERT_EQ(later->reply->assignments_size(), 1);
  EXPECT_EQ(later->reply->assignments(0).step(), 4);
  // Handed out again just the same.
  const auto again = Ask(0, 2, 2);
  EXPECT_EQ(again->reply->assignments(0).first_example(), 8u);
}

TEST_F(LeaderTest, WithWeightsLagAStepIsComputedOnOlderWeights) {
  job_.mutable_training()->set_weights_lag(1);
  Start();
  const auto asked = Ask(0, 0, 4);
  ASSERT_EQ(asked->reply->assignments_size(), 4);
  for (const Assignment& a : asked->reply->assignments()) {
    EXPECT_EQ(a.weights_step(), std::max<int64_t>(0, a.step() - 2));
  }
}

TEST_F(LeaderTest, NothingToHandOutIsAnEmptyListAtTheDeadline) {
  Make();
  Pass(absl::Seconds(1));
  ASSERT_TRUE(Register(0).ok());
  const auto asked = Ask(0);
  Pass(absl::Seconds(4));
  EXPECT_FALSE(asked->answered);
  Pass(absl::Seconds(2));
  ASSERT_TRUE(asked->answered);
  EXPECT_TRUE(asked->reply.ok());
  EXPECT_EQ(asked->reply->assignments_size(), 0);
  EXPECT_FALSE(asked->reply->finished());
}

TEST_F(LeaderTest, OneDecisionForAllShards) {
  Start();
  EXPECT_TRUE(End(0, 0, 1).ok());
  EXPECT_TRUE(End(0, 1, 1).ok());
  EXPECT_TRUE(End(1, 0, 1).ok());
  EXPECT_THAT(shards_[0]->commits, IsEmpty());
  EXPECT_TRUE(End(1, 1, 1).ok());
  for (const auto& shard : shards_) {
    ASSERT_EQ(shard->commits.size(), 1u);
    const CommitRequest& commit = shard->commits[0];
    EXPECT_EQ(commit.step(), 1);
    ASSERT_EQ(commit.contributors_size(), 2);
    EXPECT_EQ(commit.contributors(1).rank(), 1);
    EXPECT_EQ(commit.contributors(1).num_examples(), 4);
    EXPECT_DOUBLE_EQ(commit.learning_rate(), 0.5);
    EXPECT_EQ(commit.clip_scale(), 1);
    EXPECT_FALSE(commit.publish());
  }
  EXPECT_EQ(StepNow(), 1);
  EXPECT_EQ(leader_->GetHistory().examples(), 8);
}

TEST_F(LeaderTest, PublishesOnlyWhatAllShardsHave) {
  Start();
  Run(1, 4);
  shards_[1]->hold_commits = true;
  EndAll(5);
  EXPECT_TRUE(shards_[0]->commits.back().publish());
  EXPECT_EQ(StepNow(), 4);
  EXPECT_EQ(State().newest_cut().step(), 0);
  // A fast worker may push the next step before the leader has heard from the slow shard.
  EndAll(6);
  EXPECT_EQ(StepNow(), 4);
  shards_[1]->hold_commits = false;
  shards_[1]->Release();
  EXPECT_EQ(StepNow(), 6);
  EXPECT_EQ(State().newest_cut().step(), 5);
}

TEST_F(LeaderTest, PushesThatAreNotFiniteAreRejected) {
  Start();
  MustEnd(0, 0, 1);
  MustEnd(0, 1, 1, /*finite=*/false);
  MustEnd(1, 0, 1);
  MustEnd(1, 1, 1);
  const CommitRequest& commit = shards_[0]->commits[0];
  EXPECT_THAT(commit.rejected(), ElementsAre(0));
  ASSERT_EQ(commit.contributors_size(), 1);
  EXPECT_EQ(commit.contributors(0).rank(), 1);
  EXPECT_EQ(StepNow(), 1);
  EXPECT_EQ(leader_->counters().rejected, 1);
  DaemonStatus status;
  leader_->FillStatus(&status);
  EXPECT_THAT(status.detail(),
              HasSubstr("1 pushes rejected, the last in step 1: the push of worker "
                        "0 is rejected: the gradient of tensor w is not finite"));
}

TEST_F(LeaderTest, UnreachableShardIsAskedAgainInTheSameGeneration) {
  Start();
  const uint64_t generation = State().version().generation();
  shards_[1]->commit_error = absl::UnavailableError("connection reset");
  EndAll(1);
  Pass(absl::Seconds(1));
  EXPECT_EQ(StepNow(), 0);
  EXPECT_EQ(shards_[0]->commits.size(), 1u);  // has answered
  EXPECT_GT(shards_[1]->commits.size(), 2u);
  shards_[1]->commit_error = absl::OkStatus();
  Pass(absl::Seconds(1));
  EXPECT_EQ(StepNow(), 1);
  EXPECT_EQ(State().version().generation(), generation);
  EXPECT_EQ(leader_->GetHistory().restores(), 0);
}

TEST_F(LeaderTest, FinishesAtTheLastStep) {
  Start();
  Run(1, 20);
  EXPECT_EQ(Phase(), GroupState::FINISHED);
  EXPECT_EQ(State().newest_cut().step(), 20);
  const auto asked = Ask(0, 21, 2);
  ASSERT_TRUE(asked->answered);
  EXPECT_TRUE(asked->reply->finished());
  const GetHistoryReply history = leader_->GetHistory();
  EXPECT_EQ(history.training_size(), 10);
  EXPECT_DOUBLE_EQ(history.training(0).label_loss(), 2.0);
  EXPECT_EQ(history.examples(), 160);
}

TEST_F(LeaderTest, AsyncCountsShardZeroAndIssuesRangesOnce) {
  UseCheckpoints(8);
  job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  Start();
  const auto a = Ask(0, 0, 2), b = Ask(1, 0, 1);
  ASSERT_EQ(a->reply->assignments_size(), 2);
  EXPECT_EQ(a->reply->assignments(0).step(), 1);
  EXPECT_EQ(a->reply->assignments(1).first_example(), 4u);
  EXPECT_EQ(b->reply->assignments(0).first_example(), 8u);
  const auto again = Ask(0, 2, 1);  // the answer was lost: the same range
  EXPECT_EQ(again->reply->assignments(0).first_example(), 4u);
  ASSERT_TRUE(Register(1, 99).ok());  // a new process gets new ones
  EXPECT_EQ(Ask(1, 0, 1)->reply->assignments(0).first_example(), 12u);

  // Reports carry the shard's own count.
  for (int64_t step = 1; step <= 9; ++step) {
    EXPECT_TRUE(End(step % 2, 0, step).ok());
    if (step <= 7) {
      EXPECT_TRUE(End(step % 2, 1, step).ok());
    }
  }
  EXPECT_EQ(StepNow(), 9);
  EXPECT_THAT(State().version().shard_steps(), ElementsAre(9, 7));
  EXPECT_EQ(State().newest_cut().step(), 5);
  EXPECT_THAT(Files(), testing::Contains("MANIFEST-1-8"));
  for (int64_t step = 10; step <= 20; ++step) MustEnd(0, 0, step);
  const auto asked = Ask(0);
  EXPECT_FALSE(asked->answered);
  EXPECT_NE(Phase(), GroupState::FINISHED);  // the other shard is on its way
  for (int64_t step = 8; step <= 20; ++step) MustEnd(0, 1, step);
  EXPECT_EQ(Phase(), GroupState::FINISHED);
  ASSERT_TRUE(asked->answered);
  EXPECT_TRUE(asked->reply->finished());
  EXPECT_EQ(State().newest_cut().step(), 20);
}

TEST_F(LeaderTest, AsyncEndsThoughAShardMissedAPush) {
  job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  Start();
  for (int64_t step = 1; step <= 20; ++step) MustEnd(0, 0, step);
  EXPECT_NE(Phase(), GroupState::FINISHED);
  Pass(absl::Seconds(3));
  EXPECT_EQ(Phase(), GroupState::FINISHED);
}

TEST_F(LeaderTest, AsyncReportsCountThoughAProbeWasFaster) {
  job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  Start();
  for (auto& shard : shards_) shard->step = 20;
  Pass(absl::Seconds(1));  // probes bring the shards' counts
  EXPECT_THAT(State().version().shard_steps(), ElementsAre(20, 20));
  EXPECT_EQ(StepNow(), 0);
  for (int64_t step = 1; step <= 20; ++step) {
    MustEnd(0, 0, step);
    EXPECT_EQ(StepNow(), step);
  }
  EXPECT_EQ(leader_->GetHistory().examples(), 80);
  EXPECT_EQ(Phase(), GroupState::FINISHED);
}

TEST_F(LeaderTest, AsyncRejectedPushesAreStepsWithoutExamples) {
  job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  Start();
  for (int64_t step = 1; step <= 20; ++step) {
    for (int shard = 0; shard < kShards; ++shard) MustEnd(0, shard, step, /*finite=*/step > 18);
  }
  EXPECT_EQ(Phase(), GroupState::FINISHED);
  EXPECT_EQ(leader_->counters().rejected, 18);
  EXPECT_EQ(leader_->GetHistory().examples(), 8);
}

}  // namespace
}  // namespace codistill
