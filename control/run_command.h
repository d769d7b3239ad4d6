#ifndef CODISTILL_CONTROL_RUN_COMMAND_H_
#define CODISTILL_CONTROL_RUN_COMMAND_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace codistill {

// `codistillctl run`: a whole job on this machine, from the job file to summary.json.
struct RunOptions {
  std::string job_path;
  std::string out;
  // Where relative paths of frozen teachers start; empty = the job's directory.
  std::string teachers_dir;
  std::string data_dir;
  bool resume = false;
  bool restart = false;
  bool json = false;
  bool trace = false;             // of every daemon, in OUT/trace
  std::vector<std::string> sets;  // "field.path=value"
  int64_t steps = 0;              // > 0 overrides stop.steps
  absl::Duration timeout = absl::InfiniteDuration();
  std::string exporter;  // empty = find it
  std::string python = "/usr/bin/python3";
};

// Exit code of the process: 0 = all groups reached stop.steps and the summary is written; 1 =
// failed (the reason is on stderr); 2 = bad job or options, nothing was started; 130 = interrupted,
// drained. SIGINT and SIGTERM drain; a second one kills.
int RunCommand(const RunOptions& options);

// First part of it, without processes: makes or claims the run directory. ALREADY_EXISTS if it
// holds a run and `resume` is off, NOT_FOUND if it holds none and `resume` is on,
// FAILED_PRECONDITION if another codistillctl works in it. The lock lasts as long as the process.
absl::Status ClaimRunDirectory(const std::string& out, bool resume);

}  // namespace codistill

#endif  // CODISTILL_CONTROL_RUN_COMMAND_H_
