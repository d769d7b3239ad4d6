#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/leader.h"
#include "server/leader_harness.h"

// Checkpoints of a group: when they are written, what of them is kept and taken up again.
namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST_F(LeaderTest, NextLeaderTakesUpTheNewestCheckpoint) {
  UseCheckpoints(5);
  Start();
  Run(1, 4);
  Ask(0);
  Ask(1);
  MustEnd(0, 0, 5, true, "state of rank 0");
  MustEnd(0, 1, 5);
  MustEnd(1, 0, 5);
  MustEnd(1, 1, 5);
  Run(6, 7);
  EXPECT_THAT(Files(), ElementsAre("CLAIM", "CLAIM-1", "GENERATION", "MANIFEST-1-5",
                                   "shard-0-of-2-1-5-0", "shard-1-of-2-1-5-0"));
  Start();  // another leader, as after a crash
  EXPECT_EQ(State().version().generation(), 2u);
  EXPECT_EQ(StepNow(), 5);
  EXPECT_EQ(replies_[0].worker_state(), "state of rank 0");
  EXPECT_EQ(replies_[0].worker_state_step(), 5);
  EXPECT_EQ(replies_[1].worker_state(), "");
  EXPECT_EQ(leader_->GetHistory().restores(), 1);
  EXPECT_EQ(leader_->GetHistory().examples(), 40);
  EXPECT_EQ(Ask(0)->reply->assignments(0).first_example(), 40u);
  Run(6, 20);
  EXPECT_EQ(Phase(), GroupState::FINISHED);
  EXPECT_THAT(Files(), testing::Contains("MANIFEST-2-20"));
  Start();  // of a finished group
  EXPECT_EQ(Phase(), GroupState::FINISHED);
  EXPECT_EQ(State().newest_cut().step(), 20);
}

TEST_F(LeaderTest, WorkersThatOutliveTheLeaderAreCountedOnce) {
  UseCheckpoints(5);
  Start();
  const auto beat = [&](int64_t steps) {
    HeartbeatRequest request;
    request.set_rank(0);
    request.set_incarnation(replies_[0].incarnation());
    request.mutable_counters()->set_steps(steps);
    ASSERT_TRUE(leader_->Heartbeat(request).ok());
  };
  Run(1, 4);
  beat(4);
  Run(5, 5);
  Start();  // another leader, which the same processes register with
  EXPECT_EQ(leader_->GetHistory().totals().steps(), 4);
  beat(6);
  EXPECT_EQ(leader_->GetHistory().totals().steps(), 6);
}

TEST_F(LeaderTest, DamagedCheckpointsArePassedOver) {
  UseCheckpoints(5);
  Start();
  Run(1, 12);
  const std::string newest = JoinPath(directory_, "alpha", "shard-1-of-2-1-10-0");
  auto bytes = ReadFile(newest, 1 << 20);
  ASSERT_TRUE(bytes.ok());
  bytes->back() ^= 1;
  ASSERT_TRUE(WriteFileAtomically(newest, *bytes).ok());
  Start();
  EXPECT_EQ(StepNow(), 5);
  // All of them damaged: people decide.
  leader_.reset();
  const std::string older = JoinPath(directory_, "alpha", "shard-0-of-2-1-5-0");
  ASSERT_TRUE(FileSystem::Real()->RemoveFile(older).ok());
  Make();
  Pass(absl::Seconds(1));
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr(newest));
  EXPECT_THAT(State().error(), HasSubstr(older));
}

TEST_F(LeaderTest, CheckpointAShardCannotLoadIsPassedOver) {
  UseCheckpoints(5);
  Start();
  Run(1, 12);
  shards_[1]->restore_error = absl::DataLossError("the data of entry 0 is damaged");
  shards_[1]->restore_errors = 1;
  shards_[1]->nonce = 300;
  Pass(absl::Seconds(2));
  EXPECT_EQ(StepNow(), 5);
}

