#include <string>

#include "gtest/gtest.h"
#include "server/push_ledger.h"
#include "server/push_outcomes.h"
#include "server/worker_clocks.h"

// The books of an asynchronous group: clocks of workers, what became of pushes, what was answered.
namespace codistill {
namespace {

TEST(WorkerClocksTest, AStepIsOverWhenEveryShardHasDecidedIt) {
  WorkerClocks clocks(2, 2);
  EXPECT_EQ(clocks.Limit(0), 1);
  clocks.Decided(0, 0, 1);
  EXPECT_EQ(clocks.completed(0), 0);
  clocks.Decided(0, 1, 1);
  EXPECT_EQ(clocks.completed(0), 1);
  EXPECT_EQ(clocks.Slowest(), 0);
  EXPECT_EQ(clocks.SlowestRank(), 1);
  clocks.Decided(1, 0, 3);  // later ones say so of earlier ones
  clocks.Decided(1, 1, 2);
  EXPECT_EQ(clocks.completed(1), 2);
  EXPECT_EQ(clocks.Slowest(), 1);
  EXPECT_EQ(clocks.Limit(4), 6);
  clocks.Over(0, 5);  // its worker says so
  EXPECT_EQ(clocks.Slowest(), 2);
  clocks.Over(0, 3);  // never back
  EXPECT_EQ(clocks.completed(0), 5);
}

TEST(WorkerClocksTest, OnlyMembersCount) {
  WorkerClocks clocks(3, 1);
  clocks.Over(0, 9);
  clocks.Over(1, 7);
  EXPECT_EQ(clocks.Slowest(), 0);
  clocks.Leave(2);
  EXPECT_EQ(clocks.Slowest(), 7);
  clocks.Leave(1);
  EXPECT_EQ(clocks.Slowest(), 9);
  clocks.Join(2, 8);
  EXPECT_EQ(clocks.Slowest(), 8);
  EXPECT_EQ(clocks.SlowestRank(), 2);
  clocks.Leave(0);
  clocks.Leave(2);
  EXPECT_EQ(clocks.SlowestRank(), -1);
  EXPECT_EQ(clocks.Slowest(), 9);  // nobody counts: the furthest of all
}

class PushLedgerTest : public testing::Test {
 protected:
  AsyncCounters Counts() {
    AsyncCounters counts;
    ledger_.Fill(&counts);
    EXPECT_EQ(counts.issued(), counts.whole() + counts.partial() + counts.rejected() +
                                   counts.too_stale() + counts.dropped() + counts.lost() +
                                   counts.open());
    return counts;
  }
  AsyncLedger ledger_{2, 2};
};

TEST_F(PushLedgerTest, WholePartialAndLost) {
  for (int64_t step = 1; step <= 5; ++step) ledger_.Issued(0, 10, step);
  ledger_.Decided(0, 10, 1, 0, APPLIED);
  EXPECT_EQ(Counts().open(), 5);
  ledger_.Decided(0, 10, 1, 1, APPLIED);
  EXPECT_EQ(Counts().whole(), 1);
  ledger_.Decided(0, 10, 2, 0, APPLIED);  // never reaches shard 1
  ledger_.Decided(0, 10, 4, 0, APPLIED);  // 3 reaches none
  EXPECT_EQ(Counts().open(), 4);          // shard 1 may still have 2 and 3
  ledger_.Decided(0, 10, 4, 1, APPLIED);
  const AsyncCounters counts = Counts();
  EXPECT_EQ(counts.whole(), 2);
  EXPECT_EQ(counts.partial(), 1);
  EXPECT_EQ(counts.partial_updates(), 1);
  EXPECT_EQ(counts.lost(), 1);
  EXPECT_EQ(counts.open(), 1);
}

TEST_F(PushLedgerTest, AReportThatComesTwiceCountsOnce) {
  ledger_.Issued(0, 10, 1);
  for (int again = 0; again < 2; ++again) {
    ledger_.Decided(0, 10, 1, 0, APPLIED);
    ledger_.Decided(0, 10, 1, 1, APPLIED);
  }
  EXPECT_EQ(Counts().issued(), 1);
  EXPECT_EQ(Counts().whole(), 1);
}

TEST_F(PushLedgerTest, TheNextProcessSettlesWhatTheOneBeforeLeft) {
  ledger_.Issued(1, 10, 1);
  ledger_.Issued(1, 10, 2);
  ledger_.Issued(1, 20, 3);  // the process was replaced
  ledger_.Decided(1, 10, 1, 0, APPLIED);
  EXPECT_EQ(Counts().open(), 3);  // nothing says that shard 1 will not get it
  ledger_.Decided(1, 20, 3, 0, APPLIED);
  EXPECT_EQ(Counts().open(), 3);
  ledger_.Decided(1, 20, 3, 1, REJECTED);
  const AsyncCounters counts = Counts();
  EXPECT_EQ(counts.partial(), 2);
  EXPECT_EQ(counts.lost(), 1);
  EXPECT_EQ(counts.open(), 0);
}

TEST_F(PushLedgerTest, OutcomesThatChangeNothing) {
  for (int64_t step = 1; step <= 3; ++step) {
    ledger_.Issued(0, 1, step);
    const PushOutcome outcome = step == 1 ? REJECTED : step == 2 ? TOO_STALE : DROPPED_LATE;
    ledger_.Decided(0, 1, step, 0, outcome);
    ledger_.Decided(0, 1, step, 1, outcome);
  }
  EXPECT_EQ(Counts().rejected(), 1);
  EXPECT_EQ(Counts().too_stale(), 1);
  EXPECT_EQ(Counts().dropped(), 1);
}

TEST_F(PushLedgerTest, ALostShardTakesItsReportsWithIt) {
  for (int64_t step = 1; step <= 2; ++step) ledger_.Issued(0, 1, step);
  ledger_.Decided(0, 1, 1, 0, APPLIED);
  ledger_.ShardLost(1);
  EXPECT_EQ(Counts().partial(), 1);
  EXPECT_EQ(Counts().open(), 1);  // not sent yet: it may reach the shard's next process
  ledger_.Decided(0, 1, 2, 1, APPLIED);
  ledger_.Decided(0, 1, 2, 0, APPLIED);
  EXPECT_EQ(Counts().whole(), 1);
}

TEST_F(PushLedgerTest, AnotherGenerationSettlesEverything) {
  ledger_.Issued(0, 1, 7);
  ledger_.Issued(0, 1, 8);
  ledger_.Decided(0, 1, 7, 0, APPLIED);
  ledger_.Abandon();
  EXPECT_EQ(Counts().partial(), 1);
  EXPECT_EQ(Counts().lost(), 1);
  ledger_.Issued(0, 1, 3);  // the same process, counting anew
  ledger_.Decided(0, 1, 3, 0, APPLIED);
  ledger_.Decided(0, 1, 3, 1, APPLIED);
  EXPECT_EQ(Counts().whole(), 1);
  AsyncLedger next(2, 2);
  AsyncCounters saved = Counts();
  saved.set_issued(saved.issued() + 1);
  saved.set_open(1);
  next.Load(saved);
  next.Fill(&saved);
  EXPECT_EQ(saved.lost(), 2);
  EXPECT_EQ(saved.open(), 0);
}

TEST_F(PushLedgerTest, IsBounded) {
  for (size_t step = 1; step <= AsyncLedger::kMaxOpen; ++step) {
    EXPECT_FALSE(ledger_.Full(0));
    ledger_.Issued(0, 1, static_cast<int64_t>(step));
  }
  EXPECT_TRUE(ledger_.Full(0));
  EXPECT_FALSE(ledger_.Full(1));
}

PushBegin Begin(int32_t rank, uint64_t incarnation, int64_t step) {
  PushBegin begin;
  begin.set_rank(rank);
  begin.set_incarnation(incarnation);
  begin.set_step(step);
  return begin;
}

PushReply Reply(PushOutcome outcome, int64_t step, const std::string& message = "") {
  PushReply reply;
  reply.set_outcome(outcome);
  reply.set_step(step);
  reply.set_message(message);
  return reply;
}

TEST(PushOutcomesTest, RepeatedPushesAreAnsweredAsBefore) {
  PushOutcomes outcomes;
  EXPECT_FALSE(outcomes.Find(Begin(0, 1, 1)).has_value());
  outcomes.Note(Begin(0, 1, 1), Reply(APPLIED, 11));
  outcomes.Note(Begin(0, 1, 2), Reply(REJECTED, 12, "gradient of tensor w is not finite"));
  outcomes.Note(Begin(0, 1, 4), Reply(TOO_STALE, 12));
  EXPECT_EQ(outcomes.Find(Begin(0, 1, 1))->outcome(), DUPLICATE);
  EXPECT_EQ(outcomes.Find(Begin(0, 1, 1))->step(), 11);
  EXPECT_EQ(outcomes.Find(Begin(0, 1, 2))->outcome(), REJECTED);
  EXPECT_EQ(outcomes.Find(Begin(0, 1, 2))->message(), "gradient of tensor w is not finite");
  EXPECT_EQ(outcomes.Find(Begin(0, 1, 4))->outcome(), TOO_STALE);
  EXPECT_EQ(outcomes.Find(Begin(0, 1, 3))->outcome(), DROPPED_LATE);  // out of order
  EXPECT_FALSE(outcomes.Find(Begin(0, 1, 5)).has_value());
  EXPECT_FALSE(outcomes.Find(Begin(1, 1, 1)).has_value());
  EXPECT_FALSE(outcomes.Find(Begin(0, 2, 1)).has_value());  // another process
  EXPECT_EQ(outcomes.furthest_step(), 1);                   // of what was applied
}

TEST(PushOutcomesTest, RemembersAFewOfEachRank) {
  PushOutcomes outcomes;
  for (int64_t step = 1; step <= 1000; ++step) {
    outcomes.Note(Begin(0, 1, step), Reply(APPLIED, step));
  }
  EXPECT_EQ(outcomes.Find(Begin(0, 1, 1000))->outcome(), DUPLICATE);
  EXPECT_EQ(outcomes.Find(Begin(0, 1, 1000 - 63))->outcome(), DUPLICATE);
  EXPECT_EQ(outcomes.Find(Begin(0, 1, 1))->outcome(), DROPPED_LATE);
  EXPECT_EQ(outcomes.furthest_step(), 1000);
}

}  // namespace
}  // namespace codistill
