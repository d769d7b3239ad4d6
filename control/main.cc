// codistillctl: runs, watches and steers jobs.
#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/flags/flag.h"
#include "absl/flags/reflection.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "absl/types/optional.h"
#include "common/config/job.h"
#include "control/checkpoint_command.h"
#include "control/daemon_client.h"
#include "control/fleet_status.h"
#include "control/json_output.h"
#include "control/run_command.h"
#include "nlohmann/json.hpp"

ABSL_FLAG(std::string, out, "", "run: directory for everything the run writes");
ABSL_FLAG(bool, resume, false, "run: continue the run in --out from its last checkpoint");
ABSL_FLAG(bool, trace, false,
          "run: every daemon writes what it did when to OUT/trace (Chrome trace format)");
ABSL_FLAG(bool, restart, false, "run: start a daemon again that a signal killed");
ABSL_FLAG(std::string, data_dir, ".", "run: where the job's data files are");
ABSL_FLAG(std::string, teachers_dir, "",
          "run: where relative paths of frozen teachers start (default: the job file's directory)");
ABSL_FLAG(int64_t, steps, 0, "run: overrides stop.steps");
ABSL_FLAG(double, timeout, 0, "run: drain and fail after so many seconds (0 = never)");
ABSL_FLAG(bool, json, false, "print JSON instead of text");
ABSL_FLAG(std::string, exporter, "", "run: path of models/export.py (default: found by itself)");
ABSL_FLAG(std::string, python, "/usr/bin/python3", "run: interpreter that has torch");
ABSL_FLAG(int64_t, step, 0,
          "checkpoint verify, reshard, export: of this step (default: the newest)");
ABSL_FLAG(int, shards, 0, "checkpoint reshard: new number of shards");
ABSL_FLAG(std::string, archive, "",
          "checkpoint export: TorchScript archive to take the model from (default: the run's own)");
ABSL_FLAG(std::string, group, "", "drain, checkpoint, pause, resume, set: only this group");

namespace codistill {
namespace {

constexpr char kUsage[] =
    R"(codistillctl COMMAND ...

