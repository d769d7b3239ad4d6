#include "tests/integration/job_harness.h"

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/client/leader_client.h"
#include "common/config/job.h"
#include "control/daemon_client.h"
#include "control/exporter.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr absl::Duration kPoll = absl::Milliseconds(20);
constexpr absl::Duration kCallTimeout = absl::Seconds(10);
constexpr char kPython[] = "/usr/bin/python3";

// Calls that find their daemon gone or busy are made again; other errors are news.
bool WorthRepeating(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) || absl::IsAborted(status);
}

void AddOption(const std::string& key, const std::string& value, ModelExport* config) {
  ModelExport::Option* option = config->add_options();
  option->set_key(key);
  option->set_value(value);
}

}  // namespace

JobConfig MlpJob(const std::string& name, int num_groups) {
  JobConfig job;
  job.set_name(name);
  job.set_seed(20180409);
  ModelConfig* model = job.mutable_model();
  model->mutable_export_()->set_module("mlp");
  AddOption("in_features", "32", model->mutable_export_());
  AddOption("hidden", "768,16", model->mutable_export_());
  AddOption("num_classes", "8", model->mutable_export_());
  AddOption("activation", "tanh", model->mutable_export_());
  ModelInput* input = model->add_inputs();
  input->set_name("x");
  input->add_shape(32);
  model->set_num_outputs(8);
  for (const bool train : {true, false}) {
    SyntheticConfig* data =
        (train ? job.mutable_data()->mutable_train() : job.mutable_data()->mutable_validation())
            ->mutable_synthetic();
    data->set_inputs(32);
    data->add_hidden(16);
    data->set_classes(8);
    data->set_examples(train ? 4096 : 512);
    data->set_stream(train ? 0 : 1);
    data->set_logit_scale(4);
  }
  for (int g = 0; g < num_groups; ++g) {
    GroupConfig* group = job.add_groups();
    group->set_name(std::vector<std::string>{"alpha", "beta", "gamma"}.at(g));
    group->set_num_shards(2);
  }
  TrainingConfig* training = job.mutable_training();
  training->set_batch_size(32);
  training->mutable_optimizer()->set_learning_rate(0.1);
  training->set_publish_every_steps(10);
  CodistillationConfig* codistillation = job.mutable_codistillation();
  codistillation->set_on_teacher_loss(CodistillationConfig::WAIT);
  codistillation->set_max_staleness_steps(1000000);
  job.mutable_stop()->set_steps(100);
  job.mutable_evaluator()->set_enabled(false);
  return job;
}

std::string NewDirectory(const std::string& name) {
  std::string path = absl::StrCat(testing::TempDir(), "/", name, ".XXXXXX");
  if (mkdtemp(path.data()) == nullptr) {
    std::perror(path.c_str());
    std::abort();
  }
  return path;
}

std::string RunfilesPath(const std::string& path) {
  // Tests start in the root of their runfiles.
  char buffer[4096];
  if (getcwd(buffer, sizeof(buffer)) == nullptr) std::abort();
  return JoinPath(buffer, path);
}

BinaryPaths RunfilesBinaries() {
  BinaryPaths paths;
  paths.parameter_server = RunfilesPath("server/parameter_server");
  paths.prediction_server = RunfilesPath("predserver/prediction_server");
  paths.worker = RunfilesPath("worker/worker");
  return paths;
}

absl::Status ExportArchives(JobConfig* job) {
  static auto* directories = new std::map<std::string, std::string>;
  std::string key = absl::StrCat(job->seed(), ";", job->model().export_().ShortDebugString());
  for (const GroupConfig& group : job->groups()) absl::StrAppend(&key, ";", group.name());
  std::string& directory = (*directories)[key];
  if (directory.empty()) directory = NewDirectory("model");
  // The exporter's folder is an input of the test, where nothing may be written.
  setenv("PYTHONDONTWRITEBYTECODE", "1", 1);
  // Files that are there already are kept.
  CODISTILL_RETURN_IF_ERROR(ExportModels(*job, "", kPython, RunfilesPath("models/export.py"),
                                         directory, /*resume=*/false, nullptr));
  job->mutable_model()->clear_export_();
  job->mutable_model()->set_archive_dir(directory);
  return absl::OkStatus();
}

JobHarness::JobHarness(JobConfig job, bool restart) : job_(std::move(job)), restart_(restart) {
  directory_.root = NewDirectory(job_.name());
  data_dir_ = directory_.root;
  binaries_ = RunfilesBinaries();
}

absl::Status JobHarness::Start() {
  job_.set_run_id(absl::StrCat(job_.name(), "-", getpid(), "-", absl::ToUnixMicros(absl::Now())));
  job_.mutable_checkpoint()->set_directory(directory_.checkpoints());
  if (job_.model().has_export_()) CODISTILL_RETURN_IF_ERROR(ExportArchives(&job_));
  CODISTILL_RETURN_IF_ERROR(ValidateJob(job_));
  Fleet::Options options;
  options.job = job_;
  options.directory = directory_;
  options.data_dir = data_dir_;
  options.binaries = binaries_;
  options.restart = restart_;
  options.flags = flags_;
  options.flags_of = flags_of_;
  options.max_restarts = max_restarts_;
  options.ready_timeout = kPatience;
  fleet_ = std::make_unique<Fleet>(std::move(options));
  return fleet_->Start();
}

const FleetMember& JobHarness::member(const std::string& name) const {
  for (const auto& member : fleet_->members()) {
    if (member->name == name) return *member;
  }
  std::fprintf(stderr, "job %s has no daemon %s\n", job_.name().c_str(), name.c_str());
  std::abort();
}

