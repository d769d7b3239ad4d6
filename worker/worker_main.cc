// A worker of one group, or with --evaluate the job's evaluator.

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/device.h"
#include "common/base/executor.h"
#include "common/base/heap.h"
#include "common/base/mutex.h"
#include "common/base/status.h"
#include "common/base/tuned_start.h"
#include "common/client/leader_client.h"
#include "common/config/devices.h"
#include "common/config/embedding.h"
#include "common/config/job.h"
#include "common/config/teachers.h"
#include "common/daemon/daemon.h"
#include "common/metrics/metrics.h"
#include "common/model/cuda_errors.h"
#include "common/model/followed_model.h"
#include "common/model/job_models.h"
#include "common/model/model.h"
#include "glog/logging.h"
#include "worker/data/dataset.h"
#include "worker/dataset_batches.h"
#include "worker/evaluator.h"
#include "worker/label_prior.h"
#include "worker/local_teachers.h"
#include "worker/teacher_client.h"
#include "worker/teacher_list.h"
#include "worker/trainer.h"
#include "worker/worker_progress.h"

ABSL_FLAG(std::string, job, "", "Job file. Required.");
ABSL_FLAG(std::string, group, "", "Name of the group this worker trains. Required for workers.");
ABSL_FLAG(int, index, 0, "Which worker of its group this is, from 0.");
ABSL_FLAG(std::string, device, "",
          "Where to compute: \"cpu\" or \"cuda:N\". Default: what the job says for this worker or "
          "evaluator, else cpu.");
ABSL_FLAG(std::string, data_dir, "", "What relative file names of the data are relative to.");
ABSL_FLAG(int64_t, decoded_images_mb, 256,
          "Memory for images that have been decoded, so that later epochs need not.");
ABSL_FLAG(bool, evaluate, false, "Be the job's evaluator instead of a worker.");
ABSL_FLAG(std::string, evaluation_file, "",
          "Evaluator: where the results of the last cuts and the disagreement of the groups go, as "
          "JSON.");
ABSL_FLAG(int, test_step_delay_ms, 0,
          "For tests: every step takes so much longer, as on a machine that is slow.");

namespace codistill {
namespace {

// Time for the work to let go once the daemon is down, before the process ends without it.
constexpr absl::Duration kLetGo = absl::Seconds(5);

// What this process does besides being a daemon, on a thread of its own, from loading what it needs
// to its end. What a drain can stop (a Trainer, an Evaluator) exists only for a part of that time.
class Work {
 public:
  // Makes `stop` what a drain calls; at once, if it was asked for before. Null: nothing any more.
  void SetStop(std::function<void()> stop) {
    MutexLock lock(&mu_);
    stop_ = std::move(stop);
    if (stop_ == nullptr) return;
    running_ = true;
    if (draining_) stop_();
  }
  // Daemon::Options::drain: what is loading can be left alone, what is running ends its step.
  absl::Status Drain() {
    MutexLock lock(&mu_);
    draining_ = true;
    if (!running_) return absl::OkStatus();
    if (stop_ != nullptr) stop_();
    mu_.Await(absl::Condition(&ended_));
    return status_;
  }

  void End(const absl::Status& status) {
    MutexLock lock(&mu_);
    ended_ = true;
    status_ = status;
  }
  bool AwaitEnd(absl::Duration timeout) {
    MutexLock lock(&mu_);
    return mu_.AwaitWithTimeout(absl::Condition(&ended_), timeout);
  }

