// training.weights_lag: 1. A step is computed while the push of the one before is decided, on the
// weights that the one before that led to.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/testing/fake_group.h"
#include "worker/trainer_harness.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

JobConfig LagJob(TrainingConfig::UpdateMode mode = TrainingConfig::SYNC) {
  JobConfig job = Job();
  job.mutable_training()->set_weights_lag(1);
  job.mutable_training()->set_update_mode(mode);
  return job;
}

// Gradient of the softmax regression at step `step`'s examples and the given weights, by the
// textbook, in doubles: of W, then of b.
std::vector<double> Gradient(const std::vector<float>& w, const std::vector<float>& b,
                             int64_t step) {
  std::vector<double> gradient(w.size() + b.size(), 0);
  for (int64_t r = 0; r < kBatch; ++r) {
    const uint64_t example = ((step - 1) * kBatch + r) % kEpoch;
    std::vector<double> p(kOutputs);
    double sum = 0;
    for (int64_t o = 0; o < kOutputs; ++o) {
      double z = b[o];
      for (int64_t i = 0; i < kInputs; ++i) {
        z += static_cast<double>(InputOf(example, i)) * w[i * kOutputs + o];
      }
      sum += p[o] = std::exp(z);
    }
    for (int64_t o = 0; o < kOutputs; ++o) {
      const double g = (p[o] / sum - (LabelOf(example) == o ? 1 : 0)) / kBatch;
      gradient[w.size() + o] += g;
      for (int64_t i = 0; i < kInputs; ++i) gradient[i * kOutputs + o] += g * InputOf(example, i);
    }
  }
  return gradient;
}

TEST(WeightsLagTest, EachStepIsTheGradientAtTheWeightsBeforeItsPredecessor) {
  TestWorker setup(LagJob());
  const absl::Status status = setup.Run();
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_EQ(setup.group->step(), kSteps);
  for (int64_t step = 1; step <= kSteps; ++step) {
    SCOPED_TRACE(step);
    const int64_t at = std::max<int64_t>(0, step - 2);
    const std::vector<double> gradient =
        Gradient(setup.group->parameter(at, 0), setup.group->parameter(at, 1), step);
    std::vector<float> before = setup.group->parameter(step - 1, 0);
    std::vector<float> after = setup.group->parameter(step, 0);
    for (const int64_t s : {step - 1, step}) {
      std::vector<float>& all = s == step ? after : before;
      for (const float value : setup.group->parameter(s, 1)) all.push_back(value);
    }
    for (size_t i = 0; i < gradient.size(); ++i) {
      EXPECT_NEAR(before[i] - 0.5 * gradient[i], after[i], 1e-5) << i;
    }
    // A buffer goes on from the pulled set, not from what the step before left in memory.
    int64_t seen = 0;
    const std::string weights = setup.group->weights(step);
    std::memcpy(&seen, weights.data() + weights.size() - sizeof(seen), sizeof(seen));
    EXPECT_EQ(seen, (step + 1) / 2);
  }
  EXPECT_EQ(setup.progress.counters().steps(), kSteps);
  EXPECT_TRUE(setup.group->heartbeats().back().leaving());
}

TEST(WeightsLagTest, RepeatsBitForBitAndIsAnotherModelThanWithoutLag) {
  TestWorker first(LagJob(), /*recurrent=*/true, 0.1f), second(LagJob(), /*recurrent=*/true, 0.1f);
  TestWorker without(Job(), /*recurrent=*/true, 0.1f);
  ASSERT_TRUE(first.Run().ok());
  ASSERT_TRUE(second.Run().ok());
  ASSERT_TRUE(without.Run().ok());
  EXPECT_EQ(first.group->weights(kSteps), second.group->weights(kSteps));
  EXPECT_NE(first.group->weights(kSteps), without.group->weights(kSteps));
  // What does not depend on weights is the same.
  EXPECT_EQ(first.model.seeds(), without.model.seeds());
  EXPECT_EQ(first.model.first_states(), without.model.first_states());
}

TEST(WeightsLagTest, TheNextStepIsComputedWhileADecisionIsOutstanding) {
  for (const int lag : {0, 1}) {
    JobConfig job = LagJob();
    job.mutable_training()->set_weights_lag(lag);
    TestWorker worker(job);
    worker.group->ParkPushOf(5);
    auto trainer = worker.MakeTrainer();
    std::thread other([&] {
      // The pull of what the push of step 5 leads to waits too; with lag, that of step 5 is for
      // step 7, which is one too many.
      EXPECT_TRUE(Eventually([&] { return worker.group->parked() == 1; }));
      trainer->Drain();
    });
    const absl::Status status = trainer->Run();
    other.join();
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(worker.group->step(), 4);
    EXPECT_EQ(worker.model.seeds().size(), static_cast<size_t>(5 + lag));
    EXPECT_EQ(worker.progress.counters().steps(), 4);
    EXPECT_TRUE(worker.group->heartbeats().back().leaving());
  }
}

