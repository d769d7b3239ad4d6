// codistillation.mode CHECKPOINTS: workers follow their teachers' weights and compute their
// predictions themselves.

#include <algorithm>
#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "control/fleet.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

bool HasPredictionServers(const Fleet& fleet) {
  return std::any_of(fleet.members().begin(), fleet.members().end(), [](const auto& member) {
    return member->role == FleetMember::Role::kPredictionServer;
  });
}

TEST(LocalTeachersTest, TwoGroupsTeachOneAnotherWithoutPredictionServers) {
  JobConfig job = MlpJob("checkpoints", 2);
  job.mutable_codistillation()->set_mode(CodistillationConfig::CHECKPOINTS);
  job.mutable_codistillation()->set_burn_in_steps(20);
  job.mutable_codistillation()->set_max_staleness_steps(60);
  job.mutable_stop()->set_steps(120);
  JobHarness harness(job);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_FALSE(HasPredictionServers(harness.fleet()));
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  for (int group = 0; group < 2; ++group) {
    SCOPED_TRACE(job.groups(group).name());
    const auto history = harness.History(group);
    ASSERT_TRUE(history.ok()) << history.status();
    const WorkerCounters& totals = history->totals();
    EXPECT_EQ(totals.first_step_used(), 21);
    EXPECT_EQ(totals.teacher_used_steps(), 100);
    EXPECT_EQ(totals.teacher_skipped_steps(), 0);
    EXPECT_GE(totals.teacher_requests(), 100) << "passes of the teacher";
    EXPECT_LE(totals.max_staleness_steps(), 60);
    EXPECT_GT(totals.sum_staleness_steps(), 0) << "cuts come every 10 steps";
    double psi = 0;
    for (const TrainingPoint& point : history->training()) {
      if (point.step() > 30) psi += point.teacher_loss();
    }
    EXPECT_GT(psi, 0);
  }
  status = harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
}

// Both groups learn from the average of the two, in either mode; nobody asks a group by itself.
TEST(EnsembleOfGroupsTest, TeachesItsMembers) {
  for (const auto mode : {CodistillationConfig::PREDICTIONS, CodistillationConfig::CHECKPOINTS}) {
    SCOPED_TRACE(CodistillationConfig::Mode_Name(mode));
    JobConfig job = MlpJob("average", 2);
    TeacherConfig* both = job.add_teachers();
    both->set_name("both");
    for (GroupConfig& group : *job.mutable_groups()) {
      both->mutable_ensemble()->add_members(group.name());
      group.add_teachers("both");
    }
    job.mutable_codistillation()->set_mode(mode);
    job.mutable_codistillation()->set_burn_in_steps(20);
    job.mutable_codistillation()->set_max_staleness_steps(200);
    job.mutable_stop()->set_steps(80);
    JobHarness harness(job);
    absl::Status status = harness.Start();
    ASSERT_TRUE(status.ok()) << status;
    int servers = 0;
    for (const auto& member : harness.fleet().members()) {
      servers += member->role == FleetMember::Role::kPredictionServer;
    }
    EXPECT_EQ(servers, mode == CodistillationConfig::PREDICTIONS ? 1 : 0);
    status = harness.WaitUntilDone();
    ASSERT_TRUE(status.ok()) << status;
    for (int group = 0; group < 2; ++group) {
      const auto history = harness.History(group);
      ASSERT_TRUE(history.ok()) << history.status();
      EXPECT_EQ(history->totals().teacher_used_steps(), 60);
      EXPECT_EQ(history->totals().teacher_skipped_steps(), 0);
      EXPECT_GT(history->totals().sum_staleness_steps(), 0) << "as the stalest member";
      ASSERT_EQ(history->totals().teachers_size(), 1);
      EXPECT_EQ(history->totals().teachers(0).name(), "both");
    }
    status = harness.Drain();
    EXPECT_TRUE(status.ok()) << status;
  }
}

// Under SKIP the loss of a teacher's whole group costs its students nothing but the teacher.
TEST(LocalTeachersTest, ALostTeacherIsSkippedAndComesBack) {
  JobConfig job = MlpJob("checkpoints-lost", 2);
  job.mutable_codistillation()->set_mode(CodistillationConfig::CHECKPOINTS);
  job.mutable_codistillation()->set_on_teacher_loss(CodistillationConfig::SKIP);
  // The estimate of a silent group's step grows at its last rate: soon too far.
  job.mutable_codistillation()->set_max_staleness_steps(200);
  job.mutable_checkpoint()->set_every_steps(100);
  job.mutable_stop()->set_steps(1000000);
  JobHarness harness(job, /*restart=*/true);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  const auto totals = [&]() -> absl::StatusOr<WorkerCounters> {
    const auto history = harness.History(0);
    if (!history.ok()) return history.status();
    return history->totals();
  };
  status = harness.WaitFor("alpha to use beta", [&]() -> absl::StatusOr<bool> {
    const auto now = totals();
    if (!now.ok()) return now.status();
    return now->teacher_used_steps() >= 50;
  });
  ASSERT_TRUE(status.ok()) << status;
  status = harness.WaitForStep(1, 150);
  ASSERT_TRUE(status.ok()) << status;
  const auto before = totals();
  ASSERT_TRUE(before.ok()) << before.status();
  harness.Kill("beta.shard.0");
  harness.Kill("beta.shard.1");
  // Nobody looks after the children meanwhile: they stay dead until alpha has run out of weights
  // that are new enough, and has trained on without.
  const absl::Time deadline = absl::Now() + absl::Seconds(60);
  WorkerCounters outage = *before;
  while (absl::Now() < deadline &&
         outage.teacher_skipped_steps() < before->teacher_skipped_steps() + 50) {
    absl::SleepFor(absl::Milliseconds(10));
    const auto now = totals();
    ASSERT_TRUE(now.ok()) << now.status();
    outage = *now;
  }
  EXPECT_GE(outage.teacher_skipped_steps(), before->teacher_skipped_steps() + 50);
  EXPECT_GE(outage.steps(), before->steps() + 50);
  EXPECT_EQ(outage.pushes_lost() + outage.pushes_rejected(), 0);
  // Restarted by the harness and restored from beta's checkpoint, under a new generation.
  status = harness.WaitFor("beta's restore", [&]() -> absl::StatusOr<bool> {
    const auto history = harness.History(1);
    if (!history.ok()) return history.status();
    return history->state().version().generation() > 1 &&
           history->state().phase() == GroupState::TRAINING;
  });
  ASSERT_TRUE(status.ok()) << status;
  const auto restored = totals();
  ASSERT_TRUE(restored.ok()) << restored.status();
  status = harness.WaitFor("alpha to use beta again", [&]() -> absl::StatusOr<bool> {
    const auto now = totals();
    if (!now.ok()) return now.status();
    return now->teacher_used_steps() >= restored->teacher_used_steps() + 50;
  });
  EXPECT_TRUE(status.ok()) << status;
  const auto alpha = harness.History(0);
  ASSERT_TRUE(alpha.ok()) << alpha.status();
  EXPECT_EQ(alpha->state().version().generation(), 1u) << "alpha has lost nothing";
}

}  // namespace
}  // namespace codistill
