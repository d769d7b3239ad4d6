#ifndef CODISTILL_COMMON_DAEMON_PROCESS_H_
#define CODISTILL_COMMON_DAEMON_PROCESS_H_

#include <functional>
#include <string>
#include <thread>

#include "absl/time/time.h"
#include "common/base/mutex.h"

namespace codistill {
namespace internal {

// From now on SIGTERM and SIGINT wait for a SignalThread, and SIGPIPE is ignored. By handlers
// rather than by blocking them: a library may have started threads before main(), as OpenBLAS does,
// and the system gives a signal to any thread that does not block it. Once, after whatever else
// installs handlers.
void CatchDrainSignals();

// While it lives, and if CatchDrainSignals was called: the first SIGTERM or SIGINT calls `on_first`
// with its name, on a thread of its own; the next one ends the process with code 1.
class SignalThread {
 public:
  explicit SignalThread(std::function<void(const std::string& name)> on_first);
  ~SignalThread();

 private:
  void Run();

  const std::function<void(const std::string&)> on_first_;
  Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

// Ends the process with code 1, saying `what` does not end, unless destroyed within `limit`: for
// waits that nothing else can break off and after which memory they use is freed.
class Watchdog {
 public:
  Watchdog(std::string what, absl::Duration limit);
  ~Watchdog();

 private:
  Mutex mu_;
  bool done_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_COMMON_DAEMON_PROCESS_H_