TEST(WeightsLagTest, TransfersThatFailAreRepeatedInOrder) {
  JobConfig job = LagJob();
  EnableCodistillation(2, &job);
  TestWorker steady(job, /*recurrent=*/true, 0.1f), shaken(job, /*recurrent=*/true, 0.1f);
  FixedTeacher teacher, other;
  steady.teachers = &teacher;
  shaken.teachers = &other;
  ASSERT_TRUE(steady.Run().ok());
  const absl::Status gone = absl::UnavailableError("shard 0 (shard:1) is gone");
  shaken.group->AfterStep(3, [&] { shaken.group->FailNext(FakeGroup::kPull, {gone, gone}); });
  shaken.group->AfterStep(6, [&] { shaken.group->FailNext(FakeGroup::kPush, {gone}); });
  shaken.group->AfterStep(9, [&] { shaken.group->FailNext(FakeGroup::kPush, {gone, gone}); });
  shaken.group->AfterStep(12, [&] {
    shaken.group->FailNext(FakeGroup::kAssign, {gone});
    shaken.group->FailNext(FakeGroup::kRegister, {gone, gone});
    shaken.group->FailNext(FakeGroup::kHeartbeat, {gone, gone});
  });
  const absl::Status status = shaken.Run();
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(shaken.group->weights(kSteps), steady.group->weights(kSteps));
  EXPECT_EQ(shaken.progress.counters().steps(), kSteps);
  std::vector<int64_t> taken = other.taken();
  std::vector<int64_t> once = taken;
  std::sort(once.begin(), once.end());
  EXPECT_TRUE(std::adjacent_find(once.begin(), once.end()) == once.end())
      << "a repeated step keeps the predictions it has";
  EXPECT_EQ(taken, once);
}

TEST(WeightsLagTest, AnAnswerLostIsNotAStepLost) {
  TestWorker steady(LagJob(), /*recurrent=*/true), shaken(LagJob(), /*recurrent=*/true);
  ASSERT_TRUE(steady.Run().ok());
  for (const int64_t step : {4, 9}) {
    shaken.group->AfterStep(step, [&] {
      shaken.group->LoseNextAnswers(1, absl::UnavailableError("connection reset"));
    });
  }
  const absl::Status status = shaken.Run();
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(shaken.group->step(), kSteps);
  // The recurrent state goes on, too.
  EXPECT_EQ(shaken.group->weights(kSteps), steady.group->weights(kSteps));
}

TEST(WeightsLagTest, OutcomesAreCountedAndTheRestGoesOn) {
  TestWorker setup(LagJob());
  setup.group->AnswerNext({APPLIED, REJECTED, APPLIED, REJECTED});
  ASSERT_TRUE(setup.Run().ok());
  const WorkerCounters counters = setup.progress.counters();
  EXPECT_EQ(counters.steps(), kSteps - 2);
  EXPECT_EQ(counters.pushes_rejected(), 2);
}

TEST(WeightsLagTest, ARestoredGroupBeginsWithTheWeightsThereAre) {
  std::string weights;
  for (int run = 0; run < 2; ++run) {
    TestWorker restored(LagJob(), /*recurrent=*/true);
    restored.group->WantWorkerState(6);
    restored.group->AfterStep(8, [&] { restored.group->Restore(6); });
    restored.group->AfterStep(12, [&] { restored.group->Restore(12); });
    const absl::Status status = restored.Run();
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(restored.group->generation(), 3u);
    EXPECT_EQ(restored.group->step(), kSteps);
    if (run == 0) weights = restored.group->weights(8);
    EXPECT_EQ(restored.group->weights(8), weights);
  }
}

TEST(WeightsLagTest, DrainWaitsForThePushUnderWay) {
  JobConfig job = LagJob();
  job.mutable_stop()->set_steps(1000000000);
  TestWorker setup(job);
  auto trainer = setup.MakeTrainer();
  setup.group->AfterStep(5, [&] { trainer->Drain(); });
  ASSERT_TRUE(trainer->Run().ok());
  EXPECT_GE(setup.group->step(), 5);
  EXPECT_LE(setup.group->step(), 6);
  EXPECT_EQ(setup.progress.counters().steps(), setup.group->step());
  EXPECT_TRUE(setup.group->heartbeats().back().leaving());
}

TEST(WeightsLagTest, ABadRecordLeavesTheStepsBeforeItTrained) {
  TestWorker setup(LagJob());
  setup.batches.bad_from = 7 * kBatch;
  EXPECT_THAT(setup.Run().ToString(), HasSubstr("train.csv:17"));
  EXPECT_EQ(setup.group->step(), 7);
  EXPECT_EQ(setup.progress.counters().steps(), 7);
}

TEST(WeightsLagTest, ANewerProcessEndsAWaitingOne) {
  TestWorker worker(LagJob());
  worker.group->ParkPushOf(5);
  auto trainer = worker.MakeTrainer();
  std::thread other([&] {
    EXPECT_TRUE(Eventually([&] { return worker.group->parked() == 1; }));
    worker.group->FailAlways(FakeGroup::kHeartbeat, absl::FailedPreconditionError("newer"));
  });
  EXPECT_TRUE(absl::IsFailedPrecondition(trainer->Run()));
  other.join();
}

TEST(WeightsLagTest, AsyncGoesOnAndLosesWhatFails) {
  TestWorker worker(LagJob(TrainingConfig::ASYNC));
  worker.group->AfterStep(4, [&] {
    worker.group->FailNext(FakeGroup::kPush, {absl::UnavailableError("shard 0 is gone")});
  });
  const absl::Status status = worker.Run();
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(worker.group->step(), kSteps);
  EXPECT_EQ(worker.progress.counters().steps(), kSteps);
}

TEST(WeightsLagTest, AModelWithOneSetIsRefused) {
  TestWorker worker(Job());
  worker.job.mutable_training()->set_weights_lag(1);
  Trainer::Options options;
  options.job = worker.job;
  options.leader = worker.leader.get();
  options.model = &worker.model;
  options.batches = &worker.batches;
  options.progress = &worker.progress;
  EXPECT_THAT(Trainer::Create(std::move(options)).status().ToString(),
              HasSubstr("training.weights_lag"));
}

}  // namespace
}  // namespace codistill
