// A first-in first-out queue between threads with a fixed capacity.

#ifndef CODISTILL_COMMON_BASE_BOUNDED_QUEUE_H_
#define CODISTILL_COMMON_BASE_BOUNDED_QUEUE_H_

#include <cstddef>
#include <deque>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"

namespace codistill {

// Back-pressure is the point of this class: a producer that is faster than its consumer is made to
// wait (Push, up to its deadline) or told so at once (TryPush), and memory stays bounded by
// `capacity` items. There is no unbounded mode. Choose TryPush where the producer can pass the
// refusal on (an RPC answers RESOURCE_EXHAUSTED), Push where it can stop reading its own source.
//
// Close ends the queue: pushes are refused from then on, pops drain what is left and then get
// CANCELLED; everyone blocked wakes. T needs to be movable. Thread-safe; any number of producers
// and consumers. Deadlines are wall-clock.
template <typename T>
class BoundedQueue {
 public:
  explicit BoundedQueue(size_t capacity) : capacity_(capacity == 0 ? 1 : capacity) {}
  BoundedQueue(const BoundedQueue&) = delete;
  BoundedQueue& operator=(const BoundedQueue&) = delete;

  // Appends without waiting. RESOURCE_EXHAUSTED when full, CANCELLED when closed; `item` is moved
  // from only on success.
  absl::Status TryPush(T&& item) {
    MutexLock lock(&mu_);
    if (closed_) return absl::CancelledError("queue is closed");
    if (items_.size() >= capacity_) return absl::ResourceExhaustedError("queue is full");
    items_.push_back(std::move(item));
    return absl::OkStatus();
  }

  // Waits for room. DEADLINE_EXCEEDED when there is none by `deadline`, CANCELLED when closed;
  // `item` is moved from only on success.
  absl::Status Push(T&& item, absl::Time deadline) {
    MutexLock lock(&mu_);
    const bool woken =
        mu_.AwaitWithDeadline(absl::Condition(this, &BoundedQueue::HasRoomOrClosed), deadline);
    if (closed_) return absl::CancelledError("queue is closed");
    if (!woken) return absl::DeadlineExceededError("queue stayed full until the deadline");
    items_.push_back(std::move(item));
    return absl::OkStatus();
  }

  // Waits for an item. DEADLINE_EXCEEDED when none came by `deadline` (absl::InfinitePast() polls),
  // CANCELLED when the queue is closed and empty.
  absl::StatusOr<T> Pop(absl::Time deadline) {
    MutexLock lock(&mu_);
    mu_.AwaitWithDeadline(absl::Condition(this, &BoundedQueue::HasItemOrClosed), deadline);
    if (items_.empty()) {
      if (closed_) return absl::CancelledError("queue is closed");
      return absl::DeadlineExceededError("queue stayed empty until the deadline");
    }
    T item = std::move(items_.front());
    items_.pop_front();
    return item;
  }

  // Idempotent.
  void Close() {
    MutexLock lock(&mu_);
    closed_ = true;
  }

  bool closed() const {
    MutexLock lock(&mu_);
    return closed_;
  }
  size_t size() const {
    MutexLock lock(&mu_);
    return items_.size();
  }
  size_t capacity() const { return capacity_; }

 private:
  bool HasRoomOrClosed() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return closed_ || items_.size() < capacity_;
  }
  bool HasItemOrClosed() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return closed_ || !items_.empty();
  }

  const size_t capacity_;
  mutable Mutex mu_;
  std::deque<T> items_ ABSL_GUARDED_BY(mu_);
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_BOUNDED_QUEUE_H_
