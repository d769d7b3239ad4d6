#include "common/daemon/process.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <utility>

#include "common/base/executor.h"
#include "glog/logging.h"

namespace codistill {
namespace internal {
namespace {

// From the handler to the SignalThread: the signals' numbers, a byte each. kWake only wakes.
constexpr char kWake = 0;
std::atomic<int> pipe_read{-1};
std::atomic<int> pipe_write{-1};

// Calls only what a signal handler may.
void SendToThread(int number) {
  const int saved = errno;
  const char byte = static_cast<char>(number);
  // A full pipe has signals enough.
  if (write(pipe_write.load(), &byte, 1) < 0) errno = saved;
}

[[noreturn]] void ExitNow() {
  google::FlushLogFiles(google::INFO);
  _exit(1);
}

}  // namespace

void CatchDrainSignals() {
  int ends[2];
  PCHECK(pipe2(ends, O_CLOEXEC) == 0);
  PCHECK(fcntl(ends[1], F_SETFL, O_NONBLOCK) == 0);
  pipe_write = ends[1];
  pipe_read = ends[0];
  struct sigaction action = {};
  action.sa_handler = SendToThread;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  PCHECK(sigaction(SIGTERM, &action, nullptr) == 0);
  PCHECK(sigaction(SIGINT, &action, nullptr) == 0);
  signal(SIGPIPE, SIG_IGN);
}

SignalThread::SignalThread(std::function<void(const std::string&)> on_first)
    : on_first_(std::move(on_first)) {
  if (pipe_read >= 0) thread_ = std::thread([this] { Run(); });
}

SignalThread::~SignalThread() {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(&mu_);
    stopping_ = true;
  }
  SendToThread(kWake);
  thread_.join();
}

void SignalThread::Run() {
  SetThreadName("signals");
  bool first = true;
  while (true) {
    char number = kWake;
    if (read(pipe_read, &number, 1) != 1) continue;
    {
      MutexLock lock(&mu_);
      if (stopping_) return;
    }
    if (number == kWake) continue;  // left by another SignalThread's end
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
