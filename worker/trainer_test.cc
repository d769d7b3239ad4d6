#include "worker/trainer.h"

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/testing/fake_group.h"
#include "worker/testing/linear_model.h"
#include "worker/trainer_harness.h"

// Undisturbed training: the weights, what is pushed and what is counted.
namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Softmax regression by the textbook, in doubles.
std::vector<double> TextbookWeights(std::vector<double> w, std::vector<double> b, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    std::vector<double> dw(w.size(), 0), db(b.size(), 0);
    for (int64_t r = 0; r < kBatch; ++r) {
      const uint64_t example = (step * kBatch + r) % kEpoch;
      std::vector<double> p(kOutputs);
      double sum = 0;
      for (int64_t o = 0; o < kOutputs; ++o) {
        double z = b[o];
        for (int64_t i = 0; i < kInputs; ++i) z += InputOf(example, i) * w[i * kOutputs + o];
        sum += p[o] = std::exp(z);
      }
      for (int64_t o = 0; o < kOutputs; ++o) {
        const double g = (p[o] / sum - (LabelOf(example) == o ? 1 : 0)) / kBatch;
        db[o] += g;
        for (int64_t i = 0; i < kInputs; ++i) dw[i * kOutputs + o] += g * InputOf(example, i);
      }
    }
    for (size_t i = 0; i < w.size(); ++i) w[i] -= 0.5 * dw[i];
    for (size_t i = 0; i < b.size(); ++i) b[i] -= 0.5 * db[i];
  }
  return w;
}

TEST(TrainerTest, TrainsToTheEnd) {
  TestWorker setup(Job());
  const auto w = setup.group->parameter(0, 0), b = setup.group->parameter(0, 1);
  ASSERT_TRUE(setup.Run().ok());
  ASSERT_EQ(setup.group->step(), kSteps);
  const std::vector<double> expected =
      TextbookWeights({w.begin(), w.end()}, {b.begin(), b.end()}, kSteps);
  const std::vector<float> got = setup.group->parameter(kSteps, 0);
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], expected[i], 1e-5) << i;

  const WorkerCounters counters = setup.progress.counters();
  EXPECT_EQ(counters.steps(), kSteps);
  EXPECT_EQ(counters.examples(), kSteps * kBatch);
  EXPECT_GT(counters.pull_bytes(), 0u);
  EXPECT_GT(counters.compute_seconds(), 0);
  const std::vector<HeartbeatRequest> heartbeats = setup.group->heartbeats();
  ASSERT_FALSE(heartbeats.empty());
  EXPECT_TRUE(heartbeats.back().leaving());
  EXPECT_EQ(heartbeats.back().fatal_error(), "");
  EXPECT_EQ(heartbeats.back().counters().steps(), kSteps);
  for (const FakeGroup::Pushed& push : setup.group->pushes()) {
    EXPECT_EQ(push.end.num_examples(), kBatch);
    EXPECT_EQ(push.end.num_labels(), kBatch);
    EXPECT_GT(push.end.label_loss_sum(), 0);
    EXPECT_FALSE(push.end.used_teacher());
  }
}

TEST(TrainerTest, OutcomesAreCounted) {
  TestWorker setup(Job());
  setup.group->AnswerNext({APPLIED, DROPPED_LATE, REJECTED, TOO_STALE, REJECTED});
  ASSERT_TRUE(setup.Run().ok());
  const WorkerCounters counters = setup.progress.counters();
  EXPECT_EQ(counters.steps(), kSteps - 4);
  EXPECT_EQ(counters.examples(), (kSteps - 4) * kBatch);
  EXPECT_EQ(counters.pushes_dropped(), 1);
  EXPECT_EQ(counters.pushes_rejected(), 2);
  EXPECT_EQ(counters.pushes_too_stale(), 1);
}

TEST(TrainerTest, LogitsThatDoNotFitTheLabelsAreNamed) {
  TestWorker setup(Job());
  setup.batches.extra_rows = 2;
  EXPECT_THAT(setup.Run().ToString(),
              HasSubstr("5 rows of logits for a batch of 5 examples with 7"));
}

TEST(TrainerTest, RecurrentStateIsCarriedWithinAnEpoch) {
  TestWorker setup(Job(), /*recurrent=*/true);
  ASSERT_TRUE(setup.Run().ok());
  EXPECT_THAT(setup.model.first_states(),
              ElementsAre(0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3));
}

TEST(TrainerTest, AsyncPullsWhatThereIsAndLosesWhatFails) {
  JobConfig job = Job();
  job.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  TestWorker worker(job);
  worker.group->AfterStep(4, [&] {
    worker.group->FailNext(FakeGroup::kPush, {absl::UnavailableError("shard 0 is gone")});
  });
  ASSERT_TRUE(worker.Run().ok());
  EXPECT_EQ(worker.group->step(), kSteps);
  EXPECT_EQ(worker.progress.counters().steps(), kSteps);
  EXPECT_EQ(worker.progress.counters().pushes_lost(), 1);
  // At most one was in hand when the group finished.
  EXPECT_LE(worker.progress.counters().pushes_dropped(), 1);
  std::vector<int64_t> steps;
  for (const FakeGroup::Pushed& push : worker.group->pushes()) steps.push_back(push.step);
  EXPECT_THAT(steps, ElementsAre(1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17))
      << "a range is never issued twice";
}

TEST(TrainerTest, RefusesAnotherModel) {
  TestWorker setup(Job());
  LinearModel other(kInputs, kOutputs + 1, false);
  setup.group = std::make_unique<FakeGroup>(setup.job, other.tensors());
  setup.leader = setup.group->leader();
  EXPECT_THAT(setup.Run().ToString(), HasSubstr("archive is not the group's"));
}

}  // namespace
}  // namespace codistill
