#include "common/base/mutex.h"

#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(MutexTest, ExcludesConcurrentWriters) {
  Mutex mu;
  int counter = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 20000; ++i) {
        MutexLock lock(&mu);
        ++counter;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ReaderMutexLock lock(&mu);
  EXPECT_EQ(counter, 80000);
}

TEST(MutexTest, AwaitSeesWhatAnotherThreadWrote) {
  Mutex mu;
  bool ready = false;
  int value = 0;
  std::thread writer([&] {
    MutexLock lock(&mu);
    value = 42;
    ready = true;
  });
  {
    MutexLock lock(&mu);
    mu.Await(absl::Condition(&ready));
    EXPECT_EQ(value, 42);
  }
  writer.join();
}

TEST(MutexTest, AwaitWithDeadlineGivesUp) {
  Mutex mu;
  bool never = false;
  const absl::Time start = absl::Now();
  MutexLock lock(&mu);
  EXPECT_FALSE(mu.AwaitWithDeadline(absl::Condition(&never), start + absl::Milliseconds(20)));
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(20));
  EXPECT_FALSE(mu.AwaitWithTimeout(absl::Condition(&never), absl::ZeroDuration()));
  never = true;
  EXPECT_TRUE(mu.AwaitWithDeadline(absl::Condition(&never), absl::InfinitePast()));
}

TEST(CondVarTest, SignalWakesAWaiterAndDeadlinePasses) {
  Mutex mu;
  CondVar cv;
  int turn = 0;
  std::thread other([&] {
    MutexLock lock(&mu);
    while (turn != 1) cv.Wait(&mu);
    turn = 2;
    cv.SignalAll();
  });
  {
    MutexLock lock(&mu);
    turn = 1;
    cv.SignalAll();
    while (turn != 2) cv.Wait(&mu);
  }
  other.join();
  MutexLock lock(&mu);
  EXPECT_TRUE(cv.WaitWithDeadline(&mu, absl::Now() + absl::Milliseconds(5)));
}

}  // namespace
}  // namespace codistill