 private:
  mutable Mutex mu_;
  std::function<void()> stop_ ABSL_GUARDED_BY(mu_);
  bool running_ ABSL_GUARDED_BY(mu_) = false;  // there has been something to stop
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

// Runs `body` beside a daemon until either has ended. Does not return while `body` is running.
// `doing`: in words, for the error of a lost device.
absl::Status RunDaemon(Daemon::Options options, Work* work,
                       const std::function<std::string()>& doing,
                       const std::function<absl::Status(const Daemon&)>& body) {
  options.drain = [work] { return work->Drain(); };
  const std::string kind = options.kind;
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<Daemon> daemon,
                             Daemon::Start(std::move(options)));
  SetDeviceLostHandler([&](const absl::Status& status) {
    daemon->Stop(Annotate(status, doing()));
    // The end of the process comes before this thread begins to take down what it has there.
    absl::SleepFor(kLetGo);
  });
  std::thread thread([&] {
    SetThreadName("work");
    const absl::Status status = body(*daemon);
    work->SetStop(nullptr);
    work->End(status);
    daemon->Stop(status);
  });
  const absl::Status status = daemon->Run();
  if (IsDeviceLost(status)) std::_Exit(ExitCode(kind, status));
  SetDeviceLostHandler(nullptr);
  if (!work->AwaitEnd(kLetGo)) {
    // Reading data, or waiting for somebody who does not answer: there is nothing to be saved.
    std::_Exit(ExitCode(kind, status));
  }
  thread.join();
  return status;
}

GroupRef RefOf(const JobConfig& job, int group) {
  GroupRef ref;
  ref.set_run_id(RunId(job));
  ref.set_group(job.groups(group).name());
  return ref;
}

// The address of a group's leader.
absl::StatusOr<std::string> LeaderAddress(const JobConfig& job, int group) {
  const GroupConfig& config = job.groups(group);
  if (config.shards_size() == 0 || config.shards(0).address().empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("groups[", group, "] (", config.name(),
                     ").shards[0].address: not set; that is the leader"));
  }
  return config.shards(0).address();
}

// --device, or what the job says.
std::string DeviceOr(std::string of_job) {
  const std::string flag = absl::GetFlag(FLAGS_device);
  return flag.empty() ? of_job : flag;
}

absl::StatusOr<std::unique_ptr<Dataset>> Load(const JobConfig& job, bool training, int group) {
  DatasetOptions options;
  options.job = &job;
  options.training = training;
  options.group = group;
  options.data_dir = absl::GetFlag(FLAGS_data_dir);
  options.threads = job.training().worker_threads();
  options.decoded_image_bytes = absl::GetFlag(FLAGS_decoded_images_mb) << 20;
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<Dataset> dataset, CreateDataset(options));
  LOG(INFO) << (training ? "training data: " : "validation data: ") << dataset->summary();
  return dataset;
}

Daemon::Options DaemonOptions(const JobConfig& job, const std::string& kind, Metrics* metrics) {
  Daemon::Options options;
  options.kind = kind;
  options.job = job.name();
  options.run_id = RunId(job);
  options.metrics = metrics;
  return options;
}

// Models of those who teach `group`, for a worker that computes their predictions itself.
absl::StatusOr<std::vector<LocalTeachers::Teacher>> FollowTeachers(const JobConfig& job, int group,
                                                                   const std::string& device) {
  JobModels::Options options;
  options.job = job;
  options.threads = job.training().worker_threads();
  options.transfer_dtype = job.prediction().transfer_dtype();
  options.weights = job.prediction().weights();
  options.low_priority = true;
  options.device = device;
  options.precision = job.prediction().precision();
  JobModels models(std::move(options));
  std::vector<LocalTeachers::Teacher> teachers;
  for (const TeacherRef& ref : TeachersOf(job, group)) {
    CODISTILL_ASSIGN_OR_RETURN(std::shared_ptr<FollowedModel> model, models.Follow(ref));
    teachers.push_back({ref.name, std::move(model)});
  }
  return teachers;
}

// Null: the group has no teachers. `turn`, which may be null, lives as long as they.
absl::StatusOr<std::unique_ptr<TeacherSource>> Teachers(const JobConfig& job, int group,
                                                        const std::string& device,
                                                        const Dataset& dataset, Metrics* metrics,
                                                        Mutex* turn) {
  if (TeachersOf(job, group).empty() || !(job.codistillation().weight() > 0)) return nullptr;
  if (job.codistillation().mode() == CodistillationConfig::CHECKPOINTS) {
    LocalTeachers::Options options;
    CODISTILL_ASSIGN_OR_RETURN(options.teachers, FollowTeachers(job, group, device));
    options.model = job.model();
    options.codistillation = job.codistillation();
    options.metrics = metrics;
    options.turn = turn;
    return LocalTeachers::Create(std::move(options));
  }
  CODISTILL_RETURN_IF_ERROR(CheckAnswerSizes(job, group, dataset.labels_per_example()));
  TeacherClient::Options options;
  options.teachers = TeacherClient::TeachersInJob(job, group);
  options.model = job.model();
  options.codistillation = job.codistillation();
  options.metrics = metrics;
  return TeacherClient::Create(std::move(options));
}