void JobHarness::Kill(const std::string& name) { member(name).process.Signal(SIGKILL); }

GroupRef JobHarness::Ref(int group) const {
  GroupRef ref;
  ref.set_run_id(RunId(job_));
  ref.set_group(job_.groups(group).name());
  return ref;
}

absl::StatusOr<GetHistoryReply> JobHarness::History(int group) {
  return LeaderClient::Create(fleet_->LeaderAddresses()[group], Ref(group))
      ->GetHistory(absl::Now() + kCallTimeout);
}

absl::StatusOr<DaemonStatus> JobHarness::StatusOf(const std::string& name) {
  return GetDaemonStatus(member(name).address, kCallTimeout);
}

absl::StatusOr<GroupState> JobHarness::State(int group) {
  const std::unique_ptr<GroupWatcher> watcher =
      GroupWatcher::Start(fleet_->LeaderAddresses()[group], Ref(group), [](const GroupState&) {});
  GroupState state;
  CODISTILL_RETURN_IF_ERROR(WaitFor("state of the group", [&]() -> absl::StatusOr<bool> {
    state = watcher->state();
    return state.phase() != GroupState::PHASE_INVALID && state.shard_map().tensors_size() > 0;
  }));
  return state;
}

absl::Status JobHarness::Look() {
  const absl::Status status = fleet_->Supervise();
  if (!status.ok()) return status;
  for (int g = 0; g < job_.groups_size(); ++g) {
    const absl::StatusOr<GetHistoryReply> history = History(g);
    if (!history.ok() || history->state().phase() != GroupState::FAILED) continue;
    return absl::AbortedError(
        absl::StrCat("group ", job_.groups(g).name(), " failed: ", history->state().error()));
  }
  return absl::OkStatus();
}

absl::Status JobHarness::WaitFor(const std::string& what,
                                 const std::function<absl::StatusOr<bool>()>& done) {
  const absl::Time give_up = absl::Now() + kPatience;
  absl::Time next_look = absl::InfinitePast();
  absl::Status last;
  while (true) {
    // A daemon that was just killed needs its successor before anything goes on.
    CODISTILL_RETURN_IF_ERROR(Annotate(fleet_->Supervise(), absl::StrCat("awaiting ", what)));
    const absl::StatusOr<bool> answer = done();
    if (answer.ok() && *answer) return absl::OkStatus();
    last = answer.status();
    if (!last.ok() && !WorthRepeating(last)) return Annotate(last, absl::StrCat("awaiting ", what));
    const absl::Time now = absl::Now();
    if (now > next_look) {
      CODISTILL_RETURN_IF_ERROR(Annotate(Look(), absl::StrCat("awaiting ", what)));
      next_look = now + absl::Seconds(1);
    }
    if (now > give_up) {
      std::string logs;
      for (const auto& member : fleet_->members()) {
        absl::StrAppend(&logs, "\n", member->name, ":\n", TailOfFile(fleet_->LogPath(*member), 8));
      }
      return absl::DeadlineExceededError(absl::StrCat(what, " did not come within ",
                                                      absl::FormatDuration(kPatience), " ",
                                                      last.ToString(), logs));
    }
    absl::SleepFor(kPoll);
  }
}

absl::Status JobHarness::WaitForStep(int group, int64_t step) {
  return WaitFor(absl::StrCat("step ", step, " of group ", job_.groups(group).name()),
                 [&]() -> absl::StatusOr<bool> {
                   CODISTILL_ASSIGN_OR_RETURN(const GetHistoryReply history, History(group));
                   return history.state().version().step() >= step;
                 });
}

absl::Status JobHarness::WaitUntilDone() {
  return WaitFor("the end of the job", [&]() -> absl::StatusOr<bool> {
    if (!fleet_->WorkersDone() || !fleet_->EvaluatorDone()) return false;
    for (int g = 0; g < job_.groups_size(); ++g) {
      CODISTILL_ASSIGN_OR_RETURN(const GetHistoryReply history, History(g));
      if (history.state().phase() != GroupState::FINISHED) return false;
    }
    return true;
  });
}

absl::StatusOr<Weights> JobHarness::Pull(int group, TensorClient::Source source, int64_t step) {
  CODISTILL_ASSIGN_OR_RETURN(const GroupState state, State(group));
  return PullWeights(Ref(group), state, source, step, absl::Now() + kPatience);
}

absl::StatusOr<Weights> JobHarness::NewestCut(int group) {
  absl::StatusOr<Weights> weights = absl::UnknownError("not pulled");
  CODISTILL_RETURN_IF_ERROR(WaitFor("a cut of the group", [&]() -> absl::StatusOr<bool> {
    CODISTILL_ASSIGN_OR_RETURN(const GroupState state, State(group));
    if (state.newest_cut().generation() == 0) return false;
    // ABORTED if it has gone since the leader told of it; then there is a newer one.
    weights = PullWeights(Ref(group), state, TensorClient::Source::kCut, state.newest_cut().step(),
                          absl::Now() + kPatience);
    CODISTILL_RETURN_IF_ERROR(weights.status());
    return true;
  }));
  return weights;
}

absl::StatusOr<Weights> JobHarness::TrainToEnd() {
  CODISTILL_RETURN_IF_ERROR(Start());
  CODISTILL_RETURN_IF_ERROR(WaitUntilDone());
  CODISTILL_ASSIGN_OR_RETURN(Weights weights, NewestCut(0));
  CODISTILL_RETURN_IF_ERROR(Drain());
  return weights;
}

}  // namespace codistill
