// Serves predictions of one group's newest published weights over the Open Inference Protocol.
//
//   prediction_server --job JOB.textproto --group alpha --index 0

#include <memory>
#include <string>
#include <utility>

#include "absl/flags/flag.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/heap.h"
#include "common/base/status.h"
#include "common/config/job.h"
#include "common/daemon/daemon.h"
#include "common/metrics/metrics.h"
#include "common/model/followed_model.h"
#include "common/rpc/channel.h"
#include "predserver/inference_service.h"
#include "predserver/model_repository.h"

ABSL_FLAG(std::string, job, "", "Job file (text proto of message JobConfig). Required.");
ABSL_FLAG(std::string, group, "", "Name of the group whose model answers. Required.");
ABSL_FLAG(int, index, 0, "Index of this server among the group's prediction servers.");

ABSL_FLAG(int, compute_threads, 0,
          "Forward passes computed at once; 0: as the job's prediction.compute_threads says.");

namespace codistill {
namespace {

constexpr char kKind[] = "prediction_server";

absl::Status Serve() {
  if (absl::GetFlag(FLAGS_job).empty() || absl::GetFlag(FLAGS_group).empty()) {
    return absl::InvalidArgumentError("--job and --group are required");
  }
  CODISTILL_ASSIGN_OR_RETURN(const JobConfig job, LoadJob(absl::GetFlag(FLAGS_job)));
  CODISTILL_ASSIGN_OR_RETURN(const int group, FindGroup(job, absl::GetFlag(FLAGS_group)));
  const GroupConfig& config = job.groups(group);
  const int index = absl::GetFlag(FLAGS_index);
  if (index < 0 || index >= config.num_prediction_servers()) {
    return absl::InvalidArgumentError(absl::StrCat("--index ", index, ": group ", config.name(),
                                                   " has ", config.num_prediction_servers(),
                                                   " prediction servers, counted from 0"));
  }

  const std::unique_ptr<Metrics> metrics = Metrics::Create(
      {{"job", job.name()}, {"group", config.name()}, {"index", absl::StrCat(index)}});

  FollowedModel::Options follow;
  follow.job = job;
  follow.group = group;
  follow.threads = job.prediction().threads();
  follow.transfer_dtype = job.prediction().transfer_dtype();
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<FollowedModel> followed,
                             FollowedModel::Create(std::move(follow)));

  const int compute_threads = absl::GetFlag(FLAGS_compute_threads);
  ModelRepository::Options repository;
  repository.compute_threads =
      compute_threads > 0 ? compute_threads : job.prediction().compute_threads();
  repository.metrics = metrics.get();
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<ModelRepository> models,
                             ModelRepository::Create(repository));
  Predictor::Options predict = Predictor::FromConfig(job.prediction());
  predict.model = config.name();
  predict.config = job.model();
  predict.followed = followed.get();
  CODISTILL_RETURN_IF_ERROR(models->Add(std::move(predict)));
  InferenceService service(models.get(), job.prediction());

  Daemon::Options options;
  options.kind = kKind;
  options.job = job.name();
  options.run_id = RunId(job);
  options.group = config.name();
  options.index = index;
  if (index < config.prediction_servers_size()) {
    options.address = config.prediction_servers(index).address();
    options.http_address = config.prediction_servers(index).http_address();
  }
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
  return daemon->Run();
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::ConfigureHeapForTensors();
  codistill::InitDaemon(argc, argv,
                        "Serves predictions of a group's newest weights: prediction_server --job "
                        "JOB.textproto --group NAME --index I");
  return codistill::ExitCode(codistill::kKind, codistill::Serve());
}