absl::Status Train(const JobConfig& job, int group, int index, Metrics* metrics,
                   WorkerProgress* progress, Work* work, const Daemon& daemon) {
  CODISTILL_ASSIGN_OR_RETURN(const std::string leader_address, LeaderAddress(job, group));
  progress->SetState("starting", "loading the model");
  Model::Options model_options;
  model_options.archive = ArchivePath(job, group);
  model_options.config = ForwardConfig(job.model());
  const std::string device = DeviceOr(WorkerDevice(job, group, index));
  model_options.device = device;
  model_options.threads = job.training().worker_threads();
  model_options.weight_sets = 1 + job.training().weights_lag();
  model_options.precision = job.training().precision();
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model,
                             Model::Load(std::move(model_options)));
  progress->SetState("starting", "reading data");
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> dataset, Load(job, true, group));
  DatasetBatches batches(job.model(), dataset.get(), TrainingOrder(job, group, *dataset));

  // Of passes, where teachers are computed here. A device has streams for both.
  Mutex turn;
  const bool on_host = model->device() == kHostDevice;
  const std::unique_ptr<Model> taking_turns = TakeTurns(model.get(), &turn);
  CODISTILL_ASSIGN_OR_RETURN(
      const std::unique_ptr<TeacherSource> teachers,
      Teachers(job, group, device, *dataset, metrics, on_host ? &turn : nullptr));

  const std::unique_ptr<LeaderClient> leader =
      LeaderClient::Create(leader_address, RefOf(job, group));
  Trainer::Options options;
  options.job = job;
  options.group = group;
  options.rank = index;
  std::random_device random;
  options.process_nonce = (uint64_t{random()} << 32) | random();
  options.address = daemon.address();
  options.http_address = daemon.http_address();
  options.leader = leader.get();
  options.model = on_host ? taking_turns.get() : model.get();
  options.batches = &batches;
  options.teachers = teachers.get();
  options.progress = progress;
  CODISTILL_ASSIGN_OR_RETURN(options.label_prior, LabelPriorOf(job, group, *dataset));
  options.test_step_delay = absl::Milliseconds(absl::GetFlag(FLAGS_test_step_delay_ms));
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<Trainer> trainer,
                             Trainer::Create(std::move(options)));
  work->SetStop([&trainer] { trainer->Drain(); });
  const absl::Status status = trainer->Run();
  work->SetStop(nullptr);
  return status;
}

absl::Status RunWorker(const JobConfig& job) {
  CODISTILL_ASSIGN_OR_RETURN(const int group, FindGroup(job, absl::GetFlag(FLAGS_group)));
  const int index = absl::GetFlag(FLAGS_index);
  if (index < 0 || index >= MaxWorkers(job, group)) {
    return absl::InvalidArgumentError(absl::StrCat("--index: ", index, "; group ",
                                                   job.groups(group).name(), " has ",
                                                   MaxWorkers(job, group), " workers at most"));
  }
  const std::unique_ptr<Metrics> metrics = Metrics::Create(
      {{"job", job.name()}, {"group", job.groups(group).name()}, {"index", absl::StrCat(index)}});
  WorkerProgress progress(metrics.get());
  Work work;
  Daemon::Options daemon = DaemonOptions(job, "worker", metrics.get());
  daemon.group = job.groups(group).name();
  daemon.index = index;
  daemon.fill_status = [&progress](DaemonStatus* status) { progress.FillStatus(status); };
  daemon.ready = [&progress] {
    const std::string state = progress.state();
    return state == "training" || state == "waiting";
  };
  const auto doing = [&progress] { return progress.description(); };
  return RunDaemon(std::move(daemon), &work, doing, [&](const Daemon& started) {
    absl::Status status = Train(job, group, index, metrics.get(), &progress, &work, started);
    if (!status.ok()) progress.SetState("failed", std::string(status.message()));
    return status;
  });
}

