// SYNC groups: how many workers share the batch must not matter to the model.

#include <string>

#include "common/config/job.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/weights.h"

namespace codistill {
namespace {

// The same examples a step, whoever computes them.
JobConfig SyncJob(int workers) {
  JobConfig job = MlpJob("sync", 1);
  job.mutable_groups(0)->set_num_workers(workers);
  job.mutable_training()->set_batch_size(64 / workers);
  job.mutable_stop()->set_steps(100);
  return job;
}

void ExpectSameModel(const JobConfig& one, const JobConfig& two) {
  JobHarness alone(one);
  const absl::StatusOr<Weights> expected = alone.TrainToEnd();
  ASSERT_TRUE(expected.ok()) << expected.status();
  JobHarness together(two);
  const absl::StatusOr<Weights> actual = together.TrainToEnd();
  ASSERT_TRUE(actual.ok()) << actual.status();

  EXPECT_EQ(expected->version.step(), 100);
  EXPECT_EQ(actual->version.step(), 100);
  EXPECT_LE(RelativeDifference(*expected, *actual), 1e-5);

  // The comparison means something only if training has moved the weights far more than that.
  const absl::StatusOr<Weights> initial = ReadSafetensors(WeightsPath(alone.job(), 0));
  ASSERT_TRUE(initial.ok()) << initial.status();
  for (const NamedTensor& named : initial->tensors) {
    Weights before, after;
    before.tensors = {named};
    after.tensors = {{named.name, *expected->Find(named.name)}};
    EXPECT_GT(RelativeDifference(before, after), 1e-2) << named.name;
  }
}

TEST(SyncTrainingTest, TwoWorkersEqualOneWithTheDoubledBatch) {
  ExpectSameModel(SyncJob(1), SyncJob(2));
}

TEST(SyncTrainingTest, TwoWorkersEqualOneWithMomentum) {
  const auto with_momentum = [](JobConfig job) {
    job.mutable_training()->mutable_optimizer()->set_kind(OptimizerConfig::MOMENTUM);
    job.mutable_training()->mutable_optimizer()->set_learning_rate(0.02);
    return job;
  };
  ExpectSameModel(with_momentum(SyncJob(1)), with_momentum(SyncJob(2)));
}

TEST(SyncTrainingTest, NumberOfShardsDoesNotMatter) {
  JobConfig three = SyncJob(2);
  three.mutable_groups(0)->set_num_shards(3);
  JobHarness on_three(three);
  const absl::StatusOr<Weights> actual = on_three.TrainToEnd();
  ASSERT_TRUE(actual.ok()) << actual.status();
  JobHarness on_two(SyncJob(2));
  const absl::StatusOr<Weights> expected = on_two.TrainToEnd();
  ASSERT_TRUE(expected.ok()) << expected.status();
  // SGD acts on each element alone, in rank order: where it lies changes no bit.
  EXPECT_EQ(FirstBitDifference(*expected, *actual), "");
}

TEST(SyncTrainingTest, RunningTheJobAgainRepeatsEveryBit) {
  Weights first;
  for (int run = 0; run < 2; ++run) {
    JobHarness harness(SyncJob(2));
    absl::StatusOr<Weights> weights = harness.TrainToEnd();
    ASSERT_TRUE(weights.ok()) << weights.status();
    if (run == 0) {
      first = *weights;
    } else {
      EXPECT_EQ(FirstBitDifference(first, *weights), "");
    }
  }
}

TEST(SyncTrainingTest, AnotherSeedGivesAnotherModel) {
  // What the tests above compare does depend on the order of the examples.
  JobConfig job = SyncJob(1);
  ASSERT_TRUE(ExportArchives(&job).ok());
  JobHarness one(job);
  const absl::StatusOr<Weights> a = one.TrainToEnd();
  ASSERT_TRUE(a.ok()) << a.status();
  job.set_seed(job.seed() + 1);  // the same archive, and so the same initial weights
  JobHarness other(job);
  const absl::StatusOr<Weights> b = other.TrainToEnd();
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_GT(RelativeDifference(*a, *b), 1e-3);
}

}  // namespace
}  // namespace codistill
