#include "predserver/batch_policy.h"

#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr absl::Duration kDelay = absl::Milliseconds(1);

class BatchPolicyTest : public testing::Test {
 protected:
  void Come(int requests) {
    for (int i = 0; i < requests; ++i) policy_.Came(now_);
    queued_ += requests;
  }
  bool Starts() { return policy_.StartAt(queued_, queued_, now_) <= now_; }
  // A pass over all that wait; returns how many those were.
  int Pass(absl::Duration took = absl::Milliseconds(3)) {
    const int taken = Begin();
    now_ += took;
    End(taken);
    return taken;
  }
  int Begin() {
    const int taken = queued_;
    policy_.Started(taken);
    queued_ = 0;
    return taken;
  }
  void End(int taken) {
    policy_.Computed(taken);
    policy_.Answered(taken, now_);
  }

  absl::Time now_ = absl::UnixEpoch();
  BatchPolicy policy_{{/*max_examples=*/100, kDelay}};
  int queued_ = 0;
};

TEST_F(BatchPolicyTest, ALoneClientNeverWaits) {
  for (int i = 0; i < 20; ++i) {
    Come(1);
    ASSERT_TRUE(Starts()) << i;
    Pass();
    now_ += absl::Microseconds(i * 100);
  }
}

TEST_F(BatchPolicyTest, WaitsForAsManyAsThereWere) {
  Come(1);
  ASSERT_TRUE(Starts());
  const int first = Begin();
  Come(7);  // while that is computed
  End(first);
  Come(1);  // the first one again: all eight are here
  ASSERT_TRUE(Starts());
  EXPECT_EQ(Pass(), 8);
  for (int round = 0; round < 10; ++round) {
    Come(1);
    ASSERT_FALSE(Starts());
    EXPECT_TRUE(policy_.waiting());
    Come(6);
    ASSERT_FALSE(Starts());
    EXPECT_FALSE(policy_.Enough(queued_, queued_));
    Come(1);
    EXPECT_TRUE(policy_.Enough(queued_, queued_));
    ASSERT_TRUE(Starts());
    EXPECT_EQ(Pass(), 8);
  }
}

TEST_F(BatchPolicyTest, WaitsNoLongerThanTheDelayForTheNext) {
  Come(8);
  ASSERT_TRUE(Starts());
  Pass();
  Come(4);
  EXPECT_EQ(policy_.StartAt(queued_, queued_, now_), now_ + kDelay);
  now_ += kDelay / 2;
  EXPECT_EQ(policy_.StartAt(queued_, queued_, now_), now_ + kDelay / 2);
  now_ += kDelay / 2;
  ASSERT_TRUE(Starts());
  EXPECT_EQ(Pass(), 4);
  // Four it is from now on.
  Come(4);
  EXPECT_TRUE(Starts());
}

TEST_F(BatchPolicyTest, WaitsOnWhileTheyComeButNotForEver) {
  Come(8);
  ASSERT_TRUE(Starts());
  Pass();
  const absl::Time start = now_;
  Come(1);
  while (!Starts()) {
    now_ += kDelay;
    Come(1);
  }
  EXPECT_EQ(now_ - start, 4 * kDelay);
  EXPECT_EQ(Pass(), 5);
}

TEST_F(BatchPolicyTest, AFullBatchDoesNotWait) {
  Come(90);
  ASSERT_TRUE(Starts());
  const int first = Begin();
  Come(90);
  End(first);
  EXPECT_FALSE(Starts());  // 90 of 180
  Come(10);
  EXPECT_TRUE(Starts());
}

TEST_F(BatchPolicyTest, TheseThatAreComputedElsewhereAreNotAwaited) {
  Come(8);
  ASSERT_TRUE(Starts());
  Pass();
  Come(5);
  ASSERT_FALSE(Starts());
  now_ += kDelay;
  ASSERT_TRUE(Starts());
  const int elsewhere = Begin();  // 5
  Come(3);                        // the other three, to another thread
  EXPECT_TRUE(Starts());
  const int here = Begin();
  End(elsewhere);
  End(here);
}

TEST_F(BatchPolicyTest, AfterAPauseNobodyIsExpected) {
  Come(8);
  ASSERT_TRUE(Starts());
  Pass();
  now_ += 2 * kDelay;
  Come(1);
  EXPECT_TRUE(Starts());
}

TEST_F(BatchPolicyTest, VainWaitsBecomeRare) {
  // One asks twice at a time and then thinks for long: the second never finds company.
  int waits = 0;
  for (int i = 0; i < 200; ++i) {
    Come(1);
    ASSERT_TRUE(Starts());
    const int first = Begin();
    Come(1);
    now_ += absl::Milliseconds(3);
    End(first);
    if (!Starts()) {
      ++waits;
      now_ += kDelay;
      ASSERT_TRUE(Starts());
    }
    Pass();
    now_ += absl::Milliseconds(20);
  }
  EXPECT_GE(waits, 5);
  EXPECT_LE(waits, 12);
}

TEST(DrainRateTest, MeasuresBusyTimeOnly) {
  DrainRate rate;
  absl::Time now = absl::UnixEpoch();
  EXPECT_EQ(rate.RetryDelay(5, now), absl::Milliseconds(100));  // nothing is known
  for (int i = 0; i < 100; ++i) {
    rate.Passed(10, now, now + absl::Milliseconds(50));
    now += absl::Milliseconds(50 + 1000);  // a second without requests
  }
  EXPECT_NEAR(rate.per_second(), 200, 1e-6);
  for (int i = 0; i < 100; ++i) {  // it becomes slower
    rate.Passed(10, now, now + absl::Milliseconds(500));
    now += absl::Milliseconds(500);
  }
  EXPECT_NEAR(rate.per_second(), 20, 0.1);
}

TEST(DrainRateTest, OverlappingPassesCountTheirTimeOnce) {
  DrainRate rate;
  const absl::Time start = absl::UnixEpoch();
  for (int i = 1; i <= 100; ++i) {  // two threads, each with a pass of 10 ms
    const absl::Time end = start + i * absl::Milliseconds(10);
    rate.Passed(4, end - absl::Milliseconds(10), end);
    rate.Passed(4, end - absl::Milliseconds(10), end);
  }
  EXPECT_NEAR(rate.per_second(), 800, 10);
}

TEST(DrainRateTest, RefusedOnesAreSpreadOverTheTimeTheQueueTakes) {
  DrainRate rate;
  const absl::Time now = absl::UnixEpoch();
  rate.Passed(10, now - absl::Milliseconds(100), now);  // one in 10 ms
  for (int round = 0; round < 2; ++round) {
    for (int i = 1; i <= 20; ++i) {
      EXPECT_NEAR(absl::ToDoubleMilliseconds(rate.RetryDelay(20, now)), 10 * i, 1e-6);
    }
  }
}

TEST(DrainRateTest, DelaysHaveBounds) {
  DrainRate fast, slow;
  const absl::Time now = absl::UnixEpoch();
  fast.Passed(1000, now - absl::Milliseconds(1), now);
  EXPECT_EQ(fast.RetryDelay(1, now), absl::Milliseconds(1));
  slow.Passed(1, now - absl::Minutes(1), now);
  EXPECT_EQ(slow.RetryDelay(1, now), absl::Seconds(10));
}

}  // namespace
}  // namespace codistill
