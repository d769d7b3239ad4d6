// Workers that come and go while a group trains.

#include <signal.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/status.h"
#include "control/daemon_client.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

constexpr double kLease = 3;
constexpr int kMaxWorkers = 4;
constexpr int kShards = 2;
constexpr int64_t kBatch = 32;

JobConfig ElasticJob(const std::string& name) {
  JobConfig job = MlpJob(name, 1);
  job.mutable_training()->set_membership(TrainingConfig::ELASTIC);
  job.mutable_training()->set_lease_s(kLease);
  job.mutable_training()->set_log_every_steps(1);
  job.mutable_groups(0)->set_num_workers(2);
  job.mutable_groups(0)->set_max_workers(kMaxWorkers);
  job.mutable_stop()->set_steps(1000000);  // drained
  return job;
}

// Comings and goings of one run. Rank 0 stays.
class Churn {
 public:
  explicit Churn(JobConfig job) : harness(std::move(job)) {
    for (int rank = 0; rank < kMaxWorkers; ++rank) {
      harness.AddFlags(Name(rank), {"--test_step_delay_ms=50"});
    }
  }

  static std::string Name(int rank) { return absl::StrCat("alpha.worker.", rank); }

  absl::StatusOr<MembershipCounts> Counts() {
    CODISTILL_ASSIGN_OR_RETURN(const GetHistoryReply history, harness.History(0));
    return history.membership();
  }

  absl::Status Leave(int rank, bool killed) {
    CODISTILL_ASSIGN_OR_RETURN(const MembershipCounts before, Counts());
    FleetMember& member = const_cast<FleetMember&>(harness.member(Name(rank)));
    member.process.Signal(killed ? SIGKILL : SIGTERM);
    CODISTILL_RETURN_IF_ERROR(harness.WaitFor(
        absl::StrCat("worker ", rank, " to be gone"), [&]() -> absl::StatusOr<bool> {
          CODISTILL_ASSIGN_OR_RETURN(const MembershipCounts now, Counts());
          return member.process.Poll() && now.members() == before.members() - 1;
        }));
    CODISTILL_ASSIGN_OR_RETURN(const MembershipCounts after, Counts());
    EXPECT_EQ(after.leases_ended(), before.leases_ended() + (killed ? 1 : 0));
    EXPECT_EQ(after.left(), before.left() + (killed ? 0 : 1));
    return Advance();
  }

  absl::Status Join(int rank) {
    CODISTILL_ASSIGN_OR_RETURN(const MembershipCounts before, Counts());
    CODISTILL_RETURN_IF_ERROR(harness.fleet().AddWorker(0, rank));
    CODISTILL_RETURN_IF_ERROR(
        harness.WaitFor(absl::StrCat("worker ", rank, " to join"), [&]() -> absl::StatusOr<bool> {
          CODISTILL_ASSIGN_OR_RETURN(const MembershipCounts now, Counts());
          return now.joined() == before.joined() + 1;
        }));
    return Advance();
  }

  // Some more steps with whoever is there now.
  absl::Status Advance() {
    CODISTILL_ASSIGN_OR_RETURN(const GetHistoryReply history, harness.History(0));
    return harness.WaitForStep(0, history.state().version().step() + 5);
  }

  // Ends the training; then the last answers are in.
  absl::StatusOr<GetHistoryReply> End() {
    CODISTILL_RETURN_IF_ERROR(
        PauseDaemon(harness.member("alpha.shard.0").address, absl::Seconds(10)));
    GetHistoryReply last;
    absl::Time since = absl::Now();
    CODISTILL_RETURN_IF_ERROR(harness.WaitFor("the last answers", [&]() -> absl::StatusOr<bool> {
      CODISTILL_ASSIGN_OR_RETURN(GetHistoryReply history, harness.History(0));
      for (const RankPushes& rank : history.pushes()) {
        if (rank.counts().open() > 0) return false;
      }
      if (history.state().version().step() != last.state().version().step()) {
        since = absl::Now();
      }
      last = std::move(history);
      return absl::Now() - since > absl::Seconds(2);
    }));
    return last;
  }

  JobHarness harness;
};

