#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/leader.h"
#include "server/leader_harness.h"

// Steering and watching a group: pause, drain, observers, the status for people.
namespace codistill {
namespace {

using ::testing::HasSubstr;

TEST_F(LeaderTest, PauseHoldsBackWhatNobodyHas) {
  Start();
  Ask(0, 0, 2);
  ASSERT_TRUE(leader_->Pause().ok());
  EXPECT_EQ(Phase(), GroupState::PAUSED);
  const auto second = Ask(1, 0, 5);  // needs what rank 0 has, and no more
  ASSERT_TRUE(second->answered);
  EXPECT_EQ(second->reply->assignments_size(), 2);
  EndAll(1);
  EndAll(2);
  EXPECT_EQ(StepNow(), 2);
  const auto asked = Ask(0);
  EXPECT_FALSE(asked->answered);
  ASSERT_TRUE(leader_->Resume().ok());
  EXPECT_TRUE(asked->answered);
  EXPECT_EQ(asked->reply->assignments(0).step(), 3);
}

TEST_F(LeaderTest, PauseIsNoReasonToMissAWorker) {
  Start();
  ASSERT_TRUE(leader_->Pause().ok());
  Pass(absl::Minutes(3));
  EXPECT_EQ(Phase(), GroupState::PAUSED);
  ASSERT_TRUE(leader_->Resume().ok());
  Pass(absl::Seconds(30));
  EXPECT_EQ(Phase(), GroupState::TRAINING);
}

TEST_F(LeaderTest, DrainLetsWorkersLeaveAndWritesACheckpoint) {
  UseCheckpoints(0);
  Start();
  Run(1, 7);
  const auto parked = Ask(0, 12);
  absl::Status drained = absl::UnknownError("not yet");
  leader_->Drain([&](absl::Status status) { drained = status; });
  EXPECT_EQ(Phase(), GroupState::DRAINING);
  ASSERT_TRUE(parked->answered);
  EXPECT_TRUE(parked->reply->finished());
  EndAll(8);  // the step in hand still counts
  Pass(absl::Seconds(1));
  EXPECT_EQ(drained.code(), absl::StatusCode::kUnknown);
  HeartbeatStatus(0, "", true).IgnoreError();
  HeartbeatStatus(1, "", true).IgnoreError();
  Pass(absl::Milliseconds(300));
  EXPECT_TRUE(drained.ok()) << drained;
  EXPECT_THAT(Files(), testing::Contains("MANIFEST-1-8"));
  Start();
  EXPECT_EQ(StepNow(), 8);
}

TEST_F(LeaderTest, DrainKeepsTheStateOfRecurrentWorkers) {
  UseCheckpoints(0);
  job_.mutable_model()->add_states();
  Start();
  Run(1, 6);
  const auto asked = Ask(0);
  ASSERT_TRUE(asked->answered);
  EXPECT_TRUE(asked->reply->assignments(0).want_worker_state());
  for (int rank = 0; rank < 2; ++rank) {
    for (int shard = 0; shard < kShards; ++shard) {
      MustEnd(rank, shard, 7, true, shard == 0 ? absl::StrCat("state of rank ", rank) : "");
    }
  }
  // Nobody knew at step 7 that a drain would follow; nor does the next leader take a step.
  for (int leader = 0; leader < 2; ++leader) {
    absl::Status drained = absl::UnknownError("not yet");
    leader_->Drain([&](absl::Status status) { drained = status; });
    for (int rank = 0; rank < 2; ++rank) HeartbeatStatus(rank, "", /*leaving=*/true).IgnoreError();
    Pass(absl::Milliseconds(300));
    EXPECT_TRUE(drained.ok()) << drained;
    Start();
    EXPECT_EQ(StepNow(), 7);
    for (int rank = 0; rank < 2; ++rank) {
      EXPECT_EQ(replies_[rank].worker_state(), absl::StrCat("state of rank ", rank));
      EXPECT_EQ(replies_[rank].worker_state_step(), 7);
    }
  }
}

TEST_F(LeaderTest, DrainAnswersWhoWaitsForACheckpoint) {
  UseCheckpoints(0);
  Start();
  Run(1, 2);
  ASSERT_TRUE(Ask(0)->answered);  // step 3 and more are handed out, and will not come
  absl::StatusOr<CheckpointReply> reply = absl::UnknownError("not yet");
  leader_->Checkpoint([&](absl::StatusOr<CheckpointReply> r) { reply = std::move(r); });
  Pass(absl::Milliseconds(300));
  ASSERT_EQ(reply.status().code(), absl::StatusCode::kUnknown);
  absl::Status drained = absl::UnknownError("not yet");
  leader_->Drain([&](absl::Status status) { drained = status; });
  for (int rank = 0; rank < 2; ++rank) HeartbeatStatus(rank, "", /*leaving=*/true).IgnoreError();
  Pass(absl::Milliseconds(300));
  EXPECT_TRUE(drained.ok()) << drained;
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->version().step(), 2);
}

TEST_F(LeaderTest, DrainDoesNotWaitForEver) {
  UseCheckpoints(0);
  Start();
  Run(1, 2);
  absl::Status drained = absl::UnknownError("not yet");
  leader_->Drain([&](absl::Status status) { drained = status; });
  Pass(absl::Seconds(6));
  EXPECT_TRUE(drained.ok()) << drained;
  EXPECT_THAT(Files(), testing::Contains("MANIFEST-1-2"));
}

TEST_F(LeaderTest, DrainAtAStepThatHasACheckpointWritesNoOther) {
  UseCheckpoints(5);
  Start();
  Run(1, 5);
  HeartbeatStatus(0, "", true).IgnoreError();
  HeartbeatStatus(1, "", true).IgnoreError();
  const size_t writes = shards_[0]->writes.size();
  absl::Status drained = absl::UnknownError("not yet");
  leader_->Drain([&](absl::Status status) { drained = status; });
  Pass(absl::Seconds(1));
  EXPECT_TRUE(drained.ok());
  EXPECT_EQ(shards_[0]->writes.size(), writes);
}

TEST_F(LeaderTest, ObserversHearOfChangesAndOfSilence) {
  struct Counter : GroupObserver {
    void OnGroupChange() override { ++calls; }
    int calls = 0;
  };
  Start();
  auto counter = std::make_shared<Counter>();
  leader_->Observe(counter);
  Pass(absl::Seconds(2));
  const int idle = counter->calls;
  EXPECT_GE(idle, 1);
  EXPECT_LE(idle, 4);
  EndAll(1);
  leader_->Tick();
  EXPECT_EQ(counter->calls, idle + 1);
  EndAll(2);
  EndAll(3);
  leader_->Tick();
  EXPECT_EQ(counter->calls, idle + 1);  // not more often than every 20 ms
  clock_.Advance(absl::Milliseconds(20));
  leader_->Tick();
  EXPECT_EQ(counter->calls, idle + 2);  // once for all that happened
  counter.reset();
  Pass(absl::Seconds(2));  // nobody is called
}

TEST_F(LeaderTest, StatusIsForPeople) {
  Start();
  Run(1, 3);
  Pass(absl::Seconds(3));
  MustEnd(1, 0, 4);
  DaemonStatus status;
  leader_->FillStatus(&status);
  EXPECT_EQ(status.state(), "training");
  EXPECT_THAT(status.detail(), HasSubstr("step 3 of 20"));
  EXPECT_THAT(status.detail(), HasSubstr("waiting for the pushes of ranks 0, 1"));
  EXPECT_EQ(status.members_size(), 2);
  EXPECT_EQ(status.step(), 3);
}

}  // namespace
}  // namespace codistill
