// All prediction servers of a running job are killed: training does not notice but in what it
// counts, and uses them again as soon as they are back.

#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

// Longer than back-offs take to grow to their longest; and how long training may take to show that
// it goes on.
constexpr absl::Duration kOutage = absl::Seconds(4);
constexpr absl::Duration kLongestOutage = absl::Seconds(60);
constexpr absl::Duration kPoll = absl::Milliseconds(5);

// When a daemon that was started again said that it was ready; infinite past if it has not yet.
absl::Time ReadySince(const JobHarness& harness, const std::string& name) {
  struct stat file = {};
  const std::string path = absl::StrCat(harness.directory().ready(), "/", name, ".json");
  if (stat(path.c_str(), &file) != 0) return absl::InfinitePast();
  return absl::TimeFromTimespec(file.st_mtim);
}

TEST(TeacherRecoveryTest, AllTeachersOfARunningJobMayDie) {
  JobConfig job = MlpJob("orphans", 2);
  job.mutable_stop()->set_steps(1000000);
  job.mutable_codistillation()->set_on_teacher_loss(CodistillationConfig::SKIP);
  for (GroupConfig& group : *job.mutable_groups()) group.set_num_prediction_servers(2);
  const std::vector<std::string> workers = {"alpha.worker.0", "beta.worker.0"};
  const std::vector<std::string> servers = {"alpha.prediction.0", "alpha.prediction.1",
                                            "beta.prediction.0", "beta.prediction.1"};
  JobHarness harness(job, /*restart=*/true);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  const auto counters = [&](const std::string& worker) {
    const auto got = harness.StatusOf(worker);
    EXPECT_TRUE(got.ok()) << got.status();
    return got.ok() ? got->worker() : WorkerCounters();
  };
  status = harness.WaitFor("predictions in use", [&]() -> absl::StatusOr<bool> {
    return counters(workers[0]).teacher_used_steps() > 20 &&
           counters(workers[1]).teacher_used_steps() > 20;
  });
  ASSERT_TRUE(status.ok()) << status;

  for (const std::string& server : servers) harness.Kill(server);
  // Nobody looks after the children meanwhile: they stay dead.
  const absl::Time killed = absl::Now();
  std::map<std::string, WorkerCounters> before;
  for (const std::string& worker : workers) before[worker] = counters(worker);
  std::map<std::string, WorkerCounters> after;
  const auto went_on = [&] {
    return std::all_of(workers.begin(), workers.end(), [&](const std::string& worker) {
      after[worker] = counters(worker);
      return after[worker].steps() > before[worker].steps() + 50 &&
             after[worker].teacher_skipped_steps() > before[worker].teacher_skipped_steps() + 50;
    });
  };
  while (absl::Now() < killed + kLongestOutage && (!went_on() || absl::Now() < killed + kOutage)) {
    absl::SleepFor(kPoll);
  }
  for (const std::string& worker : workers) {
    SCOPED_TRACE(worker);
    after[worker] = counters(worker);
    EXPECT_GT(after[worker].steps(), before[worker].steps() + 50) << "training went on";
    EXPECT_GT(after[worker].teacher_skipped_steps(), before[worker].teacher_skipped_steps() + 50);
    // What had been asked for before the end is used up within the batches that were ahead.
    EXPECT_LE(after[worker].teacher_used_steps(), before[worker].teacher_used_steps() + 4);
    EXPECT_GT(after[worker].teacher_failures(), 0);
  }

  // Start them again, and see when each group uses its teacher again.
  std::map<std::string, absl::Time> ready, used;
  status = harness.WaitFor("predictions in use again", [&]() -> absl::StatusOr<bool> {
    for (int i = 0; i < 4; ++i) {
      for (const std::string& worker : workers) {
        if (used.count(worker) == 0 &&
            counters(worker).teacher_used_steps() > after[worker].teacher_used_steps()) {
          used[worker] = absl::Now();
        }
      }
      absl::SleepFor(kPoll);
    }
    return used.size() == workers.size();
  });
  ASSERT_TRUE(status.ok()) << status;
  for (const std::string& worker : workers) {
    // Alpha's teacher is beta.
    const std::string teacher = worker[0] == 'a' ? "beta" : "alpha";
    absl::Time first = absl::InfiniteFuture();
    for (const char* index : {"0", "1"}) {
      const std::string server = absl::StrCat(teacher, ".prediction.", index);
      EXPECT_EQ(harness.member(server).restarts, 1);
      const absl::Time since = ReadySince(harness, server);
      if (since > killed) first = std::min(first, since);
    }
    ASSERT_LT(first, absl::InfiniteFuture());
    const absl::Duration took = used[worker] - first;
    EXPECT_LT(took, absl::Seconds(2)) << worker;
    RecordProperty(worker, absl::FormatDuration(took));
    std::printf("%s uses its teacher again %s after the server's ready line\n", worker.c_str(),
                absl::FormatDuration(took).c_str());
  }

  for (int group = 0; group < 2; ++group) {
    const auto history = harness.History(group);
    ASSERT_TRUE(history.ok()) << history.status();
    EXPECT_EQ(history->restores(), 0);
    const WorkerCounters now = counters(workers[group]);
    EXPECT_EQ(now.pushes_lost() + now.pushes_rejected() + now.pushes_dropped(), 0);
    EXPECT_EQ(now.teacher_used_steps() + now.teacher_skipped_steps(), now.steps())
        << "every step is counted as one or the other";
    ASSERT_EQ(now.teachers_size(), 1);
    EXPECT_EQ(now.teachers(0).failures(), now.teacher_failures());
  }
  status = harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
}

}  // namespace
}  // namespace codistill
