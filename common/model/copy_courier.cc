#include "common/model/copy_courier.h"

#include <utility>

#include "common/base/executor.h"

namespace codistill {

CopyCourier::CopyCourier() {
  thread_ = std::thread([this] {
    SetThreadName("copies");
    Run();
  });
}

CopyCourier::~CopyCourier() {
  {
    MutexLock lock(&mu_);
    stopping_ = true;
  }
  thread_.join();
}

void CopyCourier::Add(Copy copy) {
  MutexLock lock(&mu_);
  copies_.push_back(std::move(copy));
}

absl::Status CopyCourier::Drain() {
  MutexLock lock(&mu_);
  mu_.Await(absl::Condition(this, &CopyCourier::IsIdle));
  return std::exchange(error_, absl::OkStatus());
}

void CopyCourier::Run() {
  MutexLock lock(&mu_);
  while (true) {
    mu_.Await(absl::Condition(this, &CopyCourier::HasWork));
    // What was added is awaited even at the end: its memory is still being written.
    if (copies_.empty()) return;
    Copy copy = std::move(copies_.front());
    copies_.pop_front();
    busy_ = true;
    const bool deliver = error_.ok();
    mu_.Unlock();
    const absl::Status status = copy.await();
    if (status.ok() && deliver) copy.deliver();
    copy = Copy();
    mu_.Lock();
    busy_ = false;
    if (error_.ok()) error_ = status;
  }
}

bool HeldBytes::AwaitAtMost(int64_t most, absl::Time deadline) {
  struct Wanted {
    const State* state;
    int64_t most;
    bool Holds() const ABSL_NO_THREAD_SAFETY_ANALYSIS { return state->held <= most; }
  } wanted{state_.get(), most};
  MutexLock lock(&state_->mu);
  return state_->mu.AwaitWithDeadline(absl::Condition(&wanted, &Wanted::Holds), deadline);
}

std::shared_ptr<const void> HeldBytes::Hold(int64_t bytes) {
  {
    MutexLock lock(&state_->mu);
    state_->held += bytes;
  }
  return std::shared_ptr<const void>(this, [state = state_, bytes](const void*) {
    MutexLock lock(&state->mu);
    state->held -= bytes;
  });
}

int64_t HeldBytes::held() const {
  MutexLock lock(&state_->mu);
  return state_->held;
}

}  // namespace codistill
