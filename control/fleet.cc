#include "control/fleet.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/config/job.h"
#include "common/config/teachers.h"
#include "nlohmann/json.hpp"

namespace codistill {
namespace {

constexpr absl::Duration kPoll = absl::Milliseconds(20);

std::string FirstExecutable(const std::vector<std::string>& candidates) {
  for (const std::string& path : candidates) {
    if (access(path.c_str(), X_OK) == 0) return path;
  }
  return candidates.front();
}

absl::string_view DirectoryOf(absl::string_view path) {
  const size_t slash = path.rfind('/');
  return slash == absl::string_view::npos ? "." : path.substr(0, slash);
}

}  // namespace

BinaryPaths BinaryPaths::Find() {
  char buffer[4096];
  const ssize_t length = readlink("/proc/self/exe", buffer, sizeof(buffer) - 1);
  const std::string self(buffer, length > 0 ? length : 0);
  const std::string here(DirectoryOf(self));
  const std::string up(DirectoryOf(here));
  // Installed: all in one directory. Built: bazel-bin/control/codistillctl.
  BinaryPaths paths;
  paths.parameter_server =
      FirstExecutable({here + "/parameter_server", up + "/server/parameter_server"});
  paths.prediction_server =
      FirstExecutable({here + "/prediction_server", up + "/predserver/prediction_server"});
  paths.worker = FirstExecutable({here + "/worker", up + "/worker/worker"});
  return paths;
}

Fleet::Fleet(Options options) : options_(std::move(options)) {
  using Role = FleetMember::Role;
  const auto add = [this](Role role, int group, int index, std::string name) {
    auto member = std::make_unique<FleetMember>();
    member->role = role;
    member->group = group;
    member->index = index;
    member->name = std::move(name);
    members_.push_back(std::move(member));
  };
  for (int g = 0; g < options_.job.groups_size(); ++g) {
    GroupConfig* group = options_.job.mutable_groups(g);
    group->clear_shards();
    group->clear_prediction_servers();
    for (int i = 0; i < group->num_shards(); ++i) {
      add(Role::kShard, g, i, absl::StrCat(group->name(), ".shard.", i));
    }
    // Otherwise nobody asks for its predictions.
    if (!NeedsPredictionServers(options_.job, {TeacherRef::kGroup, group->name(), g})) {
      group->set_num_prediction_servers(0);
    }
    for (int i = 0; i < group->num_prediction_servers(); ++i) {
      add(Role::kPredictionServer, g, i, absl::StrCat(group->name(), ".prediction.", i));
    }
    for (int i = 0; i < group->num_workers(); ++i) {
      add(Role::kWorker, g, i, absl::StrCat(group->name(), ".worker.", i));
    }
  }
  for (int t = 0; t < options_.job.teachers_size(); ++t) {
    TeacherConfig* teacher = options_.job.mutable_teachers(t);
    if (teacher->has_external()) continue;
    teacher->clear_prediction_servers();
    const absl::StatusOr<TeacherRef> ref = FindModel(options_.job, teacher->name());
    if (!ref.ok() || !NeedsPredictionServers(options_.job, *ref)) {
      teacher->set_num_prediction_servers(0);
    }
    for (int i = 0; i < teacher->num_prediction_servers(); ++i) {
      add(Role::kPredictionServer, -1, i, absl::StrCat(teacher->name(), ".prediction.", i));
      members_.back()->teacher = t;
    }
  }
  if (options_.job.evaluator().enabled()) add(Role::kEvaluator, -1, 0, "evaluator");
}

Fleet::~Fleet() {
  for (const auto& member : members_) member->process.Signal(SIGKILL);
  std::vector<FleetMember*> all;
  for (const auto& member : members_) all.push_back(member.get());
  WaitForExit(all, absl::Now() + absl::Seconds(5));
}

std::vector<FleetMember*> Fleet::Select(FleetMember::Role role) {
  std::vector<FleetMember*> out;
  for (const auto& member : members_) {
    if (member->role == role) out.push_back(member.get());
  }
  return out;
}

std::string Fleet::LogPath(const FleetMember& member) const {
  return absl::StrCat(options_.directory.logs(), "/", member.name, ".log");
}

std::string Fleet::ReadyFile(const FleetMember& member) const {
  return absl::StrCat(options_.directory.ready(), "/", member.name, ".json");
}

std::vector<std::string> Fleet::CommandLine(const FleetMember& member) const {
  const BinaryPaths& bin = options_.binaries;
  std::vector<std::string> argv;
  switch (member.role) {
    case FleetMember::Role::kShard:
      argv = {bin.parameter_server, absl::StrCat("--shard=", member.index)};
      break;
    case FleetMember::Role::kPredictionServer:
      argv = {bin.prediction_server, absl::StrCat("--index=", member.index)};
      break;
    case FleetMember::Role::kWorker:
      argv = {bin.worker, absl::StrCat("--index=", member.index),
              absl::StrCat("--data_dir=", options_.data_dir)};
      break;
    case FleetMember::Role::kEvaluator:
      argv = {bin.worker, "--evaluate", absl::StrCat("--data_dir=", options_.data_dir),
              absl::StrCat("--evaluation_file=", options_.directory.evaluation())};
      break;
  }
  argv.push_back(absl::StrCat("--job=", options_.directory.job()));
  if (member.group >= 0) {
    argv.push_back(absl::StrCat("--group=", options_.job.groups(member.group).name()));
  }
  if (member.teacher >= 0) {
    argv.push_back(absl::StrCat("--teacher=", options_.job.teachers(member.teacher).name()));
  }
  argv.push_back(absl::StrCat("--ready_file=", ReadyFile(member)));
  if (options_.trace) {
    argv.push_back(
        absl::StrCat("--trace=", options_.directory.traces(), "/", member.name, ".json"));
  }
  argv.insert(argv.end(), options_.flags.begin(), options_.flags.end());
  const auto flags = options_.flags_of.find(member.name);
  if (flags != options_.flags_of.end()) {
    argv.insert(argv.end(), flags->second.begin(), flags->second.end());
  }
  // A daemon that comes back must be found where it was.
  if (!member.address.empty()) {
    argv.push_back(absl::StrCat("--port=", member.address.substr(member.address.rfind(':') + 1)));
  }
  return argv;
}

absl::Status Fleet::WriteAddresses() {
  for (GroupConfig& group : *options_.job.mutable_groups()) {
    group.clear_shards();
    group.clear_prediction_servers();
  }
  for (TeacherConfig& teacher : *options_.job.mutable_teachers()) {
    if (!teacher.has_external()) teacher.clear_prediction_servers();
  }
  for (const auto& member : members_) {
    Endpoint* endpoint = nullptr;
    if (member->role == FleetMember::Role::kShard) {
      endpoint = options_.job.mutable_groups(member->group)->add_shards();
    } else if (member->role == FleetMember::Role::kPredictionServer) {
      endpoint = member->teacher >= 0
                     ? options_.job.mutable_teachers(member->teacher)->add_prediction_servers()
                     : options_.job.mutable_groups(member->group)->add_prediction_servers();
    }
    if (endpoint == nullptr) continue;
    endpoint->set_address(member->address);
    if (!member->http_address.empty()) endpoint->set_http_address(member->http_address);
  }
  return SaveJob(options_.job, options_.directory.job());
}

absl::Status Fleet::Launch(FleetMember* member) {
  unlink(ReadyFile(*member).c_str());
  CODISTILL_ASSIGN_OR_RETURN(member->process,
                             ChildProcess::Start(CommandLine(*member), LogPath(*member)));
  return absl::OkStatus();
}

absl::Status Fleet::Launch(FleetMember::Role role, bool leaders) {
  CODISTILL_RETURN_IF_ERROR(WriteAddresses());
  std::vector<FleetMember*> started;
  for (FleetMember* member : Select(role)) {
    const bool leader = role == FleetMember::Role::kShard && member->index == 0;
    if (leader != leaders) continue;
    CODISTILL_RETURN_IF_ERROR(Launch(member));
    started.push_back(member);
  }
  return AwaitReady(started);
}

absl::Status Fleet::AwaitReady(const std::vector<FleetMember*>& waiting) {
  const absl::Time deadline = absl::Now() + options_.ready_timeout;
  for (FleetMember* member : waiting) {
    while (true) {
      const absl::StatusOr<std::string> text = ReadFile(ReadyFile(*member), 1 << 16);
      if (text.ok()) {
        const auto json = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
        if (json.is_object() && json.contains("address")) {
          member->address = json.value("address", "");
          member->http_address = json.value("http_address", "");
          break;
        }
      }
      if (const auto& exit = member->process.Poll()) return LostError(*member, *exit);
      if (options_.cancelled && options_.cancelled()) return absl::CancelledError("interrupted");
      if (absl::Now() > deadline) {
        return absl::DeadlineExceededError(absl::StrCat(
            member->name, " was not ready within ", absl::FormatDuration(options_.ready_timeout),
            "; the end of ", LogPath(*member), ":\n", TailOfFile(LogPath(*member), 8)));
      }
      absl::SleepFor(kPoll);
    }
  }
  return absl::OkStatus();
}

absl::Status Fleet::Start() {
  using Role = FleetMember::Role;
  for (const std::string& dir : {options_.directory.logs(), options_.directory.ready()}) {
    CODISTILL_RETURN_IF_ERROR(FileSystem::Real()->MakeDirs(dir));
  }
  if (options_.trace) {
    CODISTILL_RETURN_IF_ERROR(FileSystem::Real()->MakeDirs(options_.directory.traces()));
  }
  CODISTILL_RETURN_IF_ERROR(Launch(Role::kShard, /*leaders=*/false));
  CODISTILL_RETURN_IF_ERROR(Launch(Role::kShard, /*leaders=*/true));
  CODISTILL_RETURN_IF_ERROR(Launch(Role::kPredictionServer, false));
  CODISTILL_RETURN_IF_ERROR(Launch(Role::kWorker, false));
  return Launch(Role::kEvaluator, false);
}

absl::Status Fleet::LostError(const FleetMember& member, const ExitState& exit) const {
  return absl::AbortedError(absl::StrCat(member.name, " ", exit.ToString(), "; the end of ",
                                         LogPath(member), ":\n", TailOfFile(LogPath(member), 8)));
}

bool Fleet::CanDoWithout(const FleetMember& member) const {
  return member.role == FleetMember::Role::kWorker &&
         options_.job.training().membership() == TrainingConfig::ELASTIC &&
         std::any_of(members_.begin(), members_.end(), [&](const auto& other) {
           return other->role == FleetMember::Role::kWorker && other->group == member.group &&
                  other->process.running();
         });
}

absl::Status Fleet::AddWorker(int group, int index) {
  FleetMember* worker = nullptr;
  for (FleetMember* member : Select(FleetMember::Role::kWorker)) {
    if (member->group == group && member->index == index) worker = member;
  }
  if (worker == nullptr) {
    auto member = std::make_unique<FleetMember>();
    member->role = FleetMember::Role::kWorker;
    member->group = group;
    member->index = index;
    member->name = absl::StrCat(options_.job.groups(group).name(), ".worker.", index);
    worker = member.get();
    members_.push_back(std::move(member));
  } else if (!worker->process.Poll()) {
    return absl::FailedPreconditionError(absl::StrCat(worker->name, " is running"));
  }
  worker->left_out = false;
  return Launch(worker);
}

absl::Status Fleet::Supervise() {
  for (const auto& member : members_) {
    const absl::optional<ExitState>& exit = member->process.Poll();
    if (!exit || member->left_out) continue;
    const bool may_end =
        member->role == FleetMember::Role::kWorker || member->role == FleetMember::Role::kEvaluator;
    if (exit->clean()) {
      if (may_end) continue;
      return absl::CancelledError(absl::StrCat(member->name, " was drained"));
    }
    // A daemon that chose to end has a reason that would meet it again.
    if (!options_.restart || exit->signal == 0 || member->restarts >= options_.max_restarts) {
      if (exit->signal != 0 && CanDoWithout(*member)) {
        member->left_out = true;
        if (options_.say) {
          options_.say(absl::StrCat(member->name, " was ", exit->ToString(),
                                    "; its group goes on without it"));
        }
        continue;
      }
      return LostError(*member, *exit);
    }
    ++member->restarts;
    if (options_.say) {
      options_.say(absl::StrCat(member->name, " was ", exit->ToString(), "; started again (",
                                member->restarts, " of at most ", options_.max_restarts, ")"));
    }
    CODISTILL_RETURN_IF_ERROR(Launch(member.get()));
  }
  return absl::OkStatus();
}

bool Fleet::WorkersDone() {
  for (FleetMember* member : Select(FleetMember::Role::kWorker)) {
    if (member->left_out) continue;
    const auto& exit = member->process.Poll();
    if (!exit || !exit->clean()) return false;
  }
  return true;
}

bool Fleet::EvaluatorDone() {
  for (FleetMember* member : Select(FleetMember::Role::kEvaluator)) {
    const auto& exit = member->process.Poll();
    if (!exit || !exit->clean()) return false;
  }
  return true;
}

std::vector<std::string> Fleet::LeaderAddresses() const {
  std::vector<std::string> out(options_.job.groups_size());
  for (const auto& member : members_) {
    if (member->role == FleetMember::Role::kShard && member->index == 0) {
      out[member->group] = member->address;
    }
  }
  return out;
}

bool Fleet::WaitForExit(const std::vector<FleetMember*>& members, absl::Time deadline) {
  while (true) {
    bool all = true;
    for (FleetMember* member : members) {
      if (member->process.running() && !member->process.Poll()) all = false;
    }
    if (all) return true;
    if (absl::Now() > deadline) return false;
    absl::SleepFor(kPoll);
  }
}

absl::Status Fleet::Drain(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  using Role = FleetMember::Role;
  // Workers finish their step, then leaders write their checkpoints while the other shards still
  // serve.
  for (const std::vector<Role>& stage :
       {std::vector<Role>{Role::kWorker, Role::kEvaluator, Role::kPredictionServer},
        std::vector<Role>{Role::kShard}}) {
    std::vector<FleetMember*> stopping;
    for (const Role role : stage) {
      for (FleetMember* member : Select(role)) stopping.push_back(member);
    }
    for (FleetMember* member : stopping) member->process.Signal(SIGTERM);
    if (!WaitForExit(stopping, deadline)) break;
  }
  ErrorList errors;
  std::vector<FleetMember*> all;
  for (const auto& member : members_) {
    all.push_back(member.get());
    if (member->process.running()) {
      errors.Add(absl::StrCat(member->name, " did not end within ", absl::FormatDuration(timeout),
                              " and was killed"));
      member->process.Signal(SIGKILL);
    }
  }
  WaitForExit(all, absl::Now() + absl::Seconds(5));
  for (FleetMember* member : all) {
    const auto& exit = member->process.Poll();
    if (exit && !exit->clean() && !member->left_out) {
      errors.Add(absl::StrCat(member->name, " ", exit->ToString(), " (", LogPath(*member), ")"));
    }
  }
  return errors.ToStatus();
}

}  // namespace codistill
