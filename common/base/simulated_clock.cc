#include "common/base/simulated_clock.h"

namespace codistill {
namespace {

struct ConditionOrTime {
  const absl::Condition* condition;
  const std::atomic<int64_t>* now_nanos;
  absl::Time deadline;

  bool TimeReached() const { return absl::FromUnixNanos(now_nanos->load()) >= deadline; }
  bool Eval() const { return condition->Eval() || TimeReached(); }
};

}  // namespace

SimulatedClock::SimulatedClock(absl::Time start) : now_nanos_(absl::ToUnixNanos(start)) {}

absl::Time SimulatedClock::Now() const { return absl::FromUnixNanos(now_nanos_.load()); }

void SimulatedClock::SleepUntil(absl::Time deadline) {
  Mutex mu;
  MutexLock lock(&mu);
  bool never = false;
  AwaitWithDeadline(&mu, absl::Condition(&never), deadline);
}

bool SimulatedClock::AwaitWithDeadline(Mutex* mu, const absl::Condition& condition,
                                       absl::Time deadline) {
  if (condition.Eval()) return true;
  // Registration happens with the caller's mutex released, to keep the lock order; the time may
  // pass in between, which the first evaluation of `either` sees. Between the last wait and
  // re-locking after deregistration the condition may change again, hence the loop.
  const ConditionOrTime either{&condition, &now_nanos_, deadline};
  while (!either.Eval()) {
    mu->Unlock();
    std::list<Mutex*>::iterator self;
    {
      MutexLock lock(&mu_);
      self = waiting_.insert(waiting_.end(), mu);
    }
    mu->Lock();
    mu->Await(absl::Condition(&either, &ConditionOrTime::Eval));
    mu->Unlock();
    {
      MutexLock lock(&mu_);
      waiting_.erase(self);
    }
    mu->Lock();
  }
  return condition.Eval();
}

void SimulatedClock::Advance(absl::Duration by) {
  now_nanos_.fetch_add(absl::ToInt64Nanoseconds(by));
  WakeWaiters();
}

void SimulatedClock::Set(absl::Time time) {
  now_nanos_.store(absl::ToUnixNanos(time));
  WakeWaiters();
}

void SimulatedClock::WakeWaiters() {
  MutexLock lock(&mu_);
  // absl re-evaluates conditions when their mutex is released.
  for (Mutex* waiter : waiting_) {
    waiter->Lock();
    waiter->Unlock();
  }
}

bool SimulatedClock::BlockUntilWaiters(int count, absl::Duration timeout) {
  struct Enough {
    const std::list<Mutex*>* waiting;
    size_t count;
    bool Eval() const { return waiting->size() >= count; }
  };
  MutexLock lock(&mu_);
  const Enough enough{&waiting_, static_cast<size_t>(count)};
  return mu_.AwaitWithTimeout(absl::Condition(&enough, &Enough::Eval), timeout);
}

int SimulatedClock::waiters() const {
  MutexLock lock(&mu_);
  return static_cast<int>(waiting_.size());
}

}  // namespace codistill
