#include "common/base/executor.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/retry_after.h"

namespace codistill {
namespace {

// When a full queue is worth another try: some of its tasks have run by then.
constexpr absl::Duration kRetryDelay = absl::Milliseconds(100);

}  // namespace

void SetThreadName(absl::string_view name) {
  pthread_setname_np(pthread_self(), std::string(name.substr(0, 15)).c_str());
}

absl::StatusOr<std::unique_ptr<Executor>> Executor::Create(Options options) {
  if (options.threads < 1) {
    return absl::InvalidArgumentError(absl::StrCat("executor ", options.name, ": threads is ",
                                                   options.threads, "; want at least 1"));
  }
  if (options.queue_capacity < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("executor ", options.name, ": queue_capacity is 0; want at least 1"));
  }
  return std::unique_ptr<Executor>(new Executor(std::move(options)));
}

Executor::Executor(Options options)
    : options_(std::move(options)), queue_(options_.queue_capacity) {
  MutexLock lock(&shutdown_mu_);
  threads_.reserve(options_.threads);
  for (int i = 0; i < options_.threads; ++i) threads_.emplace_back([this, i] { Run(i); });
}

Executor::~Executor() { Shutdown(); }

absl::Status Executor::Schedule(std::function<void()> task) {
  absl::Status status = queue_.TryPush(std::move(task));
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      return WithRetryAfter(absl::ResourceExhaustedError(
                                absl::StrCat("executor ", options_.name, ": all ",
                                             queue_.capacity(), " places of its queue are taken")),
                            kRetryDelay);
    case absl::StatusCode::kCancelled:
      return absl::UnavailableError(absl::StrCat("executor ", options_.name, " is shutting down"));
    default:
      return status;
  }
}

void Executor::Run(int index) {
  SetThreadName(absl::StrCat(options_.name, "/", index));
  while (true) {
    absl::StatusOr<std::function<void()>> task = queue_.Pop(absl::InfiniteFuture());
    if (!task.ok()) return;  // closed and drained
    (*task)();
  }
}

void Executor::Shutdown() {
  queue_.Close();
  MutexLock lock(&shutdown_mu_);
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

PeriodicTask::PeriodicTask(Options options, std::function<void()> function)
    : options_(std::move(options)), function_(std::move(function)), thread_([this] { Run(); }) {}

PeriodicTask::~PeriodicTask() { Stop(); }

void PeriodicTask::Stop() {
  {
    MutexLock lock(&mu_);
    stopping_ = true;
  }
  MutexLock lock(&join_mu_);
  if (thread_.joinable()) thread_.join();
}

void PeriodicTask::Run() {
  SetThreadName(options_.name);
  Clock* clock = options_.clock;
  absl::Time next =
      options_.run_immediately ? absl::InfinitePast() : clock->Now() + options_.interval;
  while (true) {
    {
      MutexLock lock(&mu_);
      if (clock->AwaitWithDeadline(&mu_, absl::Condition(&stopping_), next)) return;
    }
    function_();
    const absl::Time now = clock->Now();
    next = std::max(next + options_.interval, now);
    if (next == now) next = now + options_.interval;
  }
}

}  // namespace codistill
