// Time as a dependency. Logic that decides by time (leases, deadlines, back-off, staleness) takes a
// Clock* so that tests can move time by hand; see simulated_clock.h.

#ifndef CODISTILL_COMMON_BASE_CLOCK_H_
#define CODISTILL_COMMON_BASE_CLOCK_H_

#include "absl/time/time.h"
#include "common/base/mutex.h"

namespace codistill {

// Thread-safe. Implementations outlive everything that was given a pointer to them.
class Clock {
 public:
  virtual ~Clock() = default;

  virtual absl::Time Now() const = 0;

  // Blocks until Now() >= `deadline`. Cannot be interrupted: threads that must stop promptly use
  // AwaitWithDeadline instead.
  virtual void SleepUntil(absl::Time deadline) = 0;
  void SleepFor(absl::Duration duration) { SleepUntil(Now() + duration); }

  // Waits, with `mu` held on entry and on return, until `condition` holds or this clock reaches
  // `deadline`. Returns whether the condition holds. `mu` is released while waiting.
  virtual bool AwaitWithDeadline(Mutex* mu, const absl::Condition& condition, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) = 0;

  // The system clock. Never null, never destroyed.
  static Clock* Real();
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_CLOCK_H_
