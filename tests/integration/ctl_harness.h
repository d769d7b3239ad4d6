#ifndef CODISTILL_TESTS_INTEGRATION_CTL_HARNESS_H_
#define CODISTILL_TESTS_INTEGRATION_CTL_HARNESS_H_

#include <sys/types.h>

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "control/child_process.h"
#include "nlohmann/json.hpp"
#include "proto/job.pb.h"

namespace codistill {

// How a command ended and what it printed.
struct CommandResult {
  ExitState exit;
  std::string out;
  std::string err;
};

// A command that runs, its output going to files. Killed by the destructor if it still runs.
class Command {
 public:
  // argv[0] is the path of a binary. Ends the program if it cannot be started: tests have nothing
  // to say then.
  explicit Command(const std::vector<std::string>& argv);
  ~Command();
  Command(const Command&) = delete;
  Command& operator=(const Command&) = delete;

  pid_t pid() const { return process_.pid(); }
  bool running() { return !process_.Poll(); }
  void Signal(int signal) const { process_.Signal(signal); }
  // What it has printed so far.
  std::string Out() const;
  std::string Err() const;
  // Waits for its end. One that takes longer than kPatience is killed, and the result says
  // signal 9.
  CommandResult Wait();

 private:
  const std::string out_path_;
  const std::string err_path_;
  ChildProcess process_;
};

// codistillctl with these arguments, from start to end.
CommandResult Ctl(const std::vector<std::string>& args);
// Its command line, for Command.
std::vector<std::string> CtlArgv(std::vector<std::string> args);

// Writes a job file into a new directory and returns its path.
std::string WriteJob(const JobConfig& job);
std::string WriteText(const std::string& name, const std::string& text);

// Orphans of this process's children become its own children, so that a test can see them end and
// can kill them. Declare one first thing in a test that starts codistillctl.
class OrphanCatcher {
 public:
  OrphanCatcher();
  // Kills every descendant of this process.
  ~OrphanCatcher();
};

// Processes whose command line has `text` in it, dead but unreaped ones left out.
std::vector<pid_t> ProcessesWith(const std::string& text);

// Polls until true; false after kPatience.
bool WaitUntil(const std::function<bool()>& done);

// `codistillctl status OUT --json` once every daemon answers and every group has reached `step`;
// null if that does not come.
nlohmann::json AwaitStatus(const std::string& out, int64_t step);

// A parsed JSON file or text; null (and a test failure) if it is none.
nlohmann::json ParseJson(const std::string& text);
nlohmann::json ReadJson(const std::string& path);

// The manifests of a group's checkpoints in a run directory, each verified with all files it names.
// Steps, in rising order. A damaged one is a test failure.
std::vector<int64_t> VerifiedCheckpoints(const std::string& out, const std::string& group);

}  // namespace codistill

#endif  // CODISTILL_TESTS_INTEGRATION_CTL_HARNESS_H_