  run JOB --out DIR [--data_dir D] [--teachers_dir T] [--resume] [--restart]
          [--set field.path=value]... [--steps N] [--timeout S] [--trace]
          [--json]
                        run a whole job on this machine; ends with DIR/summary.json
  validate JOB [--set field.path=value]... [--json]
                        check a job file; every mistake is reported at once
  status TARGET [--json]
                        state, step and rate of every daemon
  drain TARGET [--group G]
                        finish the work in hand, write a checkpoint, end
  checkpoint TARGET [--group G] [--json]
                        write a checkpoint now
  checkpoint list | verify TARGET [--group G] [--step N] [--json]
                        what checkpoints there are; whether every byte of them is as it was written
  checkpoint reshard TARGET --shards N --out DIR [--group G] [--step N] [--json]
                        the same checkpoint as N shards would have written it
  checkpoint export TARGET --out FILE.safetensors|FILE.pt [--group G] [--step N] [--archive A.pt]
                        trained weights; as a TorchScript archive they load in PyTorch
  pause | resume TARGET [--group G]
                        hold back new steps; take up again
  set TARGET NAME VALUE [--group G]
                        change a setting of the running leaders: v, the verbosity of the log

TARGET is the --out directory of a run, or a job file that gives the daemons' addresses. For checkpoint's
verbs it is a directory: of a group's checkpoints, of several groups' directories, or of a run.
Exit codes: 0 done, 1 failed, 2 bad usage or job file, 130 interrupted or drained before the end.
)";

int Fail(const absl::Status& status, int code) {
  std::fprintf(stderr, "codistillctl: %s\n", std::string(status.message()).c_str());
  return code;
}

int Usage(const std::string& problem) {
  std::fprintf(stderr, "codistillctl: %s\n\n%s", problem.c_str(), kUsage);
  return 2;
}

// A flag of this program (not of the libraries in it); null if there is none of that name.
absl::CommandLineFlag* OwnFlag(const std::string& name) {
  static const std::set<std::string> kNames = {
      "out",    "resume", "restart", "data_dir", "steps",   "json",         "timeout", "exporter",
      "python", "group",  "step",    "shards",   "archive", "teachers_dir", "trace"};
  return kNames.count(name) > 0 ? absl::FindCommandLineFlag(name) : nullptr;
}

int Validate(const std::string& path, const std::vector<std::string>& sets) {
  const absl::StatusOr<JobConfig> job = LoadJob(path, sets);
  if (absl::GetFlag(FLAGS_json)) {
    nlohmann::ordered_json out;
    out["valid"] = job.ok();
    out["errors"] = nlohmann::ordered_json::array();
    if (!job.ok()) {
      std::string text(job.status().message());
      size_t start = 0;
      while (start < text.size()) {
        const size_t end = std::min(text.find('\n', start), text.size());
        const std::string line = text.substr(start, end - start);
        // The first line of several mistakes is a heading, the file's name.
        if (!line.empty() && line != path + ":") out["errors"].push_back(line);
        start = end + 1;
      }
    }
    std::printf("%s\n", out.dump(2).c_str());
    return job.ok() ? 0 : 2;
  }
  if (!job.ok()) return Fail(job.status(), 2);
  std::printf("%s: job \"%s\" is valid\n", path.c_str(), job->name().c_str());
  return 0;
}

// Groups chosen with --group; all without it.
absl::StatusOr<std::vector<int>> ChosenGroups(const JobConfig& job) {
  const std::string name = absl::GetFlag(FLAGS_group);
  std::vector<int> groups;
  if (!name.empty()) {
    const absl::StatusOr<int> group = FindGroup(job, name);
    if (!group.ok()) return group.status();
    groups.push_back(*group);
  } else {
    for (int g = 0; g < job.groups_size(); ++g) groups.push_back(g);
  }
  return groups;
}

int Status(const std::string& target) {
  const absl::StatusOr<JobLocation> location = LocateJob(target);
  if (!location.ok()) return Fail(location.status(), 2);
  const std::vector<DaemonReport> reports = AskDaemons(*location, absl::Seconds(2));
  const std::string text =
      absl::GetFlag(FLAGS_json) ? StatusJson(reports) + "\n" : StatusTable(reports);
  std::fputs(text.c_str(), stdout);
  for (const DaemonReport& report : reports) {
    if (!report.status.ok()) return 1;
  }
  return 0;
}

// Ends every daemon of the chosen groups: workers and prediction servers first, then all shards, of
// which the leaders checkpoint while the others still serve.
int Drain(const std::string& target) {
  const absl::StatusOr<JobLocation> location = LocateJob(target);
  if (!location.ok()) return Fail(location.status(), 2);
  const absl::StatusOr<std::vector<int>> groups = ChosenGroups(location->job);
  if (!groups.ok()) return Fail(groups.status(), 2);
  if (!absl::GetFlag(FLAGS_group).empty() && !location->run_directory.empty()) {
    return Usage(
        "drain --group: codistillctl run ends with its first drained daemon; drain the whole "
        "run, or name a job file with addresses");
  }
  std::vector<std::string> names;
  for (const int g : *groups) names.push_back(location->job.groups(g).name());
  const bool everything = absl::GetFlag(FLAGS_group).empty();
  const std::vector<DaemonReport> reports = AskDaemons(*location, absl::Seconds(2));
  int code = 0;
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (const bool shards : {false, true}) {
    for (const DaemonReport& report : reports) {
      if (!report.status.ok()) {
        if (!shards) std::fprintf(stderr, "%s: unreachable, left alone\n", report.name.c_str());
        continue;
      }
      // Servers of teachers that are no groups, and the evaluator, belong to no group.
      const bool chosen = everything || absl::c_linear_search(names, report.status->group());
      if (!chosen || (report.status->kind() == "parameter_server") != shards) continue;
      const absl::Status status =
          DrainDaemon(report.address, "codistillctl drain", absl::Seconds(10));
      if (!status.ok()) code = Fail(status, 1);
      results.push_back({{"name", report.name}, {"ok", status.ok()}});
      if (!absl::GetFlag(FLAGS_json) && status.ok())
        std::printf("%s: draining\n", report.name.c_str());
    }
  }
  if (absl::GetFlag(FLAGS_json)) std::printf("%s\n", results.dump(2).c_str());
  return code;
}

int OnLeaders(const std::string& command, const std::string& target,
              const std::vector<std::string>& args) {
  const absl::StatusOr<JobLocation> location = LocateJob(target);
  if (!location.ok()) return Fail(location.status(), 2);
  const absl::StatusOr<std::vector<int>> groups = ChosenGroups(location->job);
  if (!groups.ok()) return Fail(groups.status(), 2);
  int code = 0;
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (const int g : *groups) {
    const std::string& name = location->job.groups(g).name();
    absl::StatusOr<std::string> address = LeaderAddress(location->job, g);
    absl::Status status = address.status();
    std::string done = command;
    nlohmann::ordered_json result;
    result["group"] = name;
    if (status.ok() && command == "pause") {
      status = PauseDaemon(*address, absl::Seconds(10));
    } else if (status.ok() && command == "resume") {
      status = ResumeDaemon(*address, absl::Seconds(10));
    } else if (status.ok() && command == "set") {
      const auto previous = SetOnDaemon(*address, args[0], args[1], absl::Seconds(10));
      status = previous.status();
      if (previous.ok()) {
        done = absl::StrCat(args[0], " = ", args[1], " (was ", *previous, ")");
        result["previous"] = *previous;
      }
    } else if (status.ok() && command == "checkpoint") {
      const auto reply = CheckpointGroup(*address, absl::Minutes(5));
      status = reply.status();
      if (reply.ok()) {
        done = absl::StrCat("checkpoint of step ", reply->version().step(), ", ", reply->bytes(),
                            " bytes: ", reply->manifest());
        result["step"] = reply->version().step();
        result["manifest"] = reply->manifest();
        result["bytes"] = reply->bytes();
      }
    }
    result["ok"] = status.ok();
    if (!status.ok()) {
      result["error"] = status.ToString();
      code = Fail(absl::Status(status.code(), absl::StrCat(name, ": ", status.message())), 1);
    } else if (!absl::GetFlag(FLAGS_json)) {
      std::printf("%s: %s\n", name.c_str(), done.c_str());
    }
    results.push_back(std::move(result));
  }
  if (absl::GetFlag(FLAGS_json)) std::printf("%s\n", results.dump(2).c_str());
  return code;
}

// The command line, read here rather than by absl's parser, which ends the process with code 1 at a
// flag it does not know and takes a repeated flag's last value only.
struct CommandLine {
  std::vector<std::string> words;  // command and arguments
  std::vector<std::string> sets;   // values of --set
  bool help = false;
};

absl::Status ReadCommandLine(int argc, char** argv, CommandLine* line) {
  for (int i = 1; i < argc; ++i) {
    absl::string_view arg = argv[i];
    if (!absl::ConsumePrefix(&arg, "--")) {
      line->words.emplace_back(arg);
      continue;
    }
    const size_t equals = arg.find('=');
    const std::string name(arg.substr(0, equals));
    absl::optional<std::string> value;
    if (equals != absl::string_view::npos) value = std::string(arg.substr(equals + 1));
    if (name == "help") {
      line->help = true;
      continue;
    }
    absl::CommandLineFlag* flag = name == "set" ? nullptr : OwnFlag(name);
    if (flag == nullptr && name != "set") {
      return absl::InvalidArgumentError(absl::StrCat("unknown flag --", name));
    }
    if (!value && flag != nullptr && flag->IsOfType<bool>()) value = "true";
    if (!value && i + 1 < argc) value = argv[++i];
    if (!value) return absl::InvalidArgumentError(absl::StrCat("--", name, " needs a value"));
    if (flag == nullptr) {
      line->sets.push_back(*value);
      continue;
    }
    std::string error;
    if (!flag->ParseFrom(*value, &error)) {
      return absl::InvalidArgumentError(absl::StrCat("--", name, ": bad value \"", *value, "\"",
                                                     error.empty() ? "" : ": ", error));
    }
    if ((name == "steps" && absl::GetFlag(FLAGS_steps) < 1) ||
        (name == "timeout" && !(absl::GetFlag(FLAGS_timeout) > 0))) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", name, " must be positive, not ", *value));
    }
  }
  return absl::OkStatus();
}