// begun = sum of outcomes for every rank, and what was applied is what the steps are made of.
void ExpectAllAccountedFor(const GetHistoryReply& history) {
  int64_t applied = 0;
  for (const RankPushes& rank : history.pushes()) {
    const PushCounts& c = rank.counts();
    EXPECT_EQ(c.begun(), c.applied() + c.dropped_late() + c.too_stale() + c.rejected() +
                             c.duplicate() + c.refused() + c.lost())
        << "rank " << rank.rank() << ": " << c.ShortDebugString();
    EXPECT_EQ(c.too_stale() + c.rejected(), 0);
    applied += c.applied();
  }
  EXPECT_EQ(applied * kBatch, kShards * history.examples());
}

// No step took longer than a lease and twice the median.
void ExpectNoLongStep(const GetHistoryReply& history) {
  std::vector<double> seconds;
  for (int i = 1; i < history.training_size(); ++i) {
    seconds.push_back(history.training(i).seconds() - history.training(i - 1).seconds());
  }
  ASSERT_GT(seconds.size(), 10u);
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  std::printf(
      "{\"steps\": %d, \"median_step_seconds\": %.4f, \"longest_step_seconds\": %.4f, "
      "\"lease_seconds\": %.1f}\n",
      static_cast<int>(seconds.size()), median, seconds.back(), kLease);
  EXPECT_LE(seconds.back(), kLease + 2 * median);
}

TEST(ElasticTest, WorkersLeaveAndJoin) {
  int cycles = 2;
  if (const char* text = std::getenv("CODISTILL_CHURN_CYCLES"); text != nullptr) {
    ASSERT_TRUE(absl::SimpleAtoi(text, &cycles));
  }
  Churn churn(ElasticJob("elastic"));
  absl::Status status = churn.harness.Start();
  if (status.ok()) status = churn.Advance();
  ASSERT_TRUE(status.ok()) << status;
  std::vector<int> there = {1}, elsewhere = {2, 3};
  for (int cycle = 0; cycle < cycles; ++cycle) {
    // Ranks the group did not begin with come, and somebody goes: killed, or asked to.
    status = churn.Join(elsewhere.front());
    ASSERT_TRUE(status.ok()) << "cycle " << cycle << ": " << status;
    there.push_back(elsewhere.front());
    elsewhere.erase(elsewhere.begin());
    status = churn.Leave(there.front(), /*killed=*/cycle % 2 == 0);
    ASSERT_TRUE(status.ok()) << "cycle " << cycle << ": " << status;
    elsewhere.push_back(there.front());
    there.erase(there.begin());
  }
  const auto history = churn.End();
  ASSERT_TRUE(history.ok()) << history.status();
  EXPECT_EQ(history->membership().joined(), 2 + cycles);
  EXPECT_EQ(history->membership().leases_ended(), (cycles + 1) / 2);
  EXPECT_EQ(history->membership().left(), cycles / 2);
  EXPECT_EQ(history->membership().members(), 2);
  EXPECT_EQ(history->restores(), 0);
  ExpectAllAccountedFor(*history);
  ExpectNoLongStep(*history);
  // Who was there all along has the answers that the shards gave it.
  const auto leader = churn.harness.StatusOf("alpha.shard.0");
  ASSERT_TRUE(leader.ok()) << leader.status();
  EXPECT_EQ(leader->members(0).pushes().applied(), kShards * leader->members(0).counters().steps());
  EXPECT_EQ(leader->members(0).pushes().lost(), 0);
  EXPECT_TRUE(leader->members(0).member());
  status = churn.harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
}

TEST(ElasticTest, AnAsynchronousGroupGoesOnToo) {
  JobConfig job = ElasticJob("elastic-async");
  job.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  Churn churn(job);
  absl::Status status = churn.harness.Start();
  if (status.ok()) status = churn.Advance();
  if (status.ok()) status = churn.Join(3);
  if (status.ok()) status = churn.Leave(1, /*killed=*/true);
  if (status.ok()) status = churn.Leave(0, /*killed=*/false);
  ASSERT_TRUE(status.ok()) << status;
  const auto history = churn.harness.History(0);
  ASSERT_TRUE(history.ok()) << history.status();
  EXPECT_EQ(history->membership().members(), 1);
  status = churn.harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
}

}  // namespace
}  // namespace codistill
