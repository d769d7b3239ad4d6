// A clock that stands still until a test moves it.

#ifndef CODISTILL_COMMON_BASE_SIMULATED_CLOCK_H_
#define CODISTILL_COMMON_BASE_SIMULATED_CLOCK_H_

#include <atomic>
#include <cstdint>
#include <list>

#include "common/base/clock.h"

namespace codistill {

// Threads blocked in SleepUntil or AwaitWithDeadline wake when Advance or Set carries the time past
// their deadline, or (AwaitWithDeadline) when their condition becomes true. To avoid a race between
// a thread that is about to wait and the test that advances, the test first calls
// BlockUntilWaiters.
//
// Thread-safe. Advance and Set must be called without holding any mutex that a waiter waits with.
class SimulatedClock : public Clock {
 public:
  explicit SimulatedClock(absl::Time start = absl::UnixEpoch() + absl::Hours(24 * 365));

  absl::Time Now() const override;
  void SleepUntil(absl::Time deadline) override;
  bool AwaitWithDeadline(Mutex* mu, const absl::Condition& condition, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) override;

  void Advance(absl::Duration by);
  // Moves to `time`; going backwards is allowed, as it is for a wall clock.
  void Set(absl::Time time);

  // Waits (in real time, at most `timeout`) until at least `count` threads wait for this clock.
  bool BlockUntilWaiters(int count, absl::Duration timeout = absl::Seconds(10));
  int waiters() const;

 private:
  void WakeWaiters();

  std::atomic<int64_t> now_nanos_;  // since the Unix epoch; atomic because conditions read it
  // Lock order: mu_ before the mutexes of waiters.
  mutable Mutex mu_;
  std::list<Mutex*> waiting_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_SIMULATED_CLOCK_H_
