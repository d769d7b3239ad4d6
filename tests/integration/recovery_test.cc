// How soon training moves again after a loss, what an asynchronous group keeps, and which of two
// processes gives way.

#include <signal.h>

#include <cstdint>
#include <iostream>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "control/child_process.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

constexpr absl::Duration kRecovery = absl::Seconds(10);

JobConfig Job(TrainingConfig::UpdateMode mode) {
  JobConfig job = MlpJob("recovery", 1);
  job.mutable_groups(0)->set_num_workers(2);
  job.mutable_training()->set_update_mode(mode);
  job.mutable_stop()->set_steps(1'000'000);
  job.mutable_checkpoint()->set_every_steps(50);
  return job;
}

class RecoveryTest : public testing::TestWithParam<TrainingConfig::UpdateMode> {};

TEST_P(RecoveryTest, TrainingMovesAgainWithinTenSecondsOfAShardsRestart) {
  JobHarness harness(Job(GetParam()), /*restart=*/true);
  absl::Status status = harness.Start();
  if (status.ok()) status = harness.WaitForStep(0, 120);
  ASSERT_TRUE(status.ok()) << status;
  const auto before = harness.State(0);
  ASSERT_TRUE(before.ok()) << before.status();
  harness.Kill("alpha.shard.1");
  status = harness.WaitFor("the end of the shard", [&]() -> absl::StatusOr<bool> {
    return harness.member("alpha.shard.1").restarts == 1;
  });
  ASSERT_TRUE(status.ok()) << status;
  const absl::Time restarted = absl::Now();
  // What the workers count goes up again when their pushes are applied, and only then.
  const auto applied = [&]() -> absl::StatusOr<int64_t> {
    const auto leader = harness.StatusOf("alpha.shard.0");
    if (!leader.ok()) return leader.status();
    return leader->group_state().phase() == GroupState::TRAINING ? leader->history().examples()
                                                                 : -1;
  };
  int64_t base = -1;
  status = harness.WaitFor("steps after the loss", [&]() -> absl::StatusOr<bool> {
    const auto examples = applied();
    if (!examples.ok() || *examples < 0) return false;
    // SYNC goes back to its checkpoint first.
    if (base < 0 || *examples < base) base = *examples;
    return *examples > base;
  });
  ASSERT_TRUE(status.ok()) << status;
  const absl::Duration took = absl::Now() - restarted;
  std::cout << TrainingConfig::UpdateMode_Name(GetParam()) << ": training moved again "
            << absl::FormatDuration(took) << " after the restart\n";
  EXPECT_LT(took, kRecovery);
  const auto after = harness.StatusOf("alpha.shard.0");
  ASSERT_TRUE(after.ok()) << after.status();
  if (GetParam() == TrainingConfig::SYNC) {
    EXPECT_GT(after->generation(), before->version().generation());
  } else {
    EXPECT_EQ(after->generation(), before->version().generation());
    EXPECT_GE(after->history().async().shard_reloads(), 1);
    EXPECT_EQ(after->history().restores(), 0);
    EXPECT_GE(after->step(), before->version().step());
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, RecoveryTest,
                         testing::Values(TrainingConfig::SYNC, TrainingConfig::ASYNC),
                         [](const auto& info) {
                           return TrainingConfig::UpdateMode_Name(info.param);
                         });

TEST(LeaderRecoveryTest, ARestartedLeaderGoesOnWithWhatIsLeft) {
  JobHarness harness(Job(TrainingConfig::ASYNC), /*restart=*/true);
  absl::Status status = harness.Start();
  if (status.ok()) status = harness.WaitForStep(0, 120);
  ASSERT_TRUE(status.ok()) << status;
  const auto before = harness.State(0);
  ASSERT_TRUE(before.ok()) << before.status();
  harness.Kill("alpha.shard.0");
  status = harness.WaitFor("the next leader", [&]() -> absl::StatusOr<bool> {
    return harness.member("alpha.shard.0").restarts == 1;
  });
  ASSERT_TRUE(status.ok()) << status;
  const absl::Time restarted = absl::Now();
  status = harness.WaitForStep(0, before->version().step() + 60);
  ASSERT_TRUE(status.ok()) << status;
  std::cout << "ASYNC: 60 steps further " << absl::FormatDuration(absl::Now() - restarted)
            << " after the leader's restart\n";
  const auto after = harness.State(0);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->version().generation(), before->version().generation());
}

class TwoOfOneIndexTest : public testing::TestWithParam<int> {};

// Two processes of one index on one directory, as when somebody starts a job a second time or a
// machine that was taken for dead comes back: the older ends by itself and says why.
TEST_P(TwoOfOneIndexTest, TheOlderEnds) {
  JobHarness harness(Job(TrainingConfig::SYNC), /*restart=*/false);
  absl::Status status = harness.Start();
  if (status.ok()) status = harness.WaitForStep(0, 60);
  ASSERT_TRUE(status.ok()) << status;
  const std::string log = NewDirectory("second") + "/log";
  auto second = ChildProcess::Start(
      {RunfilesBinaries().parameter_server, "--job=" + harness.directory().job(), "--group=alpha",
       absl::StrCat("--shard=", GetParam()), "--port=0", "--http_port=0"},
      log);
  ASSERT_TRUE(second.ok()) << second.status();
  const std::string name = absl::StrCat("alpha.shard.", GetParam());
  FleetMember* older = nullptr;
  for (const auto& member : harness.fleet().members()) {
    if (member->name == name) older = member.get();
  }
  ASSERT_NE(older, nullptr);
  for (const absl::Time end = absl::Now() + kPatience; absl::Now() < end;) {
    if (older->process.Poll()) break;
    absl::SleepFor(absl::Milliseconds(20));
  }
  ASSERT_TRUE(older->process.Poll());
  EXPECT_EQ(older->process.Poll()->exit_code, 1) << older->process.Poll()->ToString();
  EXPECT_THAT(TailOfFile(harness.fleet().LogPath(*older), 12),
              HasSubstr("a newer process has taken this one's place"));
  EXPECT_FALSE(second->Poll()) << second->Poll()->ToString() << TailOfFile(log, 20);
  second->Signal(SIGKILL);
}

INSTANTIATE_TEST_SUITE_P(Shards, TwoOfOneIndexTest, testing::Values(0, 1),
                         [](const auto& info) { return info.param == 0 ? "Leader" : "Shard"; });

}  // namespace
}  // namespace codistill
