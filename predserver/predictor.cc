#include "predserver/predictor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace codistill {
namespace {

std::string VersionName(const Version& version) {
  return absl::StrCat(version.generation(), ".", version.step());
}

}  // namespace

absl::StatusOr<std::unique_ptr<Predictor>> Predictor::Create(Options options) {
  if (options.max_queue < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("prediction.max_queue is ", options.max_queue, "; it must be at least 1"));
  }
  Executor::Options executor;
  executor.name = "predict";
  executor.threads = 1;
  executor.queue_capacity = options.max_queue;
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<Executor> compute,
                             Executor::Create(std::move(executor)));
  return std::unique_ptr<Predictor>(new Predictor(std::move(options), std::move(compute)));
}

Predictor::Predictor(Options options, std::unique_ptr<Executor> executor)
    : options_(std::move(options)),
      metrics_(options_.metrics, options_.followed),
      executor_(std::move(executor)) {}

Predictor::~Predictor() { Drain(); }

absl::Status Predictor::CheckModel(const std::string& model) const {
  if (model == options_.model) return absl::OkStatus();
  return absl::NotFoundError(
      absl::StrCat("no model \"", model, "\" here; this server has \"", options_.model, "\""));
}

absl::Status Predictor::CheckVersion(const std::string& wanted, const Version& held) const {
  if (wanted.empty() || wanted == VersionName(held)) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("model ", options_.model, " has no version \"", wanted,
                                          "\" any more or yet; it is at ", VersionName(held)));
}

absl::Status Predictor::Ready(const std::string& model, const std::string& version) const {
  CODISTILL_RETURN_IF_ERROR(CheckModel(model));
  {
    MutexLock lock(&mu_);
    if (draining_) return absl::UnavailableError("this prediction server is draining");
  }
  CODISTILL_ASSIGN_OR_RETURN(const auto snapshot, options_.followed->Get());
  return CheckVersion(version, snapshot->version);
}

std::string Predictor::held_version() const {
  const auto snapshot = options_.followed->Get();
  return snapshot.ok() ? VersionName((*snapshot)->version) : "";
}

absl::StatusOr<RequestPlan> Predictor::Accept(const PredictionRequest& request) const {
  CODISTILL_RETURN_IF_ERROR(CheckModel(request.model));
  CODISTILL_ASSIGN_OR_RETURN(RequestPlan plan, CheckRequest(options_.config, request));
  CODISTILL_RETURN_IF_ERROR(Ready(request.model, request.version));
  return plan;
}

void Predictor::Predict(PredictionRequest request,
                        std::function<void(absl::StatusOr<Prediction>)> done) {
  auto job = std::make_shared<Job>();
  job->arrived = options_.clock->Now();
  job->request = std::move(request);
  job->done = std::move(done);
  absl::StatusOr<RequestPlan> plan = Accept(job->request);
  if (!plan.ok()) {
    Finish(*job, plan.status());
    return;
  }
  job->plan = *std::move(plan);
  const absl::Status queued = executor_->Schedule([this, job] { Compute(job.get()); });
  if (absl::IsResourceExhausted(queued)) {
    Finish(*job, absl::ResourceExhaustedError(
                     absl::StrCat(options_.max_queue,
                                  " requests are waiting already (prediction.max_queue); "
                                  "try again later")));
  } else if (!queued.ok()) {
    Finish(*job, absl::UnavailableError("this prediction server is draining"));
  }
}

void Predictor::Compute(Job* job) {
  absl::StatusOr<Prediction> answer = Answer(*job);
  Finish(*job, std::move(answer));
}

