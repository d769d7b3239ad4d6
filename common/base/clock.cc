#include "common/base/clock.h"

#include "absl/time/clock.h"

namespace codistill {
namespace {

class RealClock : public Clock {
 public:
  absl::Time Now() const override { return absl::Now(); }

  void SleepUntil(absl::Time deadline) override {
    for (absl::Time now = absl::Now(); now < deadline; now = absl::Now()) {
      absl::SleepFor(deadline - now);
    }
  }

  bool AwaitWithDeadline(Mutex* mu, const absl::Condition& condition, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) override {
    return mu->AwaitWithDeadline(condition, deadline);
  }
};

}  // namespace

Clock* Clock::Real() {
  static Clock* const clock = new RealClock;
  return clock;
}

}  // namespace codistill
