#include "predserver/compute_pool.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>

#include "absl/synchronization/barrier.h"
#include "absl/synchronization/notification.h"
#include "common/base/simulated_clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

std::unique_ptr<ComputePool> MakePool(int threads, Clock* clock = Clock::Real()) {
  ComputePool::Options options;
  options.threads = threads;
  options.clock = clock;
  auto pool = ComputePool::Create(options);
  EXPECT_TRUE(pool.ok()) << pool.status();
  return *std::move(pool);
}

// So many passes, each of which advances the clock by `cost` and says who ran.
class Backlog {
 public:
  Backlog(ComputePool* pool, SimulatedClock* clock, char name, int passes, absl::Duration cost,
          std::string* log, Mutex* mu)
      : pool_(pool), mu_(mu), left_(passes) {
    entry_ = pool->Join([this, clock, name, cost, log, mu](const ComputePool::Situation&) {
      ComputePool::Offer offer;
      MutexLock lock(mu);
      if (left_ == 0) return offer;
      --left_;
      offer.more = left_ > 0;
      offer.pass = [=] {
        clock->Advance(cost);
        MutexLock lock(mu);
        log->push_back(name);
      };
      return offer;
    });
  }
  ~Backlog() { pool_->Leave(entry_); }
  void Wake() { pool_->Wake(entry_); }
  void Add(int passes) {
    MutexLock lock(mu_);
    left_ += passes;
  }

 private:
  ComputePool* const pool_;
  Mutex* const mu_;
  int left_;
  ComputePool::Entry* entry_;
};

// A pass that keeps the pool's only thread until it is let go.
class Blocker {
 public:
  explicit Blocker(ComputePool* pool) : pool_(pool) {
    entry_ = pool->Join([this](const ComputePool::Situation&) {
      ComputePool::Offer offer;
      if (asked_.exchange(true)) return offer;
      offer.pass = [this] {
        begun_.Notify();
        go_.WaitForNotification();
      };
      return offer;
    });
    pool->Wake(entry_);
    begun_.WaitForNotification();
  }
  ~Blocker() { pool_->Leave(entry_); }
  void LetGo() { go_.Notify(); }

 private:
  ComputePool* const pool_;
  std::atomic<bool> asked_{false};
  absl::Notification begun_, go_;
  ComputePool::Entry* entry_;
};

void AwaitLength(Mutex* mu, const std::string& log, size_t length) {
  MutexLock lock(mu);
  auto enough = [&] { return log.size() == length; };
  ASSERT_TRUE(mu->AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(30))) << log;
}

TEST(ComputePoolTest, SourcesShareTheTimeNotThePasses) {
  SimulatedClock clock;
  const auto pool = MakePool(1, &clock);
  Mutex mu;
  std::string log;
  Blocker blocker(pool.get());
  Backlog slow(pool.get(), &clock, 's', 10, absl::Milliseconds(30), &log, &mu);
  Backlog fast(pool.get(), &clock, 'f', 30, absl::Milliseconds(10), &log, &mu);
  slow.Wake();
  fast.Wake();
  blocker.LetGo();
  AwaitLength(&mu, log, 40);
  // At any time neither has had more than two passes' time above the other.
  int difference = 0;  // in units of 10 ms
  for (size_t i = 0; i < 36; ++i) {
    difference += log[i] == 's' ? 3 : -1;
    EXPECT_LE(std::abs(difference), 6) << log.substr(0, i + 1);
  }
}

TEST(ComputePoolTest, WhoWasAwayHasNoClaimForIt) {
  SimulatedClock clock;
  const auto pool = MakePool(1, &clock);
  Mutex mu;
  std::string log;
  Backlog busy(pool.get(), &clock, 'b', 30, absl::Milliseconds(10), &log, &mu);
  Backlog late(pool.get(), &clock, 'l', 10, absl::Milliseconds(10), &log, &mu);
  busy.Wake();
  AwaitLength(&mu, log, 30);  // 300 ms, while the other wanted nothing
  Blocker blocker(pool.get());
  log.clear();
  busy.Add(10);
  late.Wake();
  busy.Wake();
  blocker.LetGo();
  AwaitLength(&mu, log, 20);
  // They take turns from the start.
  EXPECT_EQ(std::count(log.begin(), log.begin() + 10, 'l'), 5) << log;
}

