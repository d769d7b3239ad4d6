#ifndef CODISTILL_PREDSERVER_COMPUTE_POOL_H_
#define CODISTILL_PREDSERVER_COMPUTE_POOL_H_

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/clock.h"
#include "common/base/mutex.h"

namespace codistill {

// The threads that compute, shared by all models of a process. Each runs one pass at a time. Who
// has work is asked for its next pass when a thread is free and not before, so that a pass is put
// together from all that has come by then.
//
// Fair between sources by the time their passes take (start-time fair queueing, Goyal, Vin and
// Cheng 1996): the source that has had the least, among those with work, is asked first; one that
// comes back after a pause has no claim for the time it did not use.
//
// Thread-safe. Destruction joins the threads; all sources have left by then.
class ComputePool {
 public:
  struct Options {
    int threads = 1;
    std::string name = "compute";  // of the threads
    // How long a thread without work may keep its core awake for what comes next; others' threads
    // have the core whenever they want it. A core that has fallen asleep takes tens of microseconds
    // to wake, and comes back with cold caches. One thread at a time does so, and only while work
    // keeps coming that soon: whoever is asked now and then costs nothing. Zero: never.
    absl::Duration spin;
    Clock* clock = Clock::Real();
  };

  // What a source is told when it is asked.
  struct Situation {
    int idle_threads = 0;         // besides the one that asks
    bool others_waiting = false;  // another source has work too
  };
  // What it answers.
  struct Offer {
    std::function<void()> pass;  // null: nothing to run now
    bool more = false;           // another thread may ask for more at once
    // Without a pass: ask again then, even if nobody calls Wake.
    absl::Time again = absl::InfiniteFuture();
  };
  // Called by the pool's threads, by several at once, without locks.
  using Source = std::function<Offer(const Situation&)>;

  // INVALID_ARGUMENT for threads < 1.
  static absl::StatusOr<std::unique_ptr<ComputePool>> Create(Options options);
  ~ComputePool();
  ComputePool(const ComputePool&) = delete;
  ComputePool& operator=(const ComputePool&) = delete;

  struct Entry;
  // The entry is the pool's and valid until Leave.
  Entry* Join(Source source);
  // Returns when no thread is in the source or a pass of it, and none will be.
  void Leave(Entry* entry);
  // The source has work, or may have.
  void Wake(Entry* entry);

  int threads() const { return options_.threads; }

 private:
  explicit ComputePool(Options options);
  void Run(int index);
  Entry* Pick(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Wanted(int64_t timers) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WaitForWork() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Spin(int64_t timers, absl::Time until) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Asks `entry`, and runs what it offers.
  void Serve(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  Mutex mu_;
  bool closing_ ABSL_GUARDED_BY(mu_) = false;
  std::list<Entry> entries_ ABSL_GUARDED_BY(mu_);
  int idle_ ABSL_GUARDED_BY(mu_) = 0;
  int asking_ ABSL_GUARDED_BY(mu_) = 0;       // entries with work
  int64_t timers_ ABSL_GUARDED_BY(mu_) = 0;   // changes when an entry's time to be asked does
  int64_t started_ ABSL_GUARDED_BY(mu_) = 0;  // passes
  bool spinning_ ABSL_GUARDED_BY(mu_) = false;
  bool soon_ ABSL_GUARDED_BY(mu_) = false;  // work came within options_.spin the last time
  // Virtual time: what the source asked last had used then.
  absl::Duration now_used_ ABSL_GUARDED_BY(mu_);
  std::vector<std::thread> threads_;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_COMPUTE_POOL_H_
