// What models may have in them, through a whole job: batch norm, dropout, an input that is used
// twice, mixed precision, batches in parts.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "common/base/file.h"
#include "common/config/job.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/weights.h"

namespace codistill {
namespace {

// Batch norm of the inputs themselves: its running mean says which examples it has seen and how
// they were averaged, whatever the weights.
constexpr char kSource[] = R"(
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm = nn.BatchNorm1d(32)
        self.hidden = nn.Linear(64, 48)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(48, 8)

    def forward(self, x, again):
        both = torch.cat([self.norm(x), again], dim=1)
        return self.output(self.dropout(torch.tanh(self.hidden(both))))

def build(options):
    return Net(float(options["dropout"]))
)";

constexpr int kSteps = 40;

JobConfig NetJob(const std::string& dropout, int workers) {
  static const std::string* const source = [] {
    auto* path = new std::string(JoinPath(NewDirectory("source"), "net.py"));
    EXPECT_TRUE(WriteFileAtomically(*path, kSource).ok());
    return path;
  }();
  JobConfig job = MlpJob("reach", 1);
  ModelConfig* model = job.mutable_model();
  model->mutable_export_()->clear_options();
  model->mutable_export_()->set_module(*source);
  ModelExport::Option* option = model->mutable_export_()->add_options();
  option->set_key("dropout");
  option->set_value(dropout);
  *model->add_inputs() = model->inputs(0);
  model->mutable_inputs(1)->set_name("again");
  model->mutable_inputs(1)->set_field("x");
  job.mutable_groups(0)->set_num_workers(workers);
  job.mutable_training()->set_batch_size(32 / workers);
  job.mutable_stop()->set_steps(kSteps);
  return job;
}

absl::StatusOr<Weights> Train(const JobConfig& job) {
  JobHarness harness(job);
  return harness.TrainToEnd();
}

// As RelativeDifference, of one tensor.
double DifferenceOf(const Weights& a, const Weights& b, const std::string& name) {
  Weights one, other;
  one.tensors = {{name, *a.Find(name)}};
  other.tensors = {{name, *b.Find(name)}};
  return RelativeDifference(one, other);
}

TEST(ModelReachTest, BatchNormIsAveragedOverWorkersAndIsInEveryCut) {
  const absl::StatusOr<Weights> one = Train(NetJob("0", 1));
  ASSERT_TRUE(one.ok()) << one.status();
  const absl::StatusOr<Weights> two = Train(NetJob("0", 2));
  ASSERT_TRUE(two.ok()) << two.status();
  for (const Weights& weights : {*one, *two}) {
    EXPECT_EQ(weights.version.step(), kSteps);
    const Tensor* const batches = weights.Find("norm.num_batches_tracked");
    ASSERT_NE(batches, nullptr);
    // The largest of the workers', not their sum.
    EXPECT_EQ(batches->As<int64_t>()[0], kSteps);
  }
  // The mean over two workers of the means of half a batch is that of the batch.
  EXPECT_LT(DifferenceOf(*one, *two, "norm.running_mean"), 1e-4);
  double size = 0;
  for (const float mean : one->Find("norm.running_mean")->As<float>()) {
    size = std::max<double>(size, std::abs(mean));
  }
  EXPECT_GT(size, 0.01);
  // What each worker normalises with is its own.
  EXPECT_GT(DifferenceOf(*one, *two, "hidden.weight"), 1e-4);
}

TEST(ModelReachTest, DropoutOfTwoWorkersRepeatsToTheBit) {
  const absl::StatusOr<Weights> first = Train(NetJob("0.5", 2));
  ASSERT_TRUE(first.ok()) << first.status();
  const absl::StatusOr<Weights> second = Train(NetJob("0.5", 2));
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(FirstBitDifference(*first, *second), "");
  JobConfig other = NetJob("0.5", 2);
  ASSERT_TRUE(ExportArchives(&other).ok());
  other.set_seed(other.seed() + 1);
  const absl::StatusOr<Weights> third = Train(other);
  ASSERT_TRUE(third.ok()) << third.status();
  EXPECT_NE(FirstBitDifference(*first, *third), "");
}

TEST(ModelReachTest, ABatchInPartsTrainsTheSameModel) {
  JobConfig job = MlpJob("parts", 1);
  job.mutable_stop()->set_steps(100);
  const absl::StatusOr<Weights> whole = Train(job);
  ASSERT_TRUE(whole.ok()) << whole.status();
  for (const int parts : {2, 4}) {
    job.mutable_training()->set_micro_batches(parts);
    const absl::StatusOr<Weights> weights = Train(job);
    ASSERT_TRUE(weights.ok()) << weights.status();
    EXPECT_LT(RelativeDifference(*whole, *weights), 1e-5) << parts;
  }
}

TEST(ModelReachTest, MixedPrecisionTrainsToNearlyTheSameModel) {
  JobConfig job = MlpJob("bf16", 1);
  job.mutable_stop()->set_steps(100);
  const absl::StatusOr<Weights> exact = Train(job);
  ASSERT_TRUE(exact.ok()) << exact.status();
  job.mutable_training()->set_precision(BF16);
  const absl::StatusOr<Weights> mixed = Train(job);
  ASSERT_TRUE(mixed.ok()) << mixed.status();
  const double difference = RelativeDifference(*exact, *mixed);
  EXPECT_GT(difference, 1e-6);  // it did compute otherwise
  EXPECT_LT(difference, 0.05);
}

}  // namespace
}  // namespace codistill
