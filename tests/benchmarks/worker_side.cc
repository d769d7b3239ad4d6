#include "tests/benchmarks/worker_side.h"

#include <sched.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "control/daemon_client.h"
#include "httplib.h"

namespace codistill {
namespace {

// A script that runs the binary on one core.
absl::StatusOr<std::string> Pinned(const std::string& directory, const std::string& binary,
                                   int core) {
  const std::string path = JoinPath(directory, BaseName(binary));
  CODISTILL_RETURN_IF_ERROR(WriteFileAtomically(
      path, absl::StrCat("#!/bin/sh\nexec taskset -c ", core, " '", binary, "' \"$@\"\n")));
  if (chmod(path.c_str(), 0755) != 0) return absl::InternalError("chmod");
  return path;
}

// On which cores every thread of a process may run.
absl::Status CheckPinned(pid_t pid, int core) {
  cpu_set_t cores;
  if (sched_getaffinity(pid, sizeof(cores), &cores) != 0 || CPU_COUNT(&cores) != 1 ||
      !CPU_ISSET(core, &cores)) {
    return absl::InternalError(absl::StrCat("process ", pid, " is not pinned to core ", core));
  }
  return absl::OkStatus();
}

// Processor time of another process so far, all threads.
absl::StatusOr<double> ProcessorSeconds(pid_t pid) {
  clockid_t clock;
  timespec time = {};
  if (clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &time) != 0) {
    return absl::InternalError(absl::StrCat("no processor time of process ", pid));
  }
  return time.tv_sec + time.tv_nsec * 1e-9;
}

}  // namespace

absl::Status WorkerSide::Start(const std::string& data_dir) {
  const BinaryPaths built = RunfilesBinaries();
  BinaryPaths binaries = built;
  if (pinned_) {
    const std::string scripts = NewDirectory("pinned");
    CODISTILL_ASSIGN_OR_RETURN(binaries.parameter_server,
                               Pinned(scripts, built.parameter_server, kServerCore));
    CODISTILL_ASSIGN_OR_RETURN(binaries.worker, Pinned(scripts, built.worker, kWorkerCore));
    CODISTILL_ASSIGN_OR_RETURN(binaries.prediction_server,
                               Pinned(scripts, built.prediction_server, kServerCore));
  }
  harness_.set_binaries(binaries);
  harness_.set_data_dir(data_dir);
  CODISTILL_RETURN_IF_ERROR(harness_.Start());
  if (pinned_) {
    CODISTILL_RETURN_IF_ERROR(
        CheckPinned(harness_.member("alpha.shard.0").process.pid(), kServerCore));
    CODISTILL_RETURN_IF_ERROR(
        CheckPinned(harness_.member("alpha.worker.0").process.pid(), kWorkerCore));
  }
  CODISTILL_RETURN_IF_ERROR(harness_.WaitForStep(0, 2 * kWarmSteps));
  return Rest();
}

absl::StatusOr<Turn> WorkerSide::Run(int steps) {
  const pid_t pid = harness_.member("alpha.worker.0").process.pid();
  Signal(SIGCONT);
  CODISTILL_ASSIGN_OR_RETURN(const double processor_before, ProcessorSeconds(pid));
  CODISTILL_ASSIGN_OR_RETURN(const GetHistoryReply before, harness_.History(0));
  const int64_t from = before.state().version().step() + kWarmSteps;
  CODISTILL_RETURN_IF_ERROR(ResumeDaemon(Leader(), absl::Seconds(10)));
  CODISTILL_RETURN_IF_ERROR(harness_.WaitForStep(0, from + steps + 1));
  CODISTILL_RETURN_IF_ERROR(Rest());
  const auto begin = seconds_.find(from);
  const auto end = seconds_.find(from + steps);
  if (begin == seconds_.end() || end == seconds_.end()) {
    return absl::InternalError(absl::StrCat("the history lacks step ", from, " or ", from + steps));
  }
  CODISTILL_ASSIGN_OR_RETURN(const double processor_after, ProcessorSeconds(pid));
  Turn turn;
  turn.seconds = end->second - begin->second;
  turn.processor_seconds_a_step = (processor_after - processor_before) /
                                  (losses_.rbegin()->first - before.state().version().step());
  return turn;
}

absl::StatusOr<WorkerCounters> WorkerSide::Counters() {
  Signal(SIGCONT);
  CODISTILL_ASSIGN_OR_RETURN(const DaemonStatus status, harness_.StatusOf("alpha.worker.0"));
  return status.worker();
}

absl::StatusOr<WorkerSide::ThreadSeconds> WorkerSide::Seconds() {
  Signal(SIGCONT);
  httplib::Client client("http://" + harness_.member("alpha.worker.0").http_address);
  const httplib::Result page = client.Get("/metrics");
  if (!page || page->status != 200) return absl::InternalError("no metrics of the worker");
  ThreadSeconds seconds;
  int lines = 0;
  for (const absl::string_view line : absl::StrSplit(page->body, '\n')) {
    if (!absl::StartsWith(line, "codistill_worker_seconds_total{")) continue;
    double value = 0;
    if (!absl::SimpleAtod(line.substr(line.rfind(' ') + 1), &value)) continue;
    ++lines;
    seconds.all += value;
    if (absl::StrContains(line, "activity=\"teacher\"")) seconds.teacher = value;
  }
  if (lines < 5) return absl::InternalError("the worker's metrics lack its time");
  return seconds;
}

void WorkerSide::Signal(int signal) {
  for (const auto& member : harness_.fleet().members()) member->process.Signal(signal);
}

absl::Status WorkerSide::Rest() {
  CODISTILL_RETURN_IF_ERROR(PauseDaemon(Leader(), absl::Seconds(10)));
  int64_t last = -1;
  absl::Time since;
  CODISTILL_RETURN_IF_ERROR(harness_.WaitFor("the pause", [&]() -> absl::StatusOr<bool> {
    CODISTILL_ASSIGN_OR_RETURN(const GetHistoryReply history, harness_.History(0));
    if (history.state().version().step() != last) {
      last = history.state().version().step();
      since = absl::Now();
    }
    // Steps that were handed out before still come in.
    return absl::Now() - since > absl::Seconds(1);
  }));
  CODISTILL_RETURN_IF_ERROR(ReadHistory());
  Signal(SIGSTOP);
  return absl::OkStatus();
}

absl::Status WorkerSide::ReadHistory() {
  CODISTILL_ASSIGN_OR_RETURN(const GetHistoryReply history, harness_.History(0));
  for (const TrainingPoint& point : history.training()) {
    losses_[point.step()] = point.label_loss();
    seconds_[point.step()] = point.seconds();
  }
  return absl::OkStatus();
}

}  // namespace codistill
