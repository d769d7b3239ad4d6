// One worker ten times slower than the others, and steps that do not wait for it.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "control/daemon_client.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

constexpr int kWorkers = 3;
// Long beside what the little model takes, so that the ratio is that of the workers' speeds.
constexpr int kStepMs = 30;
constexpr int kSlower = 10;

struct Outcome {
  double median_step_seconds = 0;
  GetHistoryReply history;
  DaemonStatus leader;
};

Outcome Train(const std::string& name, int backup_workers, bool straggler, int64_t steps) {
  JobConfig job = MlpJob(name, 1);
  job.mutable_groups(0)->set_num_workers(kWorkers);
  job.mutable_training()->set_backup_workers(backup_workers);
  job.mutable_training()->set_log_every_steps(1);
  job.mutable_stop()->set_steps(steps);
  JobHarness harness(job);
  for (int rank = 0; rank < kWorkers; ++rank) {
    const int slower = straggler && rank == kWorkers - 1 ? kSlower : 1;
    harness.AddFlags(absl::StrCat("alpha.worker.", rank),
                     {absl::StrCat("--test_step_delay_ms=", kStepMs * slower)});
  }
  Outcome outcome;
  absl::Status status = harness.Start();
  EXPECT_TRUE(status.ok()) << status;
  if (!status.ok()) return outcome;
  status = harness.WaitUntilDone();
  EXPECT_TRUE(status.ok()) << status;
  // The last answers are known once the leader has asked its shards again.
  status = harness.WaitFor("the last answers", [&]() -> absl::StatusOr<bool> {
    const auto history = harness.History(0);
    if (!history.ok()) return history.status();
    outcome.history = *history;
    int64_t answered = 0;
    for (const RankPushes& rank : history->pushes()) {
      if (rank.counts().open() > 0) return false;
      answered += rank.counts().applied();
    }
    return answered * 32 == 2 * history->examples();  // two shards
  });
  EXPECT_TRUE(status.ok()) << status << outcome.history.ShortDebugString();
  const auto leader = harness.StatusOf("alpha.shard.0");
  EXPECT_TRUE(leader.ok());
  if (leader.ok()) outcome.leader = *leader;
  status = harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
  std::vector<double> seconds;
  for (int i = 1; i < outcome.history.training_size(); ++i) {
    seconds.push_back(outcome.history.training(i).seconds() -
                      outcome.history.training(i - 1).seconds());
  }
  EXPECT_EQ(static_cast<int64_t>(seconds.size()), steps - 1);
  if (seconds.empty()) return outcome;
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  outcome.median_step_seconds = seconds[seconds.size() / 2];
  return outcome;
}

TEST(BackupWorkersTest, AStragglerCostsNoTime) {
  const Outcome without = Train("backup-even", 1, /*straggler=*/false, 100);
  const Outcome with = Train("backup-straggler", 1, /*straggler=*/true, 100);
  const Outcome waiting = Train("backup-none", 0, /*straggler=*/true, 12);
  ASSERT_GT(without.median_step_seconds, 0);
  const double ratio = with.median_step_seconds / without.median_step_seconds;
  std::printf(
      "{\"step_seconds_without_straggler\": %.4f, \"step_seconds_with\": %.4f, \"ratio\": %.3f, "
      "\"step_seconds_with_straggler_and_no_backup\": %.4f}\n",
      without.median_step_seconds, with.median_step_seconds, ratio, waiting.median_step_seconds);
  EXPECT_LE(ratio, 1.2);
  EXPECT_GT(waiting.median_step_seconds / without.median_step_seconds, 3) << "or nobody was slow";

  // Every step had two contributors at least, and the same examples whoever was late.
  EXPECT_EQ(with.history.state().version().step(), 100);
  EXPECT_GE(with.history.examples(), 100 * 2 * 32);
  ASSERT_EQ(with.leader.members_size(), kWorkers);
  const PushCounts& slow = with.leader.members(kWorkers - 1).pushes();
  const WorkerCounters& worker = with.leader.members(kWorkers - 1).counters();
  EXPECT_GT(slow.dropped_late(), 0);
  EXPECT_EQ(slow.refused() + slow.lost() + slow.rejected() + slow.too_stale(), 0)
      << slow.ShortDebugString();
  // What the worker has been told is what the shards have said, each of them the same.
  EXPECT_EQ(2 * worker.pushes_dropped(), slow.dropped_late());
  EXPECT_EQ(2 * worker.steps(), slow.applied());
  EXPECT_EQ(worker.pushes_lost(), 0);
  // Ten times slower, it has not computed what was decided long before: about every tenth step.
  EXPECT_LE(worker.steps() + worker.pushes_dropped(), 30);
  EXPECT_GE(worker.steps() + worker.pushes_dropped(), 4);
  for (const MemberStatus& member : with.leader.members()) {
    const PushCounts& c = member.pushes();
    EXPECT_EQ(c.begun(), c.applied() + c.dropped_late() + c.duplicate() + c.open())
        << c.ShortDebugString();
  }
}

}  // namespace
}  // namespace codistill