bool IsCheckpointVerb(const std::string& word) {
  return word == "list" || word == "verify" || word == "reshard" || word == "export";
}

int OnCheckpoints(const std::string& verb, const std::string& target) {
  CheckpointCommandOptions options;
  options.verb = verb;
  options.target = target;
  options.group = absl::GetFlag(FLAGS_group);
  options.step = absl::GetFlag(FLAGS_step);
  options.shards = absl::GetFlag(FLAGS_shards);
  options.out = absl::GetFlag(FLAGS_out);
  options.archive = absl::GetFlag(FLAGS_archive);
  options.python = absl::GetFlag(FLAGS_python);
  options.exporter = absl::GetFlag(FLAGS_exporter);
  options.json = absl::GetFlag(FLAGS_json);
  options.now = absl::Now();
  std::string output;
  bool damaged = false;
  const absl::Status status = RunCheckpointCommand(options, &output, &damaged);
  std::fputs(output.c_str(), stdout);
  if (!status.ok()) return Fail(status, absl::IsInvalidArgument(status) ? 2 : 1);
  return damaged ? 1 : 0;
}

int Main(int argc, char** argv) {
  CommandLine line;
  const absl::Status read = ReadCommandLine(argc, argv, &line);
  if (line.help) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  if (!read.ok()) return Usage(std::string(read.message()));
  const std::vector<std::string>& words = line.words;
  const std::vector<std::string>& sets = line.sets;
  if (words.empty()) return Usage("no command");
  const std::string& command = words[0];
  if (command == "checkpoint" && words.size() == 3 && IsCheckpointVerb(words[1])) {
    if (!sets.empty()) return Usage("--set belongs to run and validate");
    return OnCheckpoints(words[1], words[2]);
  }
  const size_t wanted = command == "set" ? 4 : 2;
  const bool known = command == "run" || command == "validate" || command == "status" ||
                     command == "drain" || command == "checkpoint" || command == "pause" ||
                     command == "resume" || command == "set";
  if (!known) return Usage(absl::StrCat("unknown command \"", command, "\""));
  if (words.size() != wanted) {
    return Usage(
        absl::StrCat(command, " takes ", wanted - 1, " argument(s), got ", words.size() - 1));
  }
  if (!sets.empty() && command != "run" && command != "validate") {
    return Usage("--set belongs to run and validate");
  }
  if (command == "validate") return Validate(words[1], sets);
  if (command == "status") return Status(words[1]);
  if (command == "drain") return Drain(words[1]);
  if (command != "run") return OnLeaders(command, words[1], {words.begin() + 2, words.end()});

  RunOptions options;
  options.job_path = words[1];
  options.out = absl::GetFlag(FLAGS_out);
  options.data_dir = absl::GetFlag(FLAGS_data_dir);
  options.teachers_dir = absl::GetFlag(FLAGS_teachers_dir);
  options.resume = absl::GetFlag(FLAGS_resume);
  options.restart = absl::GetFlag(FLAGS_restart);
  options.trace = absl::GetFlag(FLAGS_trace);
  options.json = absl::GetFlag(FLAGS_json);
  options.sets = sets;
  options.steps = absl::GetFlag(FLAGS_steps);
  if (absl::GetFlag(FLAGS_timeout) > 0)
    options.timeout = absl::Seconds(absl::GetFlag(FLAGS_timeout));
  options.exporter = absl::GetFlag(FLAGS_exporter);
  options.python = absl::GetFlag(FLAGS_python);
  return RunCommand(options);
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) { return codistill::Main(argc, argv); }
