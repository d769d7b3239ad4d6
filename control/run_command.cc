#include "control/run_command.h"

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "common/client/leader_client.h"
#include "common/config/job.h"
#include "common/config/teachers.h"
#include "control/daemon_client.h"
#include "control/exporter.h"
#include "control/fleet.h"
#include "control/json_output.h"
#include "control/progress.h"
#include "control/report.h"
#include "control/summary.h"

namespace codistill {
namespace {

constexpr absl::Duration kPoll = absl::Milliseconds(100);
constexpr absl::Duration kStatusInterval = absl::Seconds(1);
constexpr absl::Duration kStatusTimeout = absl::Seconds(2);
constexpr absl::Duration kDrainTimeout = absl::Seconds(30);
// How long groups may go on without any worker: the last checkpoint is written then.
constexpr absl::Duration kNobodyLeft = absl::Minutes(2);

std::atomic<int> interrupts{0};

void OnInterrupt(int) {
  if (interrupts.fetch_add(1) > 0) _exit(130);  // the kernel ends the children
}

bool Interrupted() { return interrupts.load() > 0; }

std::string AbsolutePath(const std::string& path) {
  char buffer[4096];
  if (path.empty() || path[0] == '/' || getcwd(buffer, sizeof(buffer)) == nullptr) return path;
  return JoinPath(buffer, path);
}

// Frozen teachers that somebody learns from must be there: better now than from a server's log.
absl::Status CheckFrozenTeachers(const JobConfig& job) {
  std::set<int> used;
  for (int g = 0; g < job.groups_size(); ++g) {
    for (const TeacherRef& teacher : TeachersOf(job, g)) {
      if (teacher.kind == TeacherRef::kFrozen) used.insert(teacher.index);
      for (const TeacherRef& member : MembersOf(job, teacher)) {
        if (member.kind == TeacherRef::kFrozen) used.insert(member.index);
      }
    }
  }
  ErrorList errors;
  const auto check = [&errors](int index, const std::string& field, const std::string& path) {
    if (path.empty() || access(path.c_str(), R_OK) == 0) return;
    errors.Add(absl::StrCat("teachers[", index, "].frozen.", field),
               absl::StrCat("there is no ", path,
                            " that can be read; relative paths start at --teachers_dir, or else at "
                            "the job file's directory"));
  };
  for (const int index : used) {
    const FrozenTeacher& frozen = job.teachers(index).frozen();
    check(index, "archive", frozen.archive());
    if (!frozen.follow()) check(index, "checkpoint", frozen.checkpoint());
  }
  return errors.ToStatus();
}

// One run from start to end.
class Run {
 public:
  explicit Run(const RunOptions& options)
      : options_(options), display_(stdout, isatty(STDOUT_FILENO) != 0, options.json) {}

  absl::Status Prepare();
  absl::Status Execute();

 private:
  absl::Status Monitor(Fleet* fleet);
  absl::StatusOr<RunResult> Collect(const Fleet& fleet);
  absl::Status WriteResults(const RunResult& result);
  std::vector<DaemonStatus> PollLeaders(const Fleet& fleet);