TEST_F(LeaderTest, TheSecondLeaderTakesTheDirectory) {
  UseCheckpoints(5);
  Start();
  const std::unique_ptr<GroupLeader> first = std::move(leader_);
  Make();
  Pass(absl::Seconds(1));  // waits for the first, which hangs
  EXPECT_EQ(Phase(), GroupState::STARTING);
  EXPECT_EQ(State().version().generation(), 2u);
  first->Tick();
  EXPECT_EQ(first->State(false).phase(), GroupState::FAILED);
  EXPECT_THAT(first->State(false).error(), HasSubstr(JoinPath(directory_, "alpha")));
  EXPECT_EQ(superseded_.code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(LeaderTest, CheckpointOfAnotherJobIsRefused) {
  UseCheckpoints(5);
  Start();
  Run(1, 5);
  job_.mutable_training()->mutable_optimizer()->set_kind(OptimizerConfig::ADAM);
  Make();
  Pass(absl::Seconds(1));
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr("another optimizer: SGD, the job has ADAM"));
}

TEST_F(LeaderTest, FullDiskFailsTheGroupAndKeepsTheOlderCheckpoint) {
  UseCheckpoints(5);
  Start();
  Run(1, 9);
  shards_[1]->write_error = absl::ResourceExhaustedError("write shard-1-of-2: No space left");
  Run(10, 10);
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr("write shard-1-of-2: No space left"));
  shards_[1]->write_error = absl::OkStatus();
  Start();
  EXPECT_EQ(StepNow(), 5);
  EXPECT_THAT(Files(), testing::Not(testing::Contains("shard-0-of-2-1-10-0")));  // swept
}

TEST_F(LeaderTest, FullDiskAtTheManifest) {
  UseCheckpoints(5);
  Start();
  Run(1, 9);
  disk_.FailWritesAfter(0);  // shards write elsewhere
  Run(10, 10);
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr("MANIFEST-1-10"));
  disk_.Heal();
  Start();
  EXPECT_EQ(StepNow(), 5);
}

TEST_F(LeaderTest, TrainingGoesOnWhileACheckpointIsWritten) {
  UseCheckpoints(5);
  Start();
  Run(1, 4);
  shards_[0]->hold_writes = true;
  Run(5, 9);
  EXPECT_EQ(StepNow(), 9);
  // The next snapshot waits for the first to be on disk.
  EndAll(10);
  EXPECT_EQ(StepNow(), 9);
  shards_[0]->hold_writes = false;
  shards_[0]->Release();
  EXPECT_EQ(StepNow(), 10);
  EXPECT_THAT(Files(), testing::Contains("MANIFEST-1-10"));
}

TEST_F(LeaderTest, KeepsSoManyCheckpoints) {
  UseCheckpoints(2);
  job_.mutable_checkpoint()->set_keep(3);
  Start();
  Run(1, 20);
  int manifests = 0;
  for (const std::string& name : Files()) manifests += name.rfind("MANIFEST", 0) == 0 ? 1 : 0;
  EXPECT_EQ(manifests, 3);
  EXPECT_EQ(Files().size(), 3u + 3 * 3);  // CLAIM, CLAIM-1 and GENERATION
}

TEST_F(LeaderTest, CheckpointOnRequestBringsWorkerState) {
  UseCheckpoints(0);
  Start();
  Ask(0, 0, 2);
  absl::StatusOr<CheckpointReply> reply = absl::UnknownError("not answered");
  leader_->Checkpoint([&](absl::StatusOr<CheckpointReply> answer) { reply = std::move(answer); });
  EndAll(1);
  const auto asked = Ask(0, 3, 2);
  ASSERT_EQ(asked->reply->assignments_size(), 1);
  EXPECT_TRUE(asked->reply->assignments(0).want_worker_state());
  EndAll(2);
  EXPECT_FALSE(reply.ok());
  EndAll(3);
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->version().step(), 3);
  EXPECT_THAT(reply->manifest(), HasSubstr("MANIFEST-1-3"));
  EXPECT_GT(reply->bytes(), 0u);
}

TEST_F(LeaderTest, CheckpointWhilePausedIsOfThePresentStep) {
  UseCheckpoints(0);
  Start();
  Run(1, 3);
  ASSERT_TRUE(leader_->Pause().ok());
  absl::StatusOr<CheckpointReply> reply = absl::UnknownError("not answered");
  leader_->Checkpoint([&](absl::StatusOr<CheckpointReply> answer) { reply = std::move(answer); });
  Pass(absl::Seconds(1));
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->version().step(), 3);
  EXPECT_TRUE(shards_[0]->commits.back().checkpoint());
  EXPECT_EQ(shards_[0]->commits.back().contributors_size(), 0);
  EXPECT_EQ(StepNow(), 3);
}

TEST_F(LeaderTest, CheckpointWithoutDirectoryIsRefused) {
  Start();
  absl::Status status;
  leader_->Checkpoint([&](absl::StatusOr<CheckpointReply> answer) { status = answer.status(); });
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace codistill
