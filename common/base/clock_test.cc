#include "common/base/clock.h"

#include <thread>

#include "absl/time/clock.h"
#include "common/base/simulated_clock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(RealClockTest, FollowsTheSystemAndSleepsLongEnough) {
  Clock* clock = Clock::Real();
  EXPECT_LT(absl::AbsDuration(clock->Now() - absl::Now()), absl::Seconds(5));
  const absl::Time start = clock->Now();
  clock->SleepFor(absl::Milliseconds(5));
  EXPECT_GE(clock->Now() - start, absl::Milliseconds(5));
}

TEST(RealClockTest, AwaitEndsByDeadlineOrCondition) {
  Mutex mu;
  bool flag = false;
  MutexLock lock(&mu);
  Clock* clock = Clock::Real();
  EXPECT_FALSE(
      clock->AwaitWithDeadline(&mu, absl::Condition(&flag), clock->Now() + absl::Milliseconds(5)));
  flag = true;
  EXPECT_TRUE(clock->AwaitWithDeadline(&mu, absl::Condition(&flag), clock->Now()));
}

TEST(SimulatedClockTest, StandsStillUntilAdvanced) {
  SimulatedClock clock;
  const absl::Time start = clock.Now();
  EXPECT_EQ(clock.Now(), start);
  clock.Advance(absl::Seconds(90));
  EXPECT_EQ(clock.Now(), start + absl::Seconds(90));
  clock.Set(start);
  EXPECT_EQ(clock.Now(), start);
  clock.SleepUntil(start);  // already there
}

TEST(SimulatedClockTest, SleepersWakeOnlyWhenTheirTimeHasCome) {
  SimulatedClock clock;
  std::atomic<bool> awake{false};
  std::thread sleeper([&] {
    clock.SleepFor(absl::Seconds(10));
    awake = true;
  });
  ASSERT_TRUE(clock.BlockUntilWaiters(1));
  clock.Advance(absl::Seconds(9));
  EXPECT_EQ(clock.waiters(), 1);
  EXPECT_FALSE(awake);
  clock.Advance(absl::Seconds(1));
  sleeper.join();
  EXPECT_TRUE(awake);
  EXPECT_EQ(clock.waiters(), 0);
}

TEST(SimulatedClockTest, AwaitEndsByConditionWithoutTimePassing) {
  SimulatedClock clock;
  Mutex mu;
  bool flag = false;
  bool result = false;
  std::thread waiter([&] {
    MutexLock lock(&mu);
    result = clock.AwaitWithDeadline(&mu, absl::Condition(&flag), clock.Now() + absl::Hours(1));
  });
  ASSERT_TRUE(clock.BlockUntilWaiters(1));
  {
    MutexLock lock(&mu);
    flag = true;
  }
  waiter.join();
  EXPECT_TRUE(result);
}

TEST(SimulatedClockTest, AwaitReturnsFalseAtTheDeadline) {
  SimulatedClock clock;
  Mutex mu;
  bool flag = false;
  bool result = true;
  std::thread waiter([&] {
    MutexLock lock(&mu);
    result = clock.AwaitWithDeadline(&mu, absl::Condition(&flag), clock.Now() + absl::Hours(1));
  });
  ASSERT_TRUE(clock.BlockUntilWaiters(1));
  clock.Advance(absl::Hours(1));
  waiter.join();
  EXPECT_FALSE(result);
}

}  // namespace
}  // namespace codistill
