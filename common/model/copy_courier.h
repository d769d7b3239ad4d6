#ifndef CODISTILL_COMMON_MODEL_COPY_COURIER_H_
#define CODISTILL_COMMON_MODEL_COPY_COURIER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"

namespace codistill {

// Hands over what is being copied asynchronously from a device: each copy as soon as it has ended,
// in the order in which they were added, on a thread of its own. Whoever starts copies never waits.
// Knows nothing of CUDA. Thread-safe.
class CopyCourier {
 public:
  struct Copy {
    // Returns when the copy has ended.
    std::function<absl::Status()> await;
    // Takes what was copied.
    std::function<void()> deliver;
  };

  CopyCourier();
  ~CopyCourier();
  CopyCourier(const CopyCourier&) = delete;
  CopyCourier& operator=(const CopyCourier&) = delete;

  // Never blocks. As many may be on their way as one pass adds before it calls Drain.
  void Add(Copy copy);

  // Returns when all that were added have been delivered, or the first error of one: those behind
  // it are awaited, so that nobody writes into their memory any more, but not delivered. The next
  // Add begins anew.
  absl::Status Drain();

 private:
  void Run();
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_ || !copies_.empty(); }
  bool IsIdle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return copies_.empty() && !busy_; }

  Mutex mu_;
  std::deque<Copy> copies_ ABSL_GUARDED_BY(mu_);
  bool busy_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status error_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

// Bounds the memory that one side fills and another lets go of, some time. Thread-safe; tokens may
// outlive it.
class HeldBytes {
 public:
  HeldBytes() : state_(std::make_shared<State>()) {}

  // Waits until at most `most` bytes are held. False: still more at `deadline`.
  bool AwaitAtMost(int64_t most, absl::Time deadline);
  // Counts `bytes` until the token goes.
  std::shared_ptr<const void> Hold(int64_t bytes);
  int64_t held() const;

 private:
  struct State {
    mutable Mutex mu;
    int64_t held ABSL_GUARDED_BY(mu) = 0;
  };
  const std::shared_ptr<State> state_;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_COPY_COURIER_H_