TEST(ComputePoolTest, PassesRunAtOnceOnAllThreads) {
  const auto pool = MakePool(3);
  absl::Barrier* const together = new absl::Barrier(4);
  std::atomic<int> left{3};
  ComputePool::Entry* entry = pool->Join([&](const ComputePool::Situation&) {
    ComputePool::Offer offer;
    const int place = left.fetch_sub(1);
    if (place <= 0) return offer;
    offer.more = place > 1;
    offer.pass = [together] {
      if (together->Block()) delete together;  // all three, or this hangs
    };
    return offer;
  });
  pool->Wake(entry);
  if (together->Block()) delete together;
  pool->Leave(entry);
}

TEST(ComputePoolTest, AsksAgainAtTheTimeGiven) {
  SimulatedClock clock;
  const auto pool = MakePool(2, &clock);
  const absl::Time when = clock.Now() + absl::Milliseconds(5);
  absl::Notification ran;
  ComputePool::Entry* entry = pool->Join([&](const ComputePool::Situation& situation) {
    ComputePool::Offer offer;
    if (clock.Now() < when) {
      offer.again = when;
    } else if (!ran.HasBeenNotified()) {
      EXPECT_EQ(situation.idle_threads, 1);
      offer.pass = [&ran] { ran.Notify(); };
    }
    return offer;
  });
  ASSERT_TRUE(clock.BlockUntilWaiters(2));
  pool->Wake(entry);
  ASSERT_TRUE(clock.BlockUntilWaiters(2));
  clock.Advance(absl::Milliseconds(4));
  EXPECT_FALSE(ran.WaitForNotificationWithTimeout(absl::Milliseconds(20)));
  ASSERT_TRUE(clock.BlockUntilWaiters(2));
  clock.Advance(absl::Milliseconds(1));
  EXPECT_TRUE(ran.WaitForNotificationWithTimeout(absl::Seconds(30)));
  pool->Leave(entry);
}

// Work that comes back at once, after a pause, and for good not at all, with threads that spin.
TEST(ComputePoolTest, SpinsOnlyWhileWorkKeepsComingSoon) {
  SimulatedClock clock;
  ComputePool::Options options;
  options.clock = &clock;
  options.spin = absl::Milliseconds(1);
  auto pool = ComputePool::Create(options);
  ASSERT_TRUE(pool.ok()) << pool.status();
  Mutex mu;
  std::string log;
  Backlog work(pool->get(), &clock, 'w', 1, absl::ZeroDuration(), &log, &mu);
  // Nobody has come soon yet: it waits without spinning.
  ASSERT_TRUE(clock.BlockUntilWaiters(1));
  work.Wake();
  AwaitLength(&mu, log, 1);
  // The clock stands, so work comes soon each time, and from now on the thread spins: nothing waits
  // for the clock, and nothing will until it has moved beyond the time to spin.
  for (size_t i = 2; i <= 20; ++i) {
    work.Add(1);
    work.Wake();
    AwaitLength(&mu, log, i);
  }
  EXPECT_FALSE(clock.BlockUntilWaiters(1, absl::Milliseconds(30)));
  clock.Advance(absl::Milliseconds(2));
  ASSERT_TRUE(clock.BlockUntilWaiters(1));
  // That was too long ago to spin next time.
  work.Add(1);
  work.Wake();
  AwaitLength(&mu, log, 21);
  ASSERT_TRUE(clock.BlockUntilWaiters(1));
}

TEST(ComputePoolTest, LeavingWaitsForThePassUnderWay) {
  const auto pool = MakePool(2);
  auto blocker = std::make_unique<Blocker>(pool.get());
  Blocker* const held = blocker.get();
  absl::Notification left;
  std::thread leaving([&] {
    blocker.reset();
    left.Notify();
  });
  EXPECT_FALSE(left.WaitForNotificationWithTimeout(absl::Milliseconds(30)));
  held->LetGo();
  leaving.join();
}

TEST(ComputePoolTest, NeedsAThread) {
  ComputePool::Options options;
  options.threads = 0;
  EXPECT_EQ(ComputePool::Create(options).status().message(),
            "prediction.compute_threads is 0; it must be at least 1");
}

}  // namespace
}  // namespace codistill
