#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/checkpoint/directory_claim.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/leader.h"
#include "server/leader_harness.h"

// What a leader does about workers and shards that are replaced, lost or broken.
namespace codistill {
namespace {

using ::testing::HasSubstr;

TEST_F(LeaderTest, OlderProcessOfARankIsTurnedAway) {
  Start();
  const RegisterReply old = replies_[0];
  MustEnd(0, 0, 1);
  const auto parked = Ask(0, 5);
  ASSERT_TRUE(Register(0, /*process=*/77).ok());
  EXPECT_GT(replies_[0].incarnation(), old.incarnation());
  ASSERT_TRUE(parked->answered);
  EXPECT_EQ(parked->reply.status().code(), absl::StatusCode::kFailedPrecondition);
  const RegisterReply fresh = replies_[0];
  replies_[0] = old;
  EXPECT_EQ(End(0, 1, 1).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(HeartbeatStatus(0).code(), absl::StatusCode::kFailedPrecondition);
  replies_[0] = fresh;
  // What the old one had ended on one shard does not count.
  MustEnd(1, 0, 1);
  MustEnd(1, 1, 1);
  MustEnd(0, 1, 1);
  EXPECT_EQ(StepNow(), 0);
  MustEnd(0, 0, 1);
  EXPECT_EQ(StepNow(), 1);
}

TEST_F(LeaderTest, MissingWorkerFailsTheGroupByName) {
  Start();
  Ask(0);
  Ask(1);
  EndAll(1);
  MustEnd(0, 0, 2);
  MustEnd(0, 1, 2);
  for (int i = 0; i < 59; ++i) {
    Pass(absl::Seconds(1));
    ASSERT_TRUE(HeartbeatStatus(0).ok());
  }
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  Pass(absl::Seconds(2));
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_EQ(State().error(), "worker 1 of group alpha: not heard from for 60 s");
  EXPECT_EQ(HeartbeatStatus(0).code(), absl::StatusCode::kFailedPrecondition);
  const auto asked = Ask(0);
  EXPECT_THAT(std::string(asked->reply.status().message()), HasSubstr("worker 1"));
}

TEST_F(LeaderTest, RestartedWorkerIsWaitedFor) {
  Start();
  MustEnd(0, 0, 1);
  MustEnd(0, 1, 1);
  for (int i = 0; i < 50; ++i) {
    Pass(absl::Seconds(1));
    HeartbeatStatus(0).IgnoreError();
  }
  ASSERT_TRUE(Register(1, 88).ok());
  Pass(absl::Seconds(30));
  HeartbeatStatus(0).IgnoreError();
  HeartbeatStatus(1).IgnoreError();
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  MustEnd(1, 0, 1);
  MustEnd(1, 1, 1);
  EXPECT_EQ(StepNow(), 1);
}

TEST_F(LeaderTest, WorkersFatalErrorFailsTheGroup) {
  Start();
  EXPECT_FALSE(HeartbeatStatus(1, "train.csv: record 17 has 14 values, not 15").ok());
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr("worker 1 of group alpha: train.csv: record 17"));
  absl::Status drained;
  leader_->Drain([&](absl::Status status) { drained = status; });
  Pass(absl::Seconds(1));
  EXPECT_EQ(drained.code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(LeaderTest, LostShardRestoresTheWholeGroup) {
  UseCheckpoints(/*every=*/6);
  Start();
  const uint64_t first = State().version().generation();
  EXPECT_EQ(first, 1u);
  Run(1, 8);
  EXPECT_EQ(leader_->GetHistory().examples(), 64);
  const auto parked = Ask(0, 12);
  shards_[1]->nonce = 200;  // restarted: a process with nothing in it
  shards_[1]->generation = 0;
  Pass(absl::Seconds(1));
  ASSERT_TRUE(parked->answered);
  EXPECT_EQ(parked->reply.status().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(State().version().generation(), 2u);
  EXPECT_EQ(StepNow(), 6);
  EXPECT_EQ(State().newest_cut().step(), 6);
  for (const auto& shard : shards_) {
    EXPECT_EQ(shard->restores.back().manifest(), "MANIFEST-1-6");
    EXPECT_EQ(shard->restores.back().generation(), 2u);
  }
  EXPECT_EQ(End(0, 0, 9).code(), absl::StatusCode::kAborted);
  const GetHistoryReply history = leader_->GetHistory();
  EXPECT_EQ(history.examples(), 48);
  EXPECT_EQ(history.training_size(), 3);
  EXPECT_EQ(history.restores(), 1);
  // The same processes register again and keep their incarnation; data goes on after step 6.
  const uint64_t incarnation = replies_[0].incarnation();
  ASSERT_TRUE(Register(0).ok());
  ASSERT_TRUE(Register(1).ok());
  EXPECT_EQ(replies_[0].incarnation(), incarnation);
  const auto asked = Ask(1);
  EXPECT_EQ(asked->reply->assignments(0).step(), 7);
  EXPECT_EQ(asked->reply->assignments(0).first_example(), 52u);
  Run(7, 20);
  EXPECT_EQ(Phase(), GroupState::FINISHED);
  EXPECT_EQ(leader_->GetHistory().examples(), 160);
}

TEST_F(LeaderTest, WithoutCheckpointsALostShardMeansTheInitialWeights) {
  Start();
  const uint64_t first = State().version().generation();
  Run(1, 3);
  shards_[0]->nonce = 200;
  shards_[0]->generation = 0;
  Pass(absl::Seconds(1));
  EXPECT_GT(State().version().generation(), first);
  EXPECT_EQ(StepNow(), 0);
  EXPECT_EQ(shards_[1]->restores.back().manifest(), "");
}

TEST_F(LeaderTest, WithoutCheckpointsAFinishedModelIsLostWithItsShard) {
  Start();
  Run(1, 20);
  ASSERT_EQ(Phase(), GroupState::FINISHED);
  shards_[1]->nonce = 200;
  shards_[1]->generation = 0;
  const size_t restores = shards_[0]->restores.size();
  Pass(absl::Seconds(1));
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_EQ(State().error(),
            "shard 1 of group alpha was restarted after the last step, and the job has no "
            "checkpoint.directory: the model is lost");
  EXPECT_EQ(shards_[0]->restores.size(), restores);
}

TEST_F(LeaderTest, WithoutCheckpointsANextLeaderCountsARestore) {
  Start();
  EXPECT_EQ(leader_->GetHistory().restores(), 0);
  Run(1, 3);
  Start();  // another leader, as after a crash
  EXPECT_EQ(StepNow(), 0);
  EXPECT_EQ(leader_->GetHistory().restores(), 1);
}

TEST_F(LeaderTest, WorkersStayUntilTheLastCheckpointIsWritten) {
  UseCheckpoints(5);
  Start();
  Run(1, 19);
  shards_[1]->hold_writes = true;
  Run(20, 20);
  const auto first = Ask(0, 21), second = Ask(1, 21);
  EXPECT_FALSE(first->answered);
  // A shard lost now takes the group back, and the workers are still there.
  shards_[1]->nonce = 200;
  shards_[1]->generation = 0;
  Pass(absl::Seconds(1));
  EXPECT_EQ(StepNow(), 15);
  ASSERT_TRUE(first->answered);
  EXPECT_EQ(first->reply.status().code(), absl::StatusCode::kAborted);
  shards_[1]->held.clear();
  ASSERT_TRUE(Register(0).ok());
  ASSERT_TRUE(Register(1).ok());
  Run(16, 20);
  const auto third = Ask(0, 21);
  EXPECT_FALSE(third->answered);
  shards_[1]->Release();
  ASSERT_TRUE(third->answered);
  EXPECT_TRUE(third->reply->finished());
  EXPECT_EQ(Phase(), GroupState::FINISHED);
}

TEST_F(LeaderTest, ShardThatWasOnlyOutOfReachGoesOn) {
  Start();
  const uint64_t generation = State().version().generation();
  shards_[1]->reachable = false;
  Pass(absl::Seconds(30));
  shards_[1]->reachable = true;
  Pass(absl::Seconds(1));
  EXPECT_EQ(State().version().generation(), generation);
  EXPECT_EQ(Phase(), GroupState::TRAINING);
}

TEST_F(LeaderTest, ShardThatStaysAwayFailsTheGroupByName) {
  Start();
  shards_[1]->reachable = false;
  for (int i = 0; i < 62; ++i) {
    Pass(absl::Seconds(1));
    HeartbeatStatus(0).IgnoreError();
    HeartbeatStatus(1).IgnoreError();
  }
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_EQ(State().error(), "shard 1 of group alpha at shard:1: not heard from for 60 s");
}

TEST_F(LeaderTest, CommitThatAShardCannotMakeRestoresTheGroup) {
  Start();
  const uint64_t generation = State().version().generation();
  shards_[1]->commit_error = absl::FailedPreconditionError("the push is not staged");
  EndAll(1);
  shards_[1]->commit_error = absl::OkStatus();
  Pass(absl::Seconds(1));
  EXPECT_GT(State().version().generation(), generation);
  EXPECT_EQ(Phase(), GroupState::TRAINING);
}

TEST_F(LeaderTest, TheStateOfAWorkerThatAloneIsRestartedSurvives) {
  job_.mutable_model()->add_states()->set_name("h");
  Start();
  for (int64_t step = 1; step <= 3; ++step) {
    EXPECT_TRUE(Ask(0)->reply->assignments(0).want_worker_state());
    for (int rank = 0; rank < 2; ++rank) {
      MustEnd(rank, 0, step, true, absl::StrCat("state of ", rank, " after ", step));
      MustEnd(rank, 1, step);
    }
  }
  ASSERT_TRUE(Register(1, /*process=*/77).ok());
  EXPECT_EQ(replies_[1].worker_state(), "state of 1 after 3");
  EXPECT_EQ(replies_[1].worker_state_step(), 3);
  // While a step is on its way to the shards it is not known which state that will be.
  shards_[1]->hold_commits = true;
  for (int rank = 0; rank < 2; ++rank) {
    MustEnd(rank, 0, 4, true, absl::StrCat("state of ", rank, " after 4"));
    MustEnd(rank, 1, 4);
  }
  EXPECT_EQ(Register(1, /*process=*/78).code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(Register(0).ok());  // the same process is only looking
  shards_[1]->hold_commits = false;
  shards_[1]->Release();
  ASSERT_TRUE(Register(1, /*process=*/78).ok());
  EXPECT_EQ(replies_[1].worker_state(), "state of 1 after 4");
  EXPECT_EQ(Ask(1)->reply->assignments(0).step(), 5);
}

TEST_F(LeaderTest, OfTwoLeadersOnOneDirectoryTheOlderEnds) {
  UseCheckpoints(5);
  Start();
  Run(1, 3);
  const auto newer = DirectoryClaim::Take(JoinPath(directory_, "alpha"), "CLAIM", "node7");
  ASSERT_TRUE(newer.ok()) << newer.status();
  Pass(absl::Seconds(1));
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr("the leader of group alpha ends: a newer process"));
  EXPECT_THAT(State().error(), HasSubstr("node7"));
  EXPECT_EQ(superseded_.code(), absl::StatusCode::kFailedPrecondition);
  // It decides nothing more, and sends workers to the newer one instead of away.
  const size_t commits = shards_[0]->commits.size();
  EXPECT_EQ(End(0, 0, 4).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Register(0).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(HeartbeatStatus(0).code(), absl::StatusCode::kUnavailable);
  Pass(absl::Seconds(2));
  EXPECT_EQ(shards_[0]->commits.size(), commits);
}

TEST_F(LeaderTest, RestoringForEverIsAFailure) {
  Start();
  shards_[1]->commit_error = absl::FailedPreconditionError("the push is not staged");
  for (int i = 0; i < 30 && Phase() != GroupState::FAILED; ++i) {
    Register(0).IgnoreError();
    Register(1).IgnoreError();
    EndAll(1);
    Pass(absl::Seconds(1));
  }
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr("the push is not staged"));
}

}  // namespace
}  // namespace codistill
