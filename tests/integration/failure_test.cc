// Daemons killed with signal 9 in mid-run and started again.

#include <signal.h>

#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/weights.h"

namespace codistill {
namespace {

constexpr int64_t kSteps = 800;

// Long enough that a kill at step 60 is always in its middle.
JobConfig LongJob(const std::string& name, int groups) {
  JobConfig job = MlpJob(name, groups);
  job.mutable_stop()->set_steps(kSteps);
  job.mutable_checkpoint()->set_every_steps(25);
  return job;
}

// One group alone, killing `victim` once step `at` is committed. Final weights.
absl::StatusOr<Weights> TrainThroughLossOf(const std::string& victim, int64_t at, JobConfig job,
                                           int64_t* restores) {
  JobHarness harness(std::move(job), /*restart=*/true);
  absl::Status status = harness.Start();
  if (status.ok()) status = harness.WaitForStep(0, at);
  if (!status.ok()) return status;
  harness.Kill(victim);
  status = harness.WaitFor("the end of the victim", [&]() -> absl::StatusOr<bool> {
    return harness.member(victim).restarts == 1;
  });
  if (status.ok()) status = harness.WaitUntilDone();
  if (!status.ok()) return status;
  const auto history = harness.History(0);
  if (!history.ok()) return history.status();
  *restores = history->restores();
  EXPECT_EQ(history->state().version().step(), kSteps);
  EXPECT_GE(history->examples(), kSteps * 64);  // replays included
  absl::StatusOr<Weights> weights = harness.NewestCut(0);
  const absl::Status drained = harness.Drain();
  EXPECT_TRUE(drained.ok()) << drained;
  return weights;
}

class SyncLossTest : public testing::Test {
 protected:
  static JobConfig Job() {
    JobConfig job = LongJob("loss", 1);
    job.mutable_groups(0)->set_num_workers(2);
    // Slots must come back with the weights, or the end would differ.
    job.mutable_training()->mutable_optimizer()->set_kind(OptimizerConfig::ADAM);
    job.mutable_training()->mutable_optimizer()->set_learning_rate(1e-3);
    return job;
  }

  static void SetUpTestSuite() {
    JobHarness undisturbed(Job());
    const absl::StatusOr<Weights> weights = undisturbed.TrainToEnd();
    ASSERT_TRUE(weights.ok()) << weights.status();
    expected_ = new Weights(*weights);
  }
  static void TearDownTestSuite() {
    delete expected_;
    expected_ = nullptr;
  }

  void SetUp() override { ASSERT_NE(expected_, nullptr) << "no undisturbed run to compare with"; }

  static Weights* expected_;
};

Weights* SyncLossTest::expected_ = nullptr;

TEST_F(SyncLossTest, OfAShardEndsWithTheSameWeights) {
  int64_t restores = 0;
  const auto weights = TrainThroughLossOf("alpha.shard.1", 60, Job(), &restores);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_GE(restores, 1);
  EXPECT_EQ(FirstBitDifference(*expected_, *weights), "");
}

TEST_F(SyncLossTest, OfTheLeaderEndsWithTheSameWeights) {
  int64_t restores = 0;
  const auto weights = TrainThroughLossOf("alpha.shard.0", 60, Job(), &restores);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(FirstBitDifference(*expected_, *weights), "");
}

TEST_F(SyncLossTest, OfAShardBeforeAnyCheckpointStartsAgainFromTheBeginning) {
  JobConfig job = Job();
  job.mutable_checkpoint()->set_every_steps(0);
  int64_t restores = 0;
  const auto weights = TrainThroughLossOf("alpha.shard.1", 30, job, &restores);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_GE(restores, 1);
  EXPECT_EQ(FirstBitDifference(*expected_, *weights), "");
}

TEST_F(SyncLossTest, OfAWorkerEndsWithTheSameWeights) {
  int64_t restores = 0;
  const auto weights = TrainThroughLossOf("alpha.worker.1", 60, Job(), &restores);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(FirstBitDifference(*expected_, *weights), "");
}

// Two groups; alpha loses daemons one after the other.
TEST(CodistillationLossTest, EveryKindOfDaemonMayBeLost) {
  JobHarness harness(LongJob("losses", 2), /*restart=*/true);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  int64_t at = 60;
  for (const std::string victim :
       {"alpha.prediction.0", "alpha.worker.0", "alpha.shard.1", "beta.shard.0", "beta.worker.0"}) {
    SCOPED_TRACE(victim);
    const int group = victim[0] == 'a' ? 0 : 1;
    status = harness.WaitForStep(group, at);
    ASSERT_TRUE(status.ok()) << status;
    const auto history = harness.History(group);
    ASSERT_TRUE(history.ok()) << history.status();
    ASSERT_LT(history->state().version().step(), kSteps) << "too late to be in mid-run";
    harness.Kill(victim);
    status = harness.WaitFor("its successor", [&]() -> absl::StatusOr<bool> {
      return harness.member(victim).restarts == 1;
    });
    ASSERT_TRUE(status.ok()) << status;
    // Training goes on before the next one is lost.
    const auto after = harness.History(group);
    at = (after.ok() ? after->state().version().step() : at) + 40;
  }
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  for (int group = 0; group < 2; ++group) {
    const auto history = harness.History(group);
    ASSERT_TRUE(history.ok()) << history.status();
    EXPECT_EQ(history->state().version().step(), kSteps);
    EXPECT_EQ(history->state().phase(), GroupState::FINISHED);
    EXPECT_GE(history->restores(), 1);
    // The answers of a teacher that came back are used again.
    EXPECT_GT(history->totals().teacher_used_steps(), kSteps / 2);
    ASSERT_GT(history->training_size(), 1);
    EXPECT_LT(history->training(history->training_size() - 1).label_loss(),
              history->training(0).label_loss());
    const auto weights = harness.NewestCut(group);
    ASSERT_TRUE(weights.ok()) << weights.status();
    EXPECT_EQ(weights->version.step(), kSteps);
  }
  status = harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
}

TEST(CodistillationLossTest, TrainingGoesOnWithoutItsTeacher) {
  JobConfig job = MlpJob("skipped", 2);
  job.mutable_stop()->set_steps(1500);
  job.mutable_codistillation()->set_on_teacher_loss(CodistillationConfig::SKIP);
  job.mutable_codistillation()->set_teacher_wait_ms(0);
  JobHarness harness(job, /*restart=*/true);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  // Beta's answers stop coming, without the process being gone.
  harness.member("beta.prediction.0").process.Signal(SIGSTOP);
  const auto before = harness.History(0);
  ASSERT_TRUE(before.ok()) << before.status();
  status = harness.WaitFor("steps of alpha without its teacher", [&]() -> absl::StatusOr<bool> {
    const auto history = harness.History(0);
    if (!history.ok()) return history.status();
    return history->totals().teacher_skipped_steps() >=
           before->totals().teacher_skipped_steps() + 50;
  });
  harness.member("beta.prediction.0").process.Signal(SIGCONT);
  ASSERT_TRUE(status.ok()) << status;
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  status = harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
}

TEST(LossTest, WithoutRestartTheJobNamesTheLostDaemon) {
  JobHarness harness(LongJob("lost", 1), /*restart=*/false);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  status = harness.WaitForStep(0, 20);
  ASSERT_TRUE(status.ok()) << status;
  harness.Kill("alpha.shard.1");
  status = harness.WaitUntilDone();
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.ToString().find("alpha.shard.1 killed by signal 9"), std::string::npos)
      << status;
}

}  // namespace
}  // namespace codistill
