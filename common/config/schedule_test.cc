#include "common/config/schedule.h"

#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

JobConfig Job(int groups) {
  JobConfig job;
  job.mutable_stop()->set_steps(100);
  job.mutable_training()->mutable_optimizer()->set_learning_rate(0.5f);
  for (int i = 0; i < groups; ++i) job.add_groups();
  return job;
}

Schedule* RateSchedule(JobConfig* job) {
  return job->mutable_training()->mutable_optimizer()->mutable_schedule();
}

TEST(LearningRate, Constant) {
  const JobConfig job = Job(1);
  EXPECT_EQ(LearningRateAt(job, 1), 0.5);
  EXPECT_EQ(LearningRateAt(job, 1000), 0.5);
}

TEST(LearningRate, LinearGoesFromTheRateToTheFloorAndStays) {
  JobConfig job = Job(1);
  RateSchedule(&job)->set_kind(Schedule::LINEAR);
  RateSchedule(&job)->set_end_factor(0.2f);
  RateSchedule(&job)->set_decay_steps(50);
  EXPECT_DOUBLE_EQ(LearningRateAt(job, 1), 0.5);
  EXPECT_NEAR(LearningRateAt(job, 26), 0.5 * 0.6, 1e-8);
  EXPECT_NEAR(LearningRateAt(job, 51), 0.1, 1e-8);
  EXPECT_NEAR(LearningRateAt(job, 100), 0.1, 1e-8);
}

TEST(LearningRate, DecayLastsUntilTheStopWhereNothingIsSaid) {
  JobConfig job = Job(1);
  RateSchedule(&job)->set_kind(Schedule::COSINE);
  EXPECT_DOUBLE_EQ(LearningRateAt(job, 1), 0.5);
  EXPECT_NEAR(LearningRateAt(job, 51), 0.25, 1e-12);
  EXPECT_NEAR(LearningRateAt(job, 101), 0, 1e-12);
  EXPECT_GT(LearningRateAt(job, 100), 0);  // no step is wasted
}

TEST(LearningRate, StepsAtItsBoundaries) {
  JobConfig job = Job(1);
  RateSchedule(&job)->set_kind(Schedule::STEP);
  RateSchedule(&job)->add_step_boundaries(10);
  RateSchedule(&job)->add_step_boundaries(20);
  EXPECT_DOUBLE_EQ(LearningRateAt(job, 9), 0.5);
  EXPECT_NEAR(LearningRateAt(job, 10), 0.05, 1e-8);
  EXPECT_NEAR(LearningRateAt(job, 19), 0.05, 1e-8);
  EXPECT_NEAR(LearningRateAt(job, 20), 0.005, 1e-8);
}

TEST(LearningRate, WarmUpMultipliesTheRest) {
  JobConfig job = Job(1);
  RateSchedule(&job)->set_warmup_steps(10);
  EXPECT_DOUBLE_EQ(LearningRateAt(job, 1), 0.05);
  EXPECT_DOUBLE_EQ(LearningRateAt(job, 10), 0.5);
  EXPECT_DOUBLE_EQ(LearningRateAt(job, 11), 0.5);
  RateSchedule(&job)->set_kind(Schedule::LINEAR);
  EXPECT_NEAR(LearningRateAt(job, 6), 0.5 * 0.6 * 0.95, 1e-12);
}

TEST(WeightDecay, HasAScheduleOfItsOwn) {
  JobConfig job = Job(1);
  OptimizerConfig* optimizer = job.mutable_training()->mutable_optimizer();
  EXPECT_EQ(WeightDecayAt(job, 1), 0);
  optimizer->set_weight_decay(0.25f);
  RateSchedule(&job)->set_kind(Schedule::LINEAR);
  EXPECT_EQ(WeightDecayAt(job, 80), 0.25);
  Schedule* schedule = optimizer->mutable_weight_decay_schedule();
  schedule->set_kind(Schedule::COSINE);
  schedule->set_end_factor(2);  // growing is allowed
  EXPECT_EQ(WeightDecayAt(job, 1), 0.25);
  EXPECT_NEAR(WeightDecayAt(job, 51), 0.375, 1e-12);
  EXPECT_NEAR(WeightDecayAt(job, 101), 0.5, 1e-12);
  schedule->set_kind(Schedule::STEP);
  schedule->add_step_boundaries(3);
  schedule->set_warmup_steps(4);
  EXPECT_NEAR(WeightDecayAt(job, 2), 0.125, 1e-12);
  EXPECT_NEAR(WeightDecayAt(job, 4), 0.025, 1e-8);
}

TEST(TeacherWeight, IsZeroDuringBurnInThenWhole) {
  JobConfig job = Job(2);
  job.mutable_codistillation()->set_burn_in_steps(30);
  job.mutable_codistillation()->set_weight(0.7f);
  EXPECT_EQ(TeacherWeightAt(job, 1), 0);
  EXPECT_EQ(TeacherWeightAt(job, 30), 0);
  EXPECT_EQ(TeacherWeightAt(job, 31), 0.7f);
  EXPECT_EQ(TeacherWeightAt(job, 100), 0.7f);
}

TEST(TeacherWeight, Ramps) {
  JobConfig job = Job(2);
  job.mutable_codistillation()->set_burn_in_steps(30);
  job.mutable_codistillation()->set_ramp_steps(10);
  EXPECT_EQ(TeacherWeightAt(job, 30), 0);
  EXPECT_FLOAT_EQ(TeacherWeightAt(job, 31), 0.1f);
  EXPECT_FLOAT_EQ(TeacherWeightAt(job, 39), 0.9f);
  EXPECT_EQ(TeacherWeightAt(job, 40), 1);
  EXPECT_EQ(TeacherWeightAt(job, 41), 1);
}

TEST(TeacherWeight, IsZeroWithoutTeachers) {
  EXPECT_EQ(TeacherWeightAt(Job(1), 50), 0);
  JobConfig off = Job(2);
  off.mutable_codistillation()->set_enabled(false);
  EXPECT_EQ(TeacherWeightAt(off, 50), 0);
}

TEST(Events, ComeEverySoManyStepsAndAtTheLast) {
  JobConfig job = Job(1);
  job.mutable_stop()->set_steps(7);
  job.mutable_training()->set_publish_every_steps(2);
  job.mutable_checkpoint()->set_every_steps(3);
  job.mutable_evaluation()->set_every_steps(4);
  std::vector<int> published, saved, evaluated;
  for (int step = 0; step <= 7; ++step) {
    if (PublishesAt(job, step)) published.push_back(step);
    if (CheckpointsAt(job, step)) saved.push_back(step);
    if (EvaluatesAt(job, step)) evaluated.push_back(step);
  }
  EXPECT_EQ(published, (std::vector<int>{2, 4, 6, 7}));
  EXPECT_EQ(saved, (std::vector<int>{3, 6, 7}));
  EXPECT_EQ(evaluated, (std::vector<int>{4, 7}));
  job.clear_checkpoint();
  EXPECT_FALSE(CheckpointsAt(job, 6));
  EXPECT_TRUE(CheckpointsAt(job, 7));
}

}  // namespace
}  // namespace codistill
