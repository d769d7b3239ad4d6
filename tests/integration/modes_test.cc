// Jobs of other shapes: asynchronous updates, one group alone, a warm start.

#include <string>

#include "common/config/job.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/weights.h"

namespace codistill {
namespace {

// Mean label loss of the first and the last logged steps.
void ExpectLossFalls(const GetHistoryReply& history, double by) {
  ASSERT_GT(history.training_size(), 4);
  const double first = history.training(0).label_loss();
  const double last = history.training(history.training_size() - 1).label_loss();
  EXPECT_LT(last, first - by);
}

TEST(AsyncTest, TwoWorkersReachTheEndAndTheLossFalls) {
  JobConfig job = MlpJob("async", 1);
  job.mutable_groups(0)->set_num_workers(2);
  job.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  job.mutable_stop()->set_steps(600);
  job.mutable_evaluator()->set_enabled(true);
  JobHarness harness(job);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  const auto history = harness.History(0);
  ASSERT_TRUE(history.ok()) << history.status();
  EXPECT_GE(history->state().version().step(), 600);
  ExpectLossFalls(*history, 0.3);
  ASSERT_GT(history->evaluations_size(), 0);
  const EvaluationResult& final = history->evaluations(history->evaluations_size() - 1);
  EXPECT_TRUE(final.final());
  EXPECT_EQ(final.examples(), 512);
  EXPECT_GT(final.accuracy(), 0.3);  // 1/8 by chance
  // Both workers took part.
  const auto leader = harness.StatusOf("alpha.shard.0");
  ASSERT_TRUE(leader.ok()) << leader.status();
  ASSERT_EQ(leader->members_size(), 2);
  for (const MemberStatus& member : leader->members()) {
    EXPECT_GT(member.counters().steps(), 0) << "rank " << member.rank();
  }
  status = harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
}

TEST(AsyncTest, TwoGroupsTeachEachOther) {
  JobConfig job = MlpJob("async-two", 2);
  for (GroupConfig& group : *job.mutable_groups()) group.set_num_workers(2);
  job.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  job.mutable_stop()->set_steps(300);
  job.mutable_codistillation()->set_burn_in_steps(40);
  JobHarness harness(job);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  for (int group = 0; group < 2; ++group) {
    const auto history = harness.History(group);
    ASSERT_TRUE(history.ok()) << history.status();
    EXPECT_GE(history->state().version().step(), 300);
    EXPECT_GT(history->totals().teacher_used_steps(), 0);
    ExpectLossFalls(*history, 0.1);
  }
  status = harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
}

TEST(SingleGroupTest, IsOrdinaryTraining) {
  JobConfig job = MlpJob("single", 1);
  job.mutable_stop()->set_steps(300);
  job.mutable_evaluator()->set_enabled(true);
  job.mutable_evaluation()->set_every_steps(100);
  job.mutable_evaluation()->set_max_examples(128);
  JobHarness harness(job);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  for (const auto& member : harness.fleet().members()) {
    EXPECT_NE(member->role, FleetMember::Role::kPredictionServer) << "nobody would ask it";
  }
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  const auto history = harness.History(0);
  ASSERT_TRUE(history.ok()) << history.status();
  EXPECT_EQ(history->state().version().step(), 300);
  EXPECT_EQ(history->examples(), 300 * 32);
  EXPECT_EQ(history->totals().teacher_requests(), 0);
  EXPECT_EQ(history->totals().steps(), 300);
  EXPECT_GT(history->totals().push_bytes(), 0u);
  EXPECT_GT(history->totals().pull_bytes(), 0u);
  ExpectLossFalls(*history, 0.3);
  ASSERT_GT(history->evaluations_size(), 0);
  EXPECT_EQ(history->evaluations(history->evaluations_size() - 1).examples(), 512);
  status = harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
}

// With a learning rate below any weight's last bit, the weights stay what they were at the start.
JobConfig StandingStill() {
  JobConfig job = MlpJob("warm", 1);
  job.mutable_training()->mutable_optimizer()->set_learning_rate(1e-30f);
  job.mutable_stop()->set_steps(5);
  return job;
}

TEST(WarmStartTest, ReplacesTheInitialWeights) {
  JobConfig elsewhere = StandingStill();
  elsewhere.set_seed(elsewhere.seed() + 1);
  ASSERT_TRUE(ExportArchives(&elsewhere).ok());
  const auto theirs = ReadSafetensors(WeightsPath(elsewhere, 0));
  ASSERT_TRUE(theirs.ok()) << theirs.status();

  JobHarness cold(StandingStill());
  const auto cold_weights = cold.TrainToEnd();
  ASSERT_TRUE(cold_weights.ok()) << cold_weights.status();
  JobConfig job = StandingStill();
  job.mutable_groups(0)->set_warm_start(WeightsPath(elsewhere, 0));
  JobHarness warm(job);
  const auto warm_weights = warm.TrainToEnd();
  ASSERT_TRUE(warm_weights.ok()) << warm_weights.status();

  const auto ours = ReadSafetensors(WeightsPath(cold.job(), 0));
  ASSERT_TRUE(ours.ok()) << ours.status();
  for (const NamedTensor& tensor : cold_weights->tensors) {
    Weights cold_one{{}, {tensor}}, own{{}, {{tensor.name, *ours->Find(tensor.name)}}};
    EXPECT_EQ(FirstBitDifference(cold_one, own), "");
    Weights warm_one{{}, {{tensor.name, *warm_weights->Find(tensor.name)}}};
    Weights given{{}, {{tensor.name, *theirs->Find(tensor.name)}}};
    EXPECT_EQ(FirstBitDifference(warm_one, given), "");
    EXPECT_NE(FirstBitDifference(warm_one, cold_one), "");
  }
}

TEST(WarmStartTest, AMissingFileIsNamed) {
  JobConfig job = StandingStill();
  job.mutable_groups(0)->set_warm_start(NewDirectory("nothing") + "/absent.safetensors");
  JobHarness harness(job);
  absl::Status status = harness.Start();
  if (status.ok()) status = harness.WaitUntilDone();
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.ToString().find("absent.safetensors"), std::string::npos) << status;
}

}  // namespace
}  // namespace codistill
