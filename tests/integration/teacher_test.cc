// Groups that teach one another: what a teacher may and may not change.

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/config/job.h"
#include "common/model/model.h"
#include "common/model/test_archive.h"
#include "control/daemon_client.h"
#include "gtest/gtest.h"
#include "tests/integration/inference_client.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/weights.h"

namespace codistill {
namespace {

TEST(BurnInTest, WeightsAreBitEqualToTrainingWithoutCodistillation) {
  JobConfig job = MlpJob("burn-in", 2);
  job.mutable_codistillation()->set_burn_in_steps(60);
  job.mutable_training()->set_publish_every_steps(30);
  job.mutable_training()->set_held_cuts(8);
  job.mutable_stop()->set_steps(90);

  JobHarness with(job);
  ASSERT_TRUE(with.Start().ok());
  absl::Status done = with.WaitUntilDone();
  ASSERT_TRUE(done.ok()) << done;
  job.mutable_codistillation()->set_enabled(false);
  JobHarness without(job);
  ASSERT_TRUE(without.Start().ok());
  done = without.WaitUntilDone();
  ASSERT_TRUE(done.ok()) << done;

  for (int group = 0; group < 2; ++group) {
    SCOPED_TRACE(job.groups(group).name());
    for (const int64_t step : {30, 60, 90}) {
      const auto a = with.Pull(group, TensorClient::Source::kCut, step);
      ASSERT_TRUE(a.ok()) << a.status();
      const auto b = without.Pull(group, TensorClient::Source::kCut, step);
      ASSERT_TRUE(b.ok()) << b.status();
      if (step <= 60) {
        EXPECT_EQ(FirstBitDifference(*a, *b), "") << "at step " << step;
      } else {
        EXPECT_GT(RelativeDifference(*a, *b), 1e-4) << "the teacher has taught nothing";
      }
    }
    const auto history = with.History(group);
    ASSERT_TRUE(history.ok()) << history.status();
    EXPECT_EQ(history->totals().first_step_used(), 61);
    EXPECT_EQ(history->totals().teacher_used_steps(), 30);
    EXPECT_EQ(history->totals().teacher_skipped_steps(), 0);
    const auto alone = without.History(group);
    ASSERT_TRUE(alone.ok()) << alone.status();
    EXPECT_EQ(alone->totals().teacher_requests(), 0);
    EXPECT_EQ(alone->totals().first_step_used(), 0);
  }
}

TEST(TeacherTest, NoGradientReachesATeacher) {
  JobConfig job = MlpJob("frozen", 2);
  job.mutable_stop()->set_steps(1000000);
  JobHarness harness(job);
  ASSERT_TRUE(harness.Start().ok());
  absl::Status status = harness.WaitForStep(1, 20);
  ASSERT_TRUE(status.ok()) << status;

  // Beta stops learning and goes on teaching.
  const std::string beta = harness.member("beta.shard.0").address;
  status = PauseDaemon(beta, absl::Seconds(10));
  ASSERT_TRUE(status.ok()) << status;
  int64_t frozen_at = -1;
  GetHistoryReply before;
  // Steps handed out before the pause still come in: frozen once alpha has done 20 and beta none.
  status = harness.WaitFor("beta to stand still", [&]() -> absl::StatusOr<bool> {
    const auto alpha = harness.History(0);
    if (!alpha.ok()) return alpha.status();
    const absl::Status went_on = harness.WaitForStep(0, alpha->state().version().step() + 20);
    if (!went_on.ok()) return went_on;
    const auto history = harness.History(1);
    if (!history.ok()) return history.status();
    const bool still = history->state().version().step() == frozen_at;
    frozen_at = history->state().version().step();
    before = *history;
    return still;
  });
  ASSERT_TRUE(status.ok()) << status;
  const auto weights_before = harness.Pull(1, TensorClient::Source::kStep, frozen_at);
  ASSERT_TRUE(weights_before.ok()) << weights_before.status();

  // Of the worker itself: the leader hears of its counters once a second.
  const auto worker_before = harness.StatusOf("beta.worker.0");
  ASSERT_TRUE(worker_before.ok()) << worker_before.status();
  const auto alpha_before = harness.History(0);
  ASSERT_TRUE(alpha_before.ok()) << alpha_before.status();
  status =
      harness.WaitFor("100 more steps of alpha with its teacher", [&]() -> absl::StatusOr<bool> {
        const auto alpha = harness.History(0);
        if (!alpha.ok()) return alpha.status();
        return alpha->totals().teacher_used_steps() >=
               alpha_before->totals().teacher_used_steps() + 100;
      });
  ASSERT_TRUE(status.ok()) << status;

  const auto after = harness.History(1);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->state().version().step(), frozen_at);
  const auto worker_after = harness.StatusOf("beta.worker.0");
  ASSERT_TRUE(worker_after.ok()) << worker_after.status();
  EXPECT_GT(worker_after->worker().push_bytes(), 0u);
  EXPECT_EQ(worker_after->worker().push_bytes(), worker_before->worker().push_bytes());
  EXPECT_EQ(after->examples(), before.examples());
  const auto weights_after = harness.Pull(1, TensorClient::Source::kStep, frozen_at);
  ASSERT_TRUE(weights_after.ok()) << weights_after.status();
  EXPECT_EQ(FirstBitDifference(*weights_before, *weights_after), "");

