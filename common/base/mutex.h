// Mutex, MutexLock, CondVar: absl::Mutex with the same annotations, plus hooks that tell
// ThreadSanitizer about every acquire and release.
//
// Why not absl::Mutex itself: a distribution's prebuilt abseil is not instrumented, so
// ThreadSanitizer sees no synchronisation in it and reports every correctly locked field as a race.
// The hooks compile to nothing outside TSan builds.
//
// Waiting: prefer Await with an absl::Condition, which needs no signalling:
//
//   MutexLock lock(&mu_);
//   if (!mu_.AwaitWithDeadline(absl::Condition(&done_), deadline)) return DeadlineExceeded...;
//
// A condition must be a pure function of fields guarded by the mutex (and atomics): absl evaluates
// it in whichever thread happens to release the mutex.

#ifndef CODISTILL_COMMON_BASE_MUTEX_H_
#define CODISTILL_COMMON_BASE_MUTEX_H_

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#if defined(__SANITIZE_THREAD__)
#define CODISTILL_INTERNAL_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define CODISTILL_INTERNAL_TSAN 1
#endif
#endif

#ifdef CODISTILL_INTERNAL_TSAN
#include <sanitizer/tsan_interface.h>
#define CODISTILL_INTERNAL_TSAN_CALL(hook, ...) __tsan_mutex_##hook(__VA_ARGS__)
#else
#define CODISTILL_INTERNAL_TSAN_CALL(hook, ...) static_cast<void>(0)
#endif

namespace codistill {

class CondVar;

// A mutual-exclusion lock, shared (reader) mode included. Not reentrant.
class ABSL_LOCKABLE Mutex {
 public:
  Mutex() { CODISTILL_INTERNAL_TSAN_CALL(create, this, 0); }
  ~Mutex() { CODISTILL_INTERNAL_TSAN_CALL(destroy, this, 0); }
  Mutex(const Mutex&) = delete;
  Mutex& operator=(const Mutex&) = delete;

  void Lock() ABSL_EXCLUSIVE_LOCK_FUNCTION() {
    CODISTILL_INTERNAL_TSAN_CALL(pre_lock, this, 0);
    mu_.Lock();
    CODISTILL_INTERNAL_TSAN_CALL(post_lock, this, 0, 0);
  }
  void Unlock() ABSL_UNLOCK_FUNCTION() {
    CODISTILL_INTERNAL_TSAN_CALL(pre_unlock, this, 0);
    mu_.Unlock();
    CODISTILL_INTERNAL_TSAN_CALL(post_unlock, this, 0);
  }
  void ReaderLock() ABSL_SHARED_LOCK_FUNCTION() {
    CODISTILL_INTERNAL_TSAN_CALL(pre_lock, this, __tsan_mutex_read_lock);
    mu_.ReaderLock();
    CODISTILL_INTERNAL_TSAN_CALL(post_lock, this, __tsan_mutex_read_lock, 0);
  }
  void ReaderUnlock() ABSL_UNLOCK_FUNCTION() {
    CODISTILL_INTERNAL_TSAN_CALL(pre_unlock, this, __tsan_mutex_read_lock);
    mu_.ReaderUnlock();
    CODISTILL_INTERNAL_TSAN_CALL(post_unlock, this, __tsan_mutex_read_lock);
  }
  void AssertHeld() const ABSL_ASSERT_EXCLUSIVE_LOCK() { mu_.AssertHeld(); }

  // Releases the mutex until `condition` holds, then returns with the mutex held. The mutex must be
  // held exclusively. Only for waits that something else is sure to end; else give a deadline.
  void Await(const absl::Condition& condition) ABSL_EXCLUSIVE_LOCKS_REQUIRED(this) {
    ReleasedForTsan released(this);
    mu_.Await(condition);
  }

  // The same, giving up at `deadline` (wall-clock; absl::InfiniteFuture() waits for ever). Returns
  // whether the condition holds, which is known for certain since the mutex is held on return.
  bool AwaitWithDeadline(const absl::Condition& condition, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(this) {
    ReleasedForTsan released(this);
    return mu_.AwaitWithDeadline(condition, deadline);
  }
  bool AwaitWithTimeout(const absl::Condition& condition, absl::Duration timeout)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(this) {
    ReleasedForTsan released(this);
    return mu_.AwaitWithTimeout(condition, timeout);
  }

 private:
  friend class CondVar;

  // Tells TSan that a wait gives the mutex up and takes it again. What the wait reads in between
  // (conditions) happens under the real mutex, in TSan's "inside a lock operation" window, where
  // memory accesses are not reported.
  class ReleasedForTsan {
   public:
    explicit ReleasedForTsan(Mutex* mu) : mu_(mu) {
      CODISTILL_INTERNAL_TSAN_CALL(pre_unlock, mu_, 0);
      CODISTILL_INTERNAL_TSAN_CALL(post_unlock, mu_, 0);
      CODISTILL_INTERNAL_TSAN_CALL(pre_lock, mu_, 0);
    }
    ~ReleasedForTsan() {
      CODISTILL_INTERNAL_TSAN_CALL(post_lock, mu_, 0, 0);
      static_cast<void>(mu_);
    }

   private:
    Mutex* mu_;
  };

  absl::Mutex mu_;
};

// Holds a Mutex for its own lifetime.
class ABSL_SCOPED_LOCKABLE MutexLock {
 public:
  explicit MutexLock(Mutex* mu) ABSL_EXCLUSIVE_LOCK_FUNCTION(mu) : mu_(mu) { mu_->Lock(); }
  ~MutexLock() ABSL_UNLOCK_FUNCTION() { mu_->Unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex* const mu_;
};

// Holds a Mutex in shared mode for its own lifetime.
class ABSL_SCOPED_LOCKABLE ReaderMutexLock {
 public:
  explicit ReaderMutexLock(Mutex* mu) ABSL_SHARED_LOCK_FUNCTION(mu) : mu_(mu) { mu_->ReaderLock(); }
  ~ReaderMutexLock() ABSL_UNLOCK_FUNCTION() { mu_->ReaderUnlock(); }
  ReaderMutexLock(const ReaderMutexLock&) = delete;
  ReaderMutexLock& operator=(const ReaderMutexLock&) = delete;

 private:
  Mutex* const mu_;
};

// For waits whose predicate is costly to evaluate at every unlock. Wait may return without a
// signal: loop over the predicate.
class CondVar {
 public:
  void Wait(Mutex* mu) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    Mutex::ReleasedForTsan released(mu);
    cv_.Wait(&mu->mu_);
  }
  // Returns true when the deadline passed without a signal.
  bool WaitWithDeadline(Mutex* mu, absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    Mutex::ReleasedForTsan released(mu);
    return cv_.WaitWithDeadline(&mu->mu_, deadline);
  }
  void Signal() { cv_.Signal(); }
  void SignalAll() { cv_.SignalAll(); }

 private:
  absl::CondVar cv_;
};

}  // namespace codistill

#undef CODISTILL_INTERNAL_TSAN_CALL

#endif  // CODISTILL_COMMON_BASE_MUTEX_H_