absl::StatusOr<Prediction> Predictor::Answer(const Job& job) {
  const PredictionRequest& request = job.request;
  if (request.cancelled != nullptr && request.cancelled()) {
    return absl::CancelledError("the caller has gone");
  }
  const absl::Time now = options_.clock->Now();
  if (now >= request.deadline) {
    return absl::DeadlineExceededError(absl::StrCat("the deadline passed before compute, after ",
                                                    absl::ToInt64Milliseconds(now - job.arrived),
                                                    " ms in the queue"));
  }
  CODISTILL_ASSIGN_OR_RETURN(const auto snapshot, options_.followed->Get());
  CODISTILL_RETURN_IF_ERROR(CheckVersion(request.version, snapshot->version));
  const int64_t behind = LatestStep(snapshot->version) - snapshot->version.step();
  if (request.max_staleness_steps >= 0 && behind > request.max_staleness_steps) {
    return absl::FailedPreconditionError(absl::StrCat(
        "version ", VersionName(snapshot->version), " is ", behind,
        " steps behind its group; max_staleness_steps is ", request.max_staleness_steps));
  }

  std::vector<Tensor> inputs;
  for (int index : job.plan.inputs) {
    CODISTILL_ASSIGN_OR_RETURN(Tensor input, ReadInput(request.inputs[index]));
    inputs.push_back(std::move(input));
  }
  Model::States states(job.plan.states.size());
  for (size_t i = 0; i < states.size(); ++i) {
    if (job.plan.states[i] < 0) continue;
    CODISTILL_ASSIGN_OR_RETURN(states[i], ReadInput(request.inputs[job.plan.states[i]]));
  }
  CODISTILL_ASSIGN_OR_RETURN(const Model::Logits logits, snapshot->model->Predict(inputs, &states));
  metrics_.Computed(job.plan.batch);

  Prediction prediction;
  if (job.plan.want_logits) prediction.outputs.push_back({kLogitsOutput, logits.values});
  for (size_t i = 0; i < states.size(); ++i) {
    if (!job.plan.want_states[i]) continue;
    prediction.outputs.push_back({options_.config.states(static_cast<int>(i)).name(), states[i]});
  }
  prediction.version = snapshot->version;
  prediction.precision = snapshot->precision;
  prediction.latest_step = LatestStep(snapshot->version);
  prediction.staleness_steps = prediction.latest_step - snapshot->version.step();
  prediction.age = std::max(absl::ZeroDuration(), options_.clock->Now() - snapshot->loaded_at);
  return prediction;
}

int64_t Predictor::LatestStep(const Version& held) const {
  return std::max(options_.followed->group_step(), held.step());
}

void Predictor::Finish(const Job& job, absl::StatusOr<Prediction> result) {
  const absl::Time now = options_.clock->Now();
  metrics_.Answered(result.status(), now - job.arrived, now);
  job.done(std::move(result));
}

void Predictor::FillStatus(DaemonStatus* status) const {
  const GroupState group = options_.followed->group_state();
  ServedModelStatus* model = status->add_models();
  model->set_model(options_.model);
  model->set_latest_step(group.version().step());
  metrics_.Fill(model);
  status->set_rate(metrics_.Rate(options_.clock->Now()));
  status->set_rate_unit("requests/s");

  const auto snapshot = options_.followed->Get();
  if (snapshot.ok()) {
    const Version& held = (*snapshot)->version;
    *model->mutable_version() = held;
    status->set_state("serving");
    status->set_step(held.step());
    status->set_generation(held.generation());
    const absl::Duration silence = options_.followed->group_silence();
    status->set_detail(absl::StrCat("version ", VersionName(held), ", ",
                                    LatestStep(held) - held.step(), " steps behind"));
    if (silence > absl::Seconds(5)) {
      status->set_detail(
          absl::StrCat(status->detail(), "; no word from the group for ",
                       absl::FormatDuration(absl::Trunc(silence, absl::Seconds(1)))));
    }
  } else {
    status->set_state("waiting");
    status->set_detail(std::string(snapshot.status().message()));
  }
  MutexLock lock(&mu_);
  if (draining_) status->set_state("draining");
}

void Predictor::Drain() {
  {
    MutexLock lock(&mu_);
    draining_ = true;
  }
  executor_->Shutdown();
}

}  // namespace codistill
