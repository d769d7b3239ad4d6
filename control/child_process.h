#ifndef CODISTILL_CONTROL_CHILD_PROCESS_H_
#define CODISTILL_CONTROL_CHILD_PROCESS_H_

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/optional.h"

namespace codistill {

// How a child ended.
struct ExitState {
  int exit_code = 0;  // when it exited by itself
  int signal = 0;     // when a signal ended it
  bool clean() const { return exit_code == 0 && signal == 0; }
  std::string ToString() const;  // "exited with code 1", "killed by signal 9 (Killed)"
};

// One child process. It has a process group of its own, so that Ctrl-C at the terminal reaches only
// us, and the kernel sends it SIGTERM when the thread that started it ends: no orphan outlives its
// parent, however that dies. Start children from a thread that lives as long as they should. Not
// thread-safe.
class ChildProcess {
 public:
  ChildProcess() = default;

  // Starts argv[0] with output and errors appended to `log_path`. NOT_FOUND names a missing binary.
  static absl::StatusOr<ChildProcess> Start(const std::vector<std::string>& argv,
                                            const std::string& log_path);

  pid_t pid() const { return pid_; }
  bool running() const { return pid_ > 0 && !exit_; }
  // How it ended, once it has; reaps it.
  const absl::optional<ExitState>& Poll();
  void Signal(int signal) const;

 private:
  pid_t pid_ = 0;
  absl::optional<ExitState> exit_;
};

// The last `lines` lines of a log file, each indented, for error messages; empty if there are none.
std::string TailOfFile(const std::string& path, int lines);

}  // namespace codistill

#endif  // CODISTILL_CONTROL_CHILD_PROCESS_H_
