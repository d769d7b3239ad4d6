#include "common/daemon/process.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <utility>

#include "common/base/executor.h"
#include "glog/logging.h"

namespace codistill {
namespace internal {
namespace {

std::atomic<bool> signals_blocked{false};

sigset_t DrainSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

[[noreturn]] void ExitNow() {
  google::FlushLogFiles(google::INFO);
  _exit(1);
}

}  // namespace

void BlockDrainSignals() {
  const sigset_t signals = DrainSignals();
  PCHECK(pthread_sigmask(SIG_BLOCK, &signals, nullptr) == 0);
  signal(SIGPIPE, SIG_IGN);
  signals_blocked = true;
}

SignalThread::SignalThread(std::function<void(const std::string&)> on_first)
    : on_first_(std::move(on_first)) {
  if (signals_blocked) thread_ = std::thread([this] { Run(); });
}

SignalThread::~SignalThread() {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(&mu_);
    stopping_ = true;
  }
  pthread_kill(thread_.native_handle(), SIGTERM);
  thread_.join();
}

void SignalThread::Run() {
  SetThreadName("signals");
  const sigset_t signals = DrainSignals();
  bool first = true;
  while (true) {
    int number = 0;
    if (sigwait(&signals, &number) != 0) continue;
    {
      MutexLock lock(&mu_);
      if (stopping_) return;
    }
    const std::string name = number == SIGINT ? "SIGINT" : "SIGTERM";
    if (!first) {
      LOG(ERROR) << "second signal (" << name << ") while draining: exiting at once";
      ExitNow();
    }
    first = false;
    on_first_(name);
  }
}

Watchdog::Watchdog(std::string what, absl::Duration limit)
    : thread_([this, what = std::move(what), limit] {
        MutexLock lock(&mu_);
        if (mu_.AwaitWithTimeout(absl::Condition(&done_), limit)) return;
        LOG(ERROR) << what << " does not end within " << limit << ": exiting at once";
        ExitNow();
      }) {}

Watchdog::~Watchdog() {
  {
    MutexLock lock(&mu_);
    done_ = true;
  }
  thread_.join();
}

}  // namespace internal
}  // namespace codistill
