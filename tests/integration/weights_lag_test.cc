// training.weights_lag: 1 with real daemons: what it promises and what it hides.

#include <string>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/weights.h"

namespace codistill {
namespace {

constexpr int64_t kSteps = 400;

JobConfig LagJob(int lag) {
  JobConfig job = MlpJob("lag", 1);
  job.mutable_groups(0)->set_num_workers(2);
  job.mutable_training()->set_weights_lag(lag);
  job.mutable_stop()->set_steps(kSteps);
  return job;
}

class SyncWeightsLagTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    JobHarness harness(LagJob(1));
    const absl::StatusOr<Weights> weights = harness.TrainToEnd();
    ASSERT_TRUE(weights.ok()) << weights.status();
    undisturbed_ = new Weights(*weights);
  }
  static void TearDownTestSuite() {
    delete undisturbed_;
    undisturbed_ = nullptr;
  }
  void SetUp() override { ASSERT_NE(undisturbed_, nullptr); }

  static Weights* undisturbed_;
};

Weights* SyncWeightsLagTest::undisturbed_ = nullptr;

TEST_F(SyncWeightsLagTest, RunningTheJobAgainRepeatsEveryBit) {
  JobHarness again(LagJob(1));
  const absl::StatusOr<Weights> weights = again.TrainToEnd();
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(weights->version.step(), kSteps);
  EXPECT_EQ(FirstBitDifference(*undisturbed_, *weights), "");
}

TEST_F(SyncWeightsLagTest, IsAnotherModelThanWithoutAndLearnsAsWell) {
  JobHarness without(LagJob(0)), with(LagJob(1));
  double last[2] = {};
  for (JobHarness* harness : {&without, &with}) {
    ASSERT_TRUE(harness->Start().ok());
    const absl::Status done = harness->WaitUntilDone();
    ASSERT_TRUE(done.ok()) << done;
    const auto history = harness->History(0);
    ASSERT_TRUE(history.ok()) << history.status();
    const double first = history->training(0).label_loss();
    double& end = last[harness == &with ? 1 : 0];
    end = history->training(history->training_size() - 1).label_loss();
    EXPECT_LT(end, 0.8 * first);
  }
  EXPECT_NEAR(last[1], last[0], 0.1 * last[0]);
  const auto weights = without.NewestCut(0);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_GT(RelativeDifference(*undisturbed_, *weights), 1e-5);
}

// The new process computes the step on weights that the group has left behind already.
TEST_F(SyncWeightsLagTest, TheLossOfAWorkerEndsWithTheSameWeights) {
  JobHarness harness(LagJob(1), /*restart=*/true);
  ASSERT_TRUE(harness.Start().ok());
  absl::Status status = harness.WaitForStep(0, 60);
  ASSERT_TRUE(status.ok()) << status;
  harness.Kill("alpha.worker.1");
  status = harness.WaitFor("the end of the worker", [&]() -> absl::StatusOr<bool> {
    return harness.member("alpha.worker.1").restarts == 1;
  });
  if (status.ok()) status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  const auto weights = harness.NewestCut(0);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(weights->version.step(), kSteps);
  EXPECT_EQ(FirstBitDifference(*undisturbed_, *weights), "");
  const absl::Status drained = harness.Drain();
  EXPECT_TRUE(drained.ok()) << drained;
}

TEST_F(SyncWeightsLagTest, TheLossOfAShardIsMadeUpFor) {
  JobConfig job = LagJob(1);
  job.mutable_checkpoint()->set_every_steps(25);
  JobHarness harness(job, /*restart=*/true);
  ASSERT_TRUE(harness.Start().ok());
  absl::Status status = harness.WaitForStep(0, 60);
  ASSERT_TRUE(status.ok()) << status;
  harness.Kill("alpha.shard.1");
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  const auto history = harness.History(0);
  ASSERT_TRUE(history.ok()) << history.status();
  EXPECT_GE(history->restores(), 1);
  EXPECT_EQ(history->state().version().step(), kSteps);
}

TEST(AsyncWeightsLagTest, TrainsToTheEndAndEveryPushIsAccountedFor) {
  for (const auto mode : {TrainingConfig::ASYNC, TrainingConfig::BOUNDED_STALENESS}) {
    SCOPED_TRACE(TrainingConfig::UpdateMode_Name(mode));
    JobConfig job = LagJob(1);
    job.mutable_training()->set_update_mode(mode);
    if (mode == TrainingConfig::BOUNDED_STALENESS) job.mutable_training()->set_max_staleness(1);
    job.mutable_training()->mutable_optimizer()->set_learning_rate(0.05);
    JobHarness harness(job);
    ASSERT_TRUE(harness.Start().ok());
    const absl::Status done = harness.WaitUntilDone();
    ASSERT_TRUE(done.ok()) << done;
    const auto history = harness.History(0);
    ASSERT_TRUE(history.ok()) << history.status();
    EXPECT_EQ(history->state().version().step(), kSteps);
    EXPECT_EQ(history->async().too_stale(), 0);
    const double first = history->training(0).label_loss();
    EXPECT_LT(history->training(history->training_size() - 1).label_loss(), 0.9 * first);
  }
}

}  // namespace
}  // namespace codistill
