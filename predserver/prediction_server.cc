// Serves predictions over the Open Inference Protocol: of a job's groups, by their newest published
// weights, of its frozen teachers and ensembles, or of an archive that belongs to no job.
//
//   prediction_server --job JOB.textproto --group alpha --index 0
//   prediction_server --job JOB.textproto --group alpha,beta --index 0
//   prediction_server --job JOB.textproto --teacher last_year --index 0
//   prediction_server --archive MODEL.pt --model MODEL.textproto [--checkpoint PATH [--follow]]

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/heap.h"
#include "common/base/status.h"
#include "common/base/tuned_start.h"
#include "common/config/job.h"
#include "common/daemon/daemon.h"
#include "common/metrics/metrics.h"
#include "common/model/cuda_errors.h"
#include "common/rpc/channel.h"
#include "predserver/inference_service.h"
#include "predserver/model_repository.h"
#include "predserver/server_plan.h"

ABSL_FLAG(std::string, job, "", "Job file (text proto of message JobConfig).");
ABSL_FLAG(std::string, group, "",
          "Group whose model answers; several, separated by commas, are served by one process.");
ABSL_FLAG(
    std::string, teacher, "",
    "Name in the job's `teachers`: a frozen teacher, or an ensemble, whose members this process "
    "then holds.");
ABSL_FLAG(int, index, 0, "Index of this server among the prediction servers of what it serves.");
ABSL_FLAG(std::string, archive, "",
          "TorchScript archive to serve, without a job that has it as a teacher.");
ABSL_FLAG(std::string, model, "",
          "With --archive: file with its inputs, states and num_outputs (text proto of message "
          "ModelConfig); or give a --job with the same model.");
ABSL_FLAG(std::string, checkpoint, "",
          "With --archive: where its weights come from instead: a safetensors file, a directory of "
          "checkpoints (the newest whole one), or the manifest of one checkpoint.");
ABSL_FLAG(bool, follow, false, "Load newer checkpoints as they appear in --checkpoint.");
ABSL_FLAG(std::string, name, "",
          "With --archive: name of the model in requests; default: the file's, without .pt.");
ABSL_FLAG(std::string, weights, "",
          "Precision to which weights are rounded: FP32, BF16 or INT8; default: as the job's "
          "prediction.weights says.");
ABSL_FLAG(std::string, precision, "",
          "What passes compute in: FP32 or BF16; default: as the job's prediction.precision says.");
ABSL_FLAG(std::string, device, "",
          "Where to compute: \"cpu\" or \"cuda:N\". Default: what the job says for this server, "
          "else cpu.");
ABSL_FLAG(int, held_versions, 0,
          "Versions that answer requests which name them; 0: as the job's prediction.held_versions "
          "says.");
ABSL_FLAG(int, compute_threads, 0,
          "Forward passes computed at once; 0: as the job's prediction.compute_threads says.");
ABSL_FLAG(
    bool, optimize_passes, true,
    "Have libtorch optimise passes, and compile each version of a model that gains much by it, "
    "which takes about 0.1 s a version. Off: passes are the archive's, to the bit.");
ABSL_FLAG(int, spin_us, 500,
          "Microseconds for which an idle compute thread keeps its core awake while requests keep "
          "coming that soon; it gives way to every other thread. 0: never.");

namespace codistill {
namespace {

constexpr char kKind[] = "prediction_server";

ServerFlags Flags() {
  ServerFlags flags;
  flags.job = absl::GetFlag(FLAGS_job);
  flags.group = absl::GetFlag(FLAGS_group);
  flags.teacher = absl::GetFlag(FLAGS_teacher);
  flags.index = absl::GetFlag(FLAGS_index);
  flags.archive = absl::GetFlag(FLAGS_archive);
  flags.model = absl::GetFlag(FLAGS_model);
  flags.checkpoint = absl::GetFlag(FLAGS_checkpoint);
  flags.follow = absl::GetFlag(FLAGS_follow);
  flags.name = absl::GetFlag(FLAGS_name);
  flags.precision = absl::GetFlag(FLAGS_precision);
  flags.device = absl::GetFlag(FLAGS_device);
  flags.weights = absl::GetFlag(FLAGS_weights);
  flags.held_versions = absl::GetFlag(FLAGS_held_versions);
  flags.compute_threads = absl::GetFlag(FLAGS_compute_threads);
  flags.spin_us = absl::GetFlag(FLAGS_spin_us);
  flags.optimize_passes = absl::GetFlag(FLAGS_optimize_passes);
  return flags;
}

absl::Status Serve() {
  CODISTILL_ASSIGN_OR_RETURN(const ServerPlan plan, PlanServer(Flags()));
  const JobConfig& job = plan.job;
  const std::unique_ptr<Metrics> metrics = Metrics::Create(
      {{"job", job.name()}, {"group", plan.group}, {"index", absl::StrCat(plan.index)}});

  CODISTILL_ASSIGN_OR_RETURN(const std::vector<ServedModel> served, OpenModels(plan));
  ModelRepository::Options repository;
  repository.compute_threads = job.prediction().compute_threads();
  repository.spin = absl::Microseconds(absl::GetFlag(FLAGS_spin_us));
  repository.metrics = metrics.get();
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<ModelRepository> models,
                             ModelRepository::Create(repository));
  for (const ServedModel& model : served) {
    Predictor::Options predict = Predictor::FromConfig(job.prediction());
    predict.model = model.name;
    predict.config = model.config;
    predict.followed = model.followed.get();
    CODISTILL_RETURN_IF_ERROR(models->Add(std::move(predict)));
  }
  InferenceService service(models.get(), job.prediction());

  Daemon::Options options;
  options.kind = kKind;
  options.job = job.name();
  options.run_id = RunId(job);
  options.group = plan.group;
  options.index = plan.index;
  options.address = plan.endpoint.address();
  options.http_address = plan.endpoint.http_address();
  options.services = {&service};
  options.registries = {service.registry()};
  options.max_message_bytes = kMaxPredictionBytes;
  options.metrics = metrics.get();
  options.fill_status = [&](DaemonStatus* status) { models->FillStatus(status); };
  options.ready = [&] { return models->Ready().ok(); };
  options.drain = [&] {
    models->Drain();
    return absl::OkStatus();
  };
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<Daemon> daemon,
                             Daemon::Start(std::move(options)));
  SetDeviceLostHandler([&daemon](const absl::Status& status) {
    daemon->Stop(status);
    // The end of the process comes before this thread begins to take down what it has there.
    absl::SleepFor(absl::Seconds(5));
  });
  const absl::Status status = daemon->Run();
  if (IsDeviceLost(status)) std::_Exit(ExitCode(kKind, status));
  SetDeviceLostHandler(nullptr);
  return status;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::RestartTuned(argv);
  codistill::ConfigureHeapForTensors();
  codistill::InitDaemon(argc, argv,
                        "Serves predictions: prediction_server --job JOB.textproto --group "
                        "NAME[,NAME...] | --teacher NAME, or prediction_server --archive MODEL.pt "
                        "--model MODEL.textproto");
  return codistill::ExitCode(codistill::kKind, codistill::Serve());
}
