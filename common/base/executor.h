// Threads that run closures: a fixed-size pool, and one task at a regular interval.

#ifndef CODISTILL_COMMON_BASE_EXECUTOR_H_
#define CODISTILL_COMMON_BASE_EXECUTOR_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/base/bounded_queue.h"
#include "common/base/clock.h"
#include "common/base/mutex.h"

namespace codistill {

// A fixed number of threads over a bounded queue. What RPC reactions must not do (compute, disk,
// waiting) is scheduled here; when the queue is full the caller is told and passes it on, nothing
// piles up. Tasks start in order of arrival; with one thread they also end in that order.
//
// Thread-safe. Destruction is Shutdown().
class Executor {
 public:
  struct Options {
    // Thread names are "<name>/<index>", cut to the 15 characters the system shows.
    std::string name = "executor";
    int threads = 1;
    // Tasks accepted but not yet started.
    size_t queue_capacity = 1024;
  };

  // INVALID_ARGUMENT for threads < 1 or queue_capacity < 1.
  static absl::StatusOr<std::unique_ptr<Executor>> Create(Options options);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Runs `task` on one of the threads. RESOURCE_EXHAUSTED when the queue is full, UNAVAILABLE after
  // Shutdown; in both cases `task` will never run. Never blocks. A task may schedule others.
  absl::Status Schedule(std::function<void()> task);

  // Stops accepting, runs everything accepted, joins the threads. Idempotent; a second caller also
  // waits. Must not be called by a task of this executor.
  void Shutdown();

  // Tasks accepted but not started.
  size_t queue_size() const { return queue_.size(); }
  int threads() const { return options_.threads; }

 private:
  explicit Executor(Options options);
  void Run(int index);

  const Options options_;
  BoundedQueue<std::function<void()>> queue_;
  Mutex shutdown_mu_;
  std::vector<std::thread> threads_ ABSL_GUARDED_BY(shutdown_mu_);
};

// Calls a function every `interval` on a thread of its own, until destroyed. Used for heartbeats
// and reports. Calls never overlap; when one takes longer than the interval, the missed ones are
// left out rather than made up for. Stop() and destruction wait for a call in progress but never
// for the interval. Thread-safe.
class PeriodicTask {
 public:
  struct Options {
    std::string name = "periodic";  // of the thread
    absl::Duration interval = absl::Seconds(1);
    // Whether the first call comes at once or after one interval.
    bool run_immediately = false;
    Clock* clock = Clock::Real();
  };

  PeriodicTask(Options options, std::function<void()> function);
  ~PeriodicTask();
  PeriodicTask(const PeriodicTask&) = delete;
  PeriodicTask& operator=(const PeriodicTask&) = delete;

  // No call starts after this returned, and none is in progress. Idempotent. Must not be called by
  // the function itself.
  void Stop();

 private:
  void Run();

  const Options options_;
  const std::function<void()> function_;
  Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  Mutex join_mu_;
  std::thread thread_;
};

// Names the calling thread for debuggers and `top -H`.
void SetThreadName(absl::string_view name);

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_EXECUTOR_H_