  const RunOptions options_;
  const absl::Time start_ = absl::Now();
  ProgressDisplay display_;
  RunDirectory directory_;
  JobConfig job_;
};

absl::Status Run::Prepare() {
  std::vector<std::string> sets = options_.sets;
  if (options_.steps > 0) sets.push_back(absl::StrCat("stop.steps=", options_.steps));
  const std::string job_directory = AbsolutePath(DirName(options_.job_path));
  CODISTILL_ASSIGN_OR_RETURN(
      job_,
      LoadJob(options_.job_path, sets,
              options_.teachers_dir.empty() ? job_directory : AbsolutePath(options_.teachers_dir)));
  CODISTILL_RETURN_IF_ERROR(CheckFrozenTeachers(job_));
  if (options_.out.empty()) {
    return absl::InvalidArgumentError("--out DIR is required: where the run's files go");
  }
  directory_.root = AbsolutePath(options_.out);
  CODISTILL_RETURN_IF_ERROR(ClaimRunDirectory(directory_.root, options_.resume));
  // Another identity for every invocation: daemons of an earlier one are not ours to talk to.
  job_.set_run_id(absl::StrCat(job_.name(), "-", absl::ToUnixMicros(absl::Now())));
  job_.mutable_checkpoint()->set_directory(directory_.checkpoints());
  const auto replaced = [this](const std::string& whose) {
    display_.Say(absl::StrCat(whose,
                              ": the job's addresses are replaced, since run starts all daemons on "
                              "loopback with ports of its own"));
  };
  for (GroupConfig& group : *job_.mutable_groups()) {
    if (!group.shards().empty() || !group.prediction_servers().empty()) {
      replaced(absl::StrCat("group ", group.name()));
    }
    if (!group.warm_start().empty()) {
      group.set_warm_start(JoinPath(job_directory, group.warm_start()));
    }
  }
  for (const TeacherConfig& teacher : job_.teachers()) {
    if (teacher.has_external() || teacher.prediction_servers().empty()) continue;
    replaced(absl::StrCat("teacher ", teacher.name()));
  }
  if (job_.model().has_export_()) {
    CODISTILL_ASSIGN_OR_RETURN(const std::string exporter, FindExporter(options_.exporter));
    CODISTILL_RETURN_IF_ERROR(ExportModels(job_, job_directory, options_.python, exporter,
                                           directory_.models(), options_.resume, Interrupted));
    job_.mutable_model()->clear_export_();
    job_.mutable_model()->set_archive_dir(directory_.models());
  } else {
    job_.mutable_model()->set_archive_dir(JoinPath(job_directory, job_.model().archive_dir()));
  }
  return absl::OkStatus();
}

std::vector<DaemonStatus> Run::PollLeaders(const Fleet& fleet) {
  std::vector<DaemonStatus> out;
  for (const std::string& address : fleet.LeaderAddresses()) {
    absl::StatusOr<DaemonStatus> status = GetDaemonStatus(address, kStatusTimeout);
    // A leader that is just being started again is shown at the next turn.
    if (status.ok()) out.push_back(*std::move(status));
  }
  return out;
}

absl::Status Run::Monitor(Fleet* fleet) {
  absl::Time next_status = absl::InfinitePast();
  const absl::Time give_up = start_ + options_.timeout;
  absl::Time workers_there = absl::Now();
  while (true) {
    if (Interrupted()) return absl::CancelledError("interrupted");
    CODISTILL_RETURN_IF_ERROR(fleet->Supervise());
    const absl::Time now = absl::Now();
    const bool ended = fleet->WorkersDone() && fleet->EvaluatorDone();
    if (ended || now >= next_status) {
      next_status = now + kStatusInterval;
      const std::vector<DaemonStatus> leaders = PollLeaders(*fleet);
      size_t finished = 0;
      for (const DaemonStatus& leader : leaders) {
        if (leader.group_state().phase() == GroupState::FAILED) {
          return absl::AbortedError(
              absl::StrCat("group ", leader.group(), " failed: ", leader.group_state().error()));
        }
        if (leader.group_state().phase() == GroupState::FINISHED) ++finished;
      }
      if (ended && finished == fleet->LeaderAddresses().size()) {
        display_.Finish(leaders);
        return absl::OkStatus();
      }
      // The leader tells of the end a moment after its workers have left.
      if (!ended) workers_there = now;
      if (now - workers_there > kNobodyLeft) {
        return absl::AbortedError("all workers have ended before their groups had finished");
      }
      display_.Update(leaders, now);
    }
    if (now > give_up) {
      return absl::DeadlineExceededError(
          absl::StrCat("not done within --timeout ", absl::FormatDuration(options_.timeout),
                       "; continue with --resume --out ", directory_.root));
    }
    absl::SleepFor(kPoll);
  }
}

absl::StatusOr<RunResult> Run::Collect(const Fleet& fleet) {
  RunResult result;
  result.job = fleet.job();
  const std::vector<std::string> leaders = fleet.LeaderAddresses();
  for (size_t g = 0; g < leaders.size(); ++g) {
    GroupRef ref;
    ref.set_run_id(RunId(fleet.job()));
    ref.set_group(fleet.job().groups(g).name());
    absl::StatusOr<GetHistoryReply> history =
        LeaderClient::Create(leaders[g], ref)->GetHistory(absl::Now() + absl::Seconds(10));
    if (!history.ok()) return Annotate(history.status(), "history of group " + ref.group());
    result.histories.push_back(*std::move(history));
  }
  if (fleet.job().groups_size() == 1) {
    result.group_disagreement = 0;
  } else if (fleet.job().evaluator().enabled()) {
    CODISTILL_ASSIGN_OR_RETURN(result.group_disagreement,
                               ReadDisagreement(directory_.evaluation()));
  }
  return result;
}

absl::Status Run::WriteResults(const RunResult& result) {
  const RunSummary summary = MakeSummary(result);
  CODISTILL_RETURN_IF_ERROR(WriteFileAtomically(directory_.metrics(), MetricsCsv(result)));
  CODISTILL_RETURN_IF_ERROR(WriteFileAtomically(directory_.report(), ReportHtml(result, summary)));
  // Last: whoever finds a summary finds all of it.
  CODISTILL_RETURN_IF_ERROR(WriteFileAtomically(directory_.summary(), ToJson(summary) + "\n"));
  if (options_.json) {
    std::printf("%s\n", ToJson(summary, 0).c_str());
  } else {
    display_.Say(SummaryText(summary) + "summary  " + directory_.summary() + "\nreport   " +
                 directory_.report());
  }
  return absl::OkStatus();
}

absl::Status Run::Execute() {
  Fleet::Options fleet_options;
  fleet_options.job = job_;
  fleet_options.directory = directory_;
  fleet_options.data_dir = AbsolutePath(options_.data_dir);
  fleet_options.binaries = BinaryPaths::Find();
  fleet_options.restart = options_.restart;
  fleet_options.trace = options_.trace;
  fleet_options.cancelled = Interrupted;
  fleet_options.say = [this](const std::string& line) { display_.Say(line); };
  Fleet fleet(std::move(fleet_options));
  // What a resumed run leaves from last time must not be taken for this one's.
  unlink(directory_.evaluation().c_str());
  unlink(directory_.summary().c_str());

  absl::Status status = fleet.Start();
  if (status.ok()) {
    display_.Say(absl::StrCat("job ", job_.name(), ": ", fleet.members().size(),
                              " daemons are up; status: codistillctl status ", directory_.root));
    status = Monitor(&fleet);
  }
  absl::StatusOr<RunResult> result = absl::UnknownError("not collected");
  if (status.ok()) {
    result = Collect(fleet);
    status.Update(result.status());
  } else if (absl::IsCancelled(status) || absl::IsDeadlineExceeded(status)) {
    display_.Say(absl::StrCat(status.message(), "; draining"));
  }
  const absl::Status drained = fleet.Drain(kDrainTimeout);
  if (status.ok() && !drained.ok()) status = Annotate(drained, "the job ended, but");
  if (!status.ok()) return status;
  result->wall_seconds = absl::ToDoubleSeconds(absl::Now() - start_);
  return WriteResults(*result);
}

}  // namespace

absl::Status ClaimRunDirectory(const std::string& out, bool resume) {
  const bool holds_run = access(JoinPath(out, "job.textproto").c_str(), F_OK) == 0 ||
                         access(JoinPath(out, "checkpoints").c_str(), F_OK) == 0 ||
                         access(JoinPath(out, "summary.json").c_str(), F_OK) == 0;
  if (holds_run && !resume) {
    return absl::AlreadyExistsError(absl::StrCat(
        "--out ", out,
        " already holds a run; continue it with --resume or choose another directory"));
  }
  if (resume && !holds_run) {
    return absl::NotFoundError(absl::StrCat("--resume: ", out, " holds no run"));
  }
  CODISTILL_RETURN_IF_ERROR(FileSystem::Real()->MakeDirs(out));
  const std::string path = JoinPath(out, ".lock");
  // Left open on purpose: the lock goes with the process.
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) {
    return absl::PermissionDeniedError(
        absl::StrCat("cannot write in ", out, ": ", strerror(errno)));
  }
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    close(fd);
    return absl::FailedPreconditionError(
        absl::StrCat("another codistillctl is running a job in ", out));
  }
  return absl::OkStatus();
}

int RunCommand(const RunOptions& options) {
  struct sigaction action;
  memset(&action, 0, sizeof(action));
  action.sa_handler = OnInterrupt;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  signal(SIGPIPE, SIG_IGN);

  Run run(options);
  absl::Status status = run.Prepare();
  int code = 2;
  if (status.ok()) {
    code = 1;
    status = run.Execute();
  } else if (!absl::IsInvalidArgument(status) && !absl::IsNotFound(status) &&
             !absl::IsAlreadyExists(status)) {
    code = 1;  // not a matter of how it was called
  }
  if (status.ok()) return 0;
  std::fprintf(stderr, "codistillctl: %s\n", std::string(status.message()).c_str());
  return absl::IsCancelled(status) ? 130 : code;
}

}  // namespace codistill
