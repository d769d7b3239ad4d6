#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/testing/fake_group.h"
#include "worker/trainer.h"
#include "worker/trainer_harness.h"

// What teachers change in training, and when they are left out.
namespace codistill {
namespace {

using ::testing::FloatNear;
using ::testing::HasSubstr;
using ::testing::Pointwise;

std::vector<float> Floats(const std::string& bytes) {
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

TEST(TrainerTest, BurnInIsBitEqualToTrainingWithoutCodistillation) {
  constexpr int64_t kBurnIn = 9;
  TestWorker without(Job(), false, /*noise=*/0.1f);
  ASSERT_TRUE(without.Run().ok());

  JobConfig job = Job();
  EnableCodistillation(kBurnIn, &job);
  TestWorker with(job, false, /*noise=*/0.1f);
  FixedTeacher teacher;
  with.teachers = &teacher;
  ASSERT_TRUE(with.Run().ok());

  for (int64_t step = 1; step <= kBurnIn; ++step) {
    EXPECT_EQ(with.group->weights(step), without.group->weights(step)) << step;
  }
  EXPECT_NE(with.group->weights(kBurnIn + 1), without.group->weights(kBurnIn + 1));

  // Only steps with a weight ask, and the first of them has its predictions.
  std::vector<int64_t> after;
  for (int64_t step = kBurnIn + 1; step <= kSteps; ++step) after.push_back(step);
  EXPECT_EQ(teacher.requested(), after);
  EXPECT_EQ(teacher.taken(), after);
  const WorkerCounters counters = with.progress.counters();
  EXPECT_EQ(counters.first_step_used(), kBurnIn + 1);
  EXPECT_EQ(counters.teacher_used_steps(), kSteps - kBurnIn);
  EXPECT_EQ(counters.teacher_skipped_steps(), 0);
  EXPECT_EQ(counters.max_staleness_steps(), 3);
  EXPECT_EQ(counters.teacher_requests(), kSteps - kBurnIn);
  int64_t staleness = 0;
  for (int64_t step : after) staleness += step % 4;
  EXPECT_EQ(counters.sum_staleness_steps(), staleness);
  EXPECT_EQ(counters.sum_prefetch_lag_steps(), kSteps - kBurnIn);
  for (const FakeGroup::Pushed& push : with.group->pushes()) {
    EXPECT_EQ(push.end.used_teacher(), push.step > kBurnIn);
    EXPECT_EQ(push.end.teacher_weight(), push.step > kBurnIn ? 1 : 0);
    EXPECT_EQ(push.end.teacher_loss_sum() > 0, push.step > kBurnIn);
  }
}

TEST(TrainerTest, StepsWithoutPredictionsAreTrainedOnLabelsAlone) {
  TestWorker without(Job());
  ASSERT_TRUE(without.Run().ok());
  JobConfig job = Job();
  EnableCodistillation(0, &job);
  TestWorker with(job);
  FixedTeacher teacher;
  teacher.silent_to = 8;  // up to step 7
  with.teachers = &teacher;
  ASSERT_TRUE(with.Run().ok());
  EXPECT_EQ(with.group->weights(7), without.group->weights(7));
  EXPECT_NE(with.group->weights(8), without.group->weights(8));
  EXPECT_EQ(with.progress.counters().teacher_skipped_steps(), 7);
  EXPECT_EQ(with.progress.counters().first_step_used(), 8);
}

TEST(TrainerTest, ATeacherThatHasDivergedIsLeftOut) {
  TestWorker without(Job());
  ASSERT_TRUE(without.Run().ok());
  JobConfig job = Job();
  EnableCodistillation(4, &job);
  TestWorker with(job);
  FixedTeacher teacher;
  teacher.diverged_at = 5;
  with.teachers = &teacher;
  ASSERT_TRUE(with.Run().ok());
  EXPECT_EQ(with.group->weights(5), without.group->weights(5));
  EXPECT_NE(with.group->weights(6), without.group->weights(6));
  EXPECT_EQ(with.progress.counters().teacher_skipped_steps(), 1);
  EXPECT_EQ(with.progress.counters().first_step_used(), 6);
  EXPECT_FALSE(with.group->pushes()[4].end.used_teacher());
}

TEST(TrainerTest, ATeacherOfItsLikeliestClassesTeachesTheSame) {
  // With one class left over the tail is that class: psi is that of all logits.
  JobConfig job = Job();
  EnableCodistillation(4, &job);
  TestWorker dense(job), top_k(job);
  FixedTeacher all, two;
  two.top_k = true;
  dense.teachers = &all;
  top_k.teachers = &two;
  ASSERT_TRUE(dense.Run().ok());
  ASSERT_TRUE(top_k.Run().ok());
  EXPECT_EQ(top_k.progress.counters().teacher_used_steps(), kSteps - 4);
  EXPECT_NE(dense.group->weights(kSteps), dense.group->weights(4));
  EXPECT_THAT(Floats(top_k.group->weights(kSteps)),
              Pointwise(FloatNear(1e-5), Floats(dense.group->weights(kSteps))));
  for (size_t i = 0; i < dense.group->pushes().size(); ++i) {
    EXPECT_NEAR(top_k.group->pushes()[i].end.teacher_loss_sum(),
                dense.group->pushes()[i].end.teacher_loss_sum(), 1e-4);
  }
}

TEST(TrainerTest, ATeacherWhoseClassesMakeNoDistributionIsLeftOut) {
  TestWorker without(Job());
  ASSERT_TRUE(without.Run().ok());
  JobConfig job = Job();
  EnableCodistillation(4, &job);
  TestWorker with(job);
  FixedTeacher teacher;
  teacher.top_k = true;
  teacher.malformed_at = 5;
  with.teachers = &teacher;
  ASSERT_TRUE(with.Run().ok());
  EXPECT_EQ(with.group->weights(5), without.group->weights(5));
  EXPECT_NE(with.group->weights(6), without.group->weights(6));
  EXPECT_EQ(with.progress.counters().teacher_skipped_steps(), 1);
  EXPECT_FALSE(with.group->pushes()[4].end.used_teacher());
}

TEST(TrainerTest, NoMoreStepsArePreparedThanTheJobPrefetches) {
  JobConfig job = Job();
  EnableCodistillation(0, &job);
  job.mutable_codistillation()->set_prefetch(3);
  TestWorker setup(job);
  FixedTeacher teacher;
  setup.teachers = &teacher;
  std::vector<int64_t> ahead;
  for (int64_t step = 1; step <= kSteps; ++step) {
    setup.group->AfterStep(step, [&, step] {
      const int64_t wanted = std::min(step + 3, kSteps);
      EXPECT_TRUE(Eventually([&] { return teacher.requested().back() >= wanted; }));
      ahead.push_back(teacher.requested().back() - step);
    });
  }
  ASSERT_TRUE(setup.Run().ok());
  EXPECT_EQ(*std::max_element(ahead.begin(), ahead.end()), 3);
}

TEST(TrainerTest, ALostTeacherUnderFailFailsTheGroup) {
  JobConfig job = Job();
  EnableCodistillation(3, &job);
  TestWorker setup(job);
  FixedTeacher teacher;
  teacher.error = absl::UnavailableError("no predictions of beta");
  setup.teachers = &teacher;
  EXPECT_THAT(setup.Run().ToString(), HasSubstr("beta"));
  EXPECT_EQ(setup.group->step(), 3);
  EXPECT_THAT(setup.group->heartbeats().back().fatal_error(), HasSubstr("beta"));
}

}  // namespace
}  // namespace codistill