// What the evaluator is doing before there is an Evaluator.
class EvaluatorHolder {
 public:
  void Set(const Evaluator* evaluator) {
    MutexLock lock(&mu_);
    evaluator_ = evaluator;
  }
  void FillStatus(DaemonStatus* status) const {
    MutexLock lock(&mu_);
    if (evaluator_ != nullptr) return evaluator_->FillStatus(status);
    status->set_state("starting");
    status->set_detail("loading models and data");
  }
  bool running() const {
    MutexLock lock(&mu_);
    return evaluator_ != nullptr;
  }

 private:
  mutable Mutex mu_;
  const Evaluator* evaluator_ ABSL_GUARDED_BY(mu_) = nullptr;
};

absl::Status Evaluate(const JobConfig& job, Metrics* metrics, EvaluatorHolder* holder, Work* work) {
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> dataset, Load(job, false, 0));
  std::vector<std::unique_ptr<FollowedModel>> models;
  std::vector<std::unique_ptr<LeaderClient>> leaders;
  Evaluator::Options options;
  for (int group = 0; group < job.groups_size(); ++group) {
    CODISTILL_ASSIGN_OR_RETURN(const std::string address, LeaderAddress(job, group));
    FollowedModel::Options followed;
    followed.job = job;
    followed.group = group;
    followed.threads = job.training().worker_threads();
    followed.device = DeviceOr(job.evaluator().device());
    followed.wants = [&job](int64_t step) { return Evaluator::Wants(job, step); };
    CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<FollowedModel> model,
                               FollowedModel::Create(std::move(followed)));
    models.push_back(std::move(model));
    leaders.push_back(LeaderClient::Create(address, RefOf(job, group)));
    options.groups.push_back({models.back().get(), leaders.back().get()});
  }
  options.job = job;
  options.validation = dataset.get();
  options.evaluation_file = absl::GetFlag(FLAGS_evaluation_file);
  options.metrics = metrics;
  Evaluator evaluator(std::move(options));
  holder->Set(&evaluator);
  work->SetStop([&evaluator] { evaluator.Drain(); });
  const absl::Status status = evaluator.Run();
  work->SetStop(nullptr);
  holder->Set(nullptr);
  return status;
}

absl::Status RunEvaluator(const JobConfig& job) {
  if (!job.evaluator().enabled()) {
    return absl::FailedPreconditionError("evaluator.enabled is false: this job has no evaluator");
  }
  const std::unique_ptr<Metrics> metrics = Metrics::Create({{"job", job.name()}});
  EvaluatorHolder holder;
  Work work;
  Daemon::Options daemon = DaemonOptions(job, "evaluator", metrics.get());
  daemon.fill_status = [&holder](DaemonStatus* status) { holder.FillStatus(status); };
  daemon.ready = [&holder] { return holder.running(); };
  return RunDaemon(
      std::move(daemon), &work, [] { return "evaluating"; },
      [&](const Daemon&) { return Evaluate(job, metrics.get(), &holder, &work); });
}

absl::Status Main(const std::vector<std::string>& arguments) {
  if (!arguments.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", arguments[0], "\" is no flag; arguments are given as --name=value"));
  }
  if (absl::GetFlag(FLAGS_job).empty()) return absl::InvalidArgumentError("--job is required");
  CODISTILL_ASSIGN_OR_RETURN(const JobConfig job, LoadJob(absl::GetFlag(FLAGS_job)));
  return absl::GetFlag(FLAGS_evaluate) ? RunEvaluator(job) : RunWorker(job);
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::RestartTuned(argv);
  codistill::ConfigureHeapForTensors();
  const std::vector<std::string> arguments =
      codistill::InitDaemon(argc, argv,
                            "Trains its share of a group's steps (--job J --group G --index I), or "
                            "evaluates the groups of "
                            "a job (--job J --evaluate).");
  const std::string kind = absl::GetFlag(FLAGS_evaluate) ? "evaluator" : "worker";
  return codistill::ExitCode(kind, codistill::Main(arguments));
}
