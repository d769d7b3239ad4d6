#include "common/base/executor.h"

#include <pthread.h>

#include <atomic>
#include <string>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "common/base/simulated_clock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

std::unique_ptr<Executor> MakeExecutor(int threads, size_t capacity) {
  Executor::Options options;
  options.name = "test-pool";
  options.threads = threads;
  options.queue_capacity = capacity;
  return Executor::Create(options).value();
}

TEST(ExecutorTest, RefusesBadOptions) {
  Executor::Options options;
  options.threads = 0;
  EXPECT_EQ(Executor::Create(options).status().code(), absl::StatusCode::kInvalidArgument);
  options.threads = 1;
  options.queue_capacity = 0;
  EXPECT_EQ(Executor::Create(options).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ExecutorTest, OneThreadRunsInOrderAndShutdownDrains) {
  auto executor = MakeExecutor(1, 100);
  std::vector<int> seen;
  for (int i = 0; i < 100; ++i) {
    ASSERT_TRUE(executor->Schedule([&seen, i] { seen.push_back(i); }).ok());
  }
  executor->Shutdown();
  ASSERT_EQ(seen.size(), 100u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(seen[i], i);
  absl::Status late = executor->Schedule([] {});
  EXPECT_EQ(late.code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(late.message().find("test-pool"), absl::string_view::npos);
  executor->Shutdown();
}

TEST(ExecutorTest, SaysWhenFull) {
  auto executor = MakeExecutor(1, 2);
  absl::Notification started, release;
  ASSERT_TRUE(executor
                  ->Schedule([&] {
                    started.Notify();
                    release.WaitForNotification();
                  })
                  .ok());
  started.WaitForNotification();
  std::atomic<int> ran{0};
  ASSERT_TRUE(executor->Schedule([&] { ++ran; }).ok());
  ASSERT_TRUE(executor->Schedule([&] { ++ran; }).ok());
  EXPECT_EQ(executor->queue_size(), 2u);
  EXPECT_EQ(executor->Schedule([&] { ++ran; }).code(), absl::StatusCode::kResourceExhausted);
  release.Notify();
  executor->Shutdown();
  EXPECT_EQ(ran, 2);
}

TEST(ExecutorTest, ThreadsRunAtTheSameTimeAndAreNamed) {
  auto executor = MakeExecutor(2, 4);
  // Each task waits for the other: this ends only when both run at once.
  absl::Notification first, second;
  std::string name(16, '\0');
  ASSERT_TRUE(executor
                  ->Schedule([&] {
                    pthread_getname_np(pthread_self(), &name[0], name.size());
                    first.Notify();
                    second.WaitForNotification();
                  })
                  .ok());
  ASSERT_TRUE(executor
                  ->Schedule([&] {
                    second.Notify();
                    first.WaitForNotification();
                  })
                  .ok());
  executor->Shutdown();
  EXPECT_EQ(name.substr(0, 10), "test-pool/");
}

TEST(ExecutorTest, TasksMayScheduleTasks) {
  auto executor = MakeExecutor(2, 10);
  absl::Notification done;
  ASSERT_TRUE(
      executor->Schedule([&] { EXPECT_TRUE(executor->Schedule([&] { done.Notify(); }).ok()); })
          .ok());
  EXPECT_TRUE(done.WaitForNotificationWithTimeout(absl::Seconds(30)));
}

TEST(PeriodicTaskTest, RunsOncePerInterval) {
  SimulatedClock clock;
  std::atomic<int> calls{0};
  PeriodicTask::Options options;
  options.interval = absl::Seconds(10);
  options.clock = &clock;
  PeriodicTask task(options, [&] { ++calls; });
  ASSERT_TRUE(clock.BlockUntilWaiters(1));
  EXPECT_EQ(calls, 0);
  for (int i = 1; i <= 3; ++i) {
    clock.Advance(absl::Seconds(10));
    // The thread runs the function and comes back to wait for the next interval.
    const absl::Time give_up = absl::Now() + absl::Seconds(30);
    while (calls < i && absl::Now() < give_up) absl::SleepFor(absl::Milliseconds(1));
    ASSERT_EQ(calls, i);
    ASSERT_TRUE(clock.BlockUntilWaiters(1));
  }
  task.Stop();
  clock.Advance(absl::Seconds(100));
  EXPECT_EQ(calls, 3);
}

TEST(PeriodicTaskTest, RunsImmediatelyWhenAsked) {
  absl::Notification called;
  PeriodicTask::Options options;
  options.interval = absl::Hours(1);
  options.run_immediately = true;
  PeriodicTask task(options, [&] { called.Notify(); });
  EXPECT_TRUE(called.WaitForNotificationWithTimeout(absl::Seconds(30)));
}

TEST(PeriodicTaskTest, StopsPromptly) {
  const absl::Time start = absl::Now();
  {
    PeriodicTask::Options options;
    options.interval = absl::Hours(1);
    PeriodicTask task(options, [] {});
  }
  EXPECT_LT(absl::Now() - start, absl::Seconds(20));
}

}  // namespace
}  // namespace codistill