  // Both go on when beta does.
  status = ResumeDaemon(beta, absl::Seconds(10));
  ASSERT_TRUE(status.ok()) << status;
  status = harness.WaitForStep(1, frozen_at + 20);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(harness.Drain().ok());
}

// The largest |logits of the server - logits of a local model with the weights of the cut it
// names|, over the largest logit.
double ServedDifference(JobHarness* harness, int group) {
  const JobConfig& job = harness->job();
  const std::string& name = job.groups(group).name();
  const Tensor batch = RandomFloats({24, 32}, 7);
  absl::StatusOr<Inference> answer = absl::UnknownError("");
  absl::StatusOr<Weights> weights = absl::UnknownError("");
  const absl::Status got =
      harness->WaitFor("an answer whose cut is held", [&]() -> absl::StatusOr<bool> {
        answer = Infer(harness->member(absl::StrCat(name, ".prediction.0")).address, name,
                       {{"x", batch}}, absl::Seconds(10));
        if (!answer.ok()) return answer.status();
        // A cut that is no longer held is ABORTED: the next answer has a newer one.
        weights = harness->Pull(group, TensorClient::Source::kCut, answer->step);
        if (!weights.ok()) return weights.status();
        return true;
      });
  EXPECT_TRUE(got.ok()) << got;
  if (!got.ok()) return INFINITY;
  EXPECT_EQ(answer->model_version, absl::StrCat(answer->generation, ".", answer->step));
  EXPECT_EQ(weights->version.step(), answer->step);
  EXPECT_EQ(answer->staleness_steps, answer->latest_step - answer->step);

  Model::Options options;
  options.archive = ArchivePath(job, group);
  options.config = job.model();
  const absl::StatusOr<std::unique_ptr<Model>> model = Model::Load(options);
  EXPECT_TRUE(model.ok()) << model.status();
  if (!model.ok()) return INFINITY;
  const auto untrained = (*model)->Predict({batch}, nullptr);
  const absl::Status copied = CopyInto(*weights, (*model)->storage());
  EXPECT_TRUE(copied.ok()) << copied;
  const auto local = (*model)->Predict({batch}, nullptr);
  EXPECT_TRUE(untrained.ok() && local.ok());
  if (!local.ok() || local->values.elements() != answer->logits.elements()) return INFINITY;
  double scale = 0, difference = 0, moved = 0;
  for (int64_t i = 0; i < local->values.elements(); ++i) {
    const double expected = local->values.As<float>()[i];
    scale = std::max(scale, std::abs(expected));
    difference = std::max(difference, std::abs(expected - answer->logits.As<float>()[i]));
    moved = std::max(moved, std::abs(expected - untrained->values.As<float>()[i]));
  }
  EXPECT_GT(moved, 1e-2 * scale) << "the weights are still the archive's own";
  return difference / scale;
}

TEST(PredictionServerTest, AnswersAsTheSameWeightsRunLocally) {
  JobConfig job = MlpJob("served", 2);
  job.mutable_stop()->set_steps(300);
  JobHarness harness(job);
  ASSERT_TRUE(harness.Start().ok());
  absl::Status status = harness.WaitForStep(0, 50);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_LE(ServedDifference(&harness, 0), 1e-6);  // while it trains
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_LE(ServedDifference(&harness, 0), 1e-6);
  EXPECT_LE(ServedDifference(&harness, 1), 1e-6);
  EXPECT_TRUE(harness.Drain().ok());
}

TEST(PredictionServerTest, BuffersOfBatchNormAreServedToo) {
  const std::string module = absl::StrCat(NewDirectory("module"), "/normed.py");
  ASSERT_TRUE(WriteFileAtomically(module, R"(
import torch
from torch import nn


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(32, 24)
        self.norm = nn.BatchNorm1d(24)
        self.output = nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.norm(self.hidden(x))))


def build(options):
    return Normed()
)")
                  .ok());
  JobConfig job = MlpJob("normed", 2);
  job.mutable_model()->mutable_export_()->set_module(module);
  job.mutable_model()->mutable_export_()->clear_options();
  for (GroupConfig& group : *job.mutable_groups()) group.set_num_workers(2);
  JobHarness harness(job);
  const absl::Status started = harness.Start();
  ASSERT_TRUE(started.ok()) << started;
  const absl::Status status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_LE(ServedDifference(&harness, 0), 1e-6);
  const auto weights = harness.NewestCut(0);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const Tensor* mean = weights->Find("norm.running_mean");
  ASSERT_NE(mean, nullptr);
  double largest = 0;
  for (const float v : mean->As<float>()) largest = std::max<double>(largest, std::abs(v));
  EXPECT_GT(largest, 0) << "the statistics have never left the worker";
  const Tensor* batches = weights->Find("norm.num_batches_tracked");
  ASSERT_NE(batches, nullptr);
  EXPECT_EQ(batches->As<int64_t>()[0], 100);
}

}  // namespace
}  // namespace codistill
