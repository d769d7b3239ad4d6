#include "worker/weight_puller.h"

#include <utility>

#include "absl/time/clock.h"
#include "common/base/status.h"

namespace codistill {
namespace {

// A transfer gets at least this rate, in bytes a second, before it counts as lost.
constexpr double kSlowestTransfer = 10e6;
constexpr absl::Duration kTransferWait = absl::Seconds(60);

}  // namespace

absl::StatusOr<std::unique_ptr<WeightPuller>> WeightPuller::Create(Options options) {
  if (options.job.training().weights_lag() > 0 && options.model->weight_sets() < 2) {
    return absl::FailedPreconditionError(
        "training.weights_lag needs a model with two sets of weights");
  }
  auto puller = std::unique_ptr<WeightPuller>(new WeightPuller(std::move(options)));
  Executor::Options executor;
  executor.name = "early-pull";
  executor.queue_capacity = 1;
  CODISTILL_ASSIGN_OR_RETURN(puller->puller_, Executor::Create(std::move(executor)));
  return puller;
}

WeightPuller::WeightPuller(Options options)
    : options_(std::move(options)),
      sync_(options_.job.training().update_mode() == TrainingConfig::SYNC),
      lag_(options_.job.training().weights_lag()) {
  const TensorList& tensors = options_.model->tensors();
  for (int i = 0; i < tensors.tensors_size(); ++i) {
    if (tensors.tensors(i).role() != TensorSpec::TIED) {
      model_bytes_ += static_cast<int64_t>(options_.model->storage()[i].bytes());
    }
  }
}

WeightPuller::~WeightPuller() { EndEarlyPull(/*cancel=*/true); }

absl::Duration WeightPuller::LongestTransfer() const {
  return kTransferWait + absl::Seconds(model_bytes_ / kSlowestTransfer);
}

absl::StatusOr<WeightPuller::Weights> WeightPuller::Get(const GroupSession& session,
                                                        const BatchPipeline::Step& step,
                                                        absl::Time deadline) {
  const int64_t weights_step = step.assignment.weights_step();
  std::unique_ptr<RowRead> read = TakeRows(session, step, deadline);
  SetUnderWay(session.tensors);
  absl::StatusOr<Version> version = Pull(session, weights_step);
  SetUnderWay(nullptr);
  CODISTILL_RETURN_IF_ERROR(version);
  if (sync_ && lag_ > 0) {
    // What the next step wants. It comes once the push before this one is decided.
    const int64_t next = step.assignment.step() + 1;
    if (next <= options_.job.stop().steps()) StartPull(session, next - 1 - lag_, OtherSet());
  }
  Weights weights;
  weights.set = set_;
  weights.version = *std::move(version);
  if (read == nullptr) return weights;
  // Once the weights are there, so are the rows: nothing to wait for that could be cancelled. Those
  // asked for early, which may have come to nothing, are asked for again.
  if (!WaitForRows(read.get()).ok()) {
    read = StartRows(session, weights_step, step.rows, deadline);
    CODISTILL_RETURN_IF_ERROR(WaitForRows(read.get()));
  }
  weights.rows = std::move(read->rows);
  return weights;
}

absl::StatusOr<Version> WeightPuller::Pull(const GroupSession& session, int64_t weights_step) {
  const bool wanted = early_pull_ != nullptr && early_pull_->generation == session.generation &&
                      early_pull_->tensors == session.tensors &&
                      (!sync_ || early_pull_->step == weights_step);
  const auto early = EndEarlyPull(/*cancel=*/!wanted);
  if (wanted && early->version.ok()) {
    set_ = early->set;
    return early->version;
  }
  const int set = OtherSet();
  CODISTILL_ASSIGN_OR_RETURN(Version version,
                             PullNow(session.tensors.get(), session.generation, weights_step, set));
  set_ = set;
  return version;
}

absl::StatusOr<Version> WeightPuller::PullNow(TensorClient* tensors, uint64_t generation,
                                              int64_t step, int set) {
  CODISTILL_ASSIGN_OR_RETURN(
      const TensorClient::PullResult pulled,
      tensors->Pull(sync_ ? TensorClient::Source::kStep : TensorClient::Source::kAtLeastStep,
                    generation, step, options_.model->storage(set),
                    absl::Now() + LongestTransfer()));
  options_.progress->AddPulled(pulled.bytes);
  CODISTILL_RETURN_IF_ERROR(options_.model->WeightsWritten(set));
  return pulled.version;
}

void WeightPuller::StartEarly(const GroupSession& session, int64_t step, absl::Time deadline) {
  // ASYNC: what could be had now would lack this very push.
  if (!sync_ || lag_ > 0) return;
  if (step < options_.job.stop().steps()) StartPull(session, step, 0);
  StartNextRows(session, step, deadline);
}

void WeightPuller::StartNewest(const GroupSession& session, const Assignment& assignment,
                               absl::Time deadline) {
  if (sync_ || lag_ == 0) return;
  StartPull(session, assignment.weights_step(), OtherSet());
  StartNextRows(session, assignment.weights_step(), deadline);
}

void WeightPuller::StartPull(const GroupSession& session, int64_t step, int set) {
  auto early = std::make_shared<EarlyPull>();
  early->tensors = session.tensors;
  early->generation = session.generation;
  early->step = step;
  early->set = set;
  const absl::Status status = puller_->Schedule([this, early] {
    early->version = PullNow(early->tensors.get(), early->generation, early->step, early->set);
    early->done.Notify();
  });
  if (!status.ok()) return;
  early_pull_ = std::move(early);
  SetUnderWay(session.tensors);
}

void WeightPuller::StartNextRows(const GroupSession& session, int64_t weights_step,
                                 absl::Time deadline) {
  if (session.rows == nullptr || !options_.next_rows) return;
  BatchPipeline::NextRows next = options_.next_rows();
  if (next.rows == nullptr || next.generation != session.generation ||
      next.weights_step != weights_step) {
    return;
  }
  early_rows_ = StartRows(session, weights_step, std::move(next.rows), deadline);
}

void WeightPuller::ForgetEarly() {
  EndEarlyPull(/*cancel=*/true);
  SetUnderWay(nullptr);
  early_rows_.reset();
}

std::shared_ptr<WeightPuller::EarlyPull> WeightPuller::EndEarlyPull(bool cancel) {
  const std::shared_ptr<EarlyPull> early = std::move(early_pull_);
  if (early == nullptr) return nullptr;
  if (cancel) {
    // Again and again, because it may be just about to begin.
    do {
      early->tensors->CancelPull();
    } while (!early->done.WaitForNotificationWithTimeout(absl::Milliseconds(5)));
  }
  early->done.WaitForNotification();
  return early;
}

std::unique_ptr<WeightPuller::RowRead> WeightPuller::StartRows(const GroupSession& session,
                                                               int64_t step,
                                                               BatchPipeline::Rows batches,
                                                               absl::Time deadline) {
  auto read = std::make_unique<RowRead>();
  read->client = session.rows;
  read->generation = session.generation;
  read->step = step;
  read->rows = std::make_unique<EmbeddedRows>();
  read->rows->batches = std::move(batches);
  for (const RowBatch& batch : *read->rows->batches) {
    std::vector<Tensor>& rows = read->rows->rows;
    rows.push_back(
        Tensor::Allocate(DT_FLOAT, {static_cast<int64_t>(batch.keys.size()), batch.dim}));
    RowClient::Request request;
    request.source = sync_ ? TensorClient::Source::kStep : TensorClient::Source::kAtLeastStep;
    request.generation = session.generation;
    request.step = step;
    request.table = batch.table;
    request.dim = static_cast<int>(batch.dim);
    request.keys = batch.keys;
    request.rows = rows.back().As<float>().data();
    read->pending.push_back(read->client->Start(request, deadline));
  }
  return read;
}

absl::Status WeightPuller::WaitForRows(RowRead* read) {
  for (auto& pending : read->pending) {
    CODISTILL_ASSIGN_OR_RETURN(const RowClient::Result got, pending->Wait());
    options_.progress->AddPulled(got.bytes);
  }
  read->pending.clear();
  return absl::OkStatus();
}

std::unique_ptr<WeightPuller::RowRead> WeightPuller::TakeRows(const GroupSession& session,
                                                              const BatchPipeline::Step& step,
                                                              absl::Time deadline) {
  std::unique_ptr<RowRead> early = std::move(early_rows_);
  if (step.rows == nullptr) return nullptr;
  if (early != nullptr && early->generation == session.generation &&
      early->client == session.rows && early->step == step.assignment.weights_step() &&
      early->rows->batches == step.rows) {
    return early;
  }
  return StartRows(session, step.assignment.weights_step(), step.rows, deadline);
}

void WeightPuller::SetUnderWay(std::shared_ptr<TensorClient> tensors) {
  MutexLock lock(&mu_);
  under_way_ = std::move(tensors);
}

void WeightPuller::Cancel() {
  MutexLock lock(&mu_);
  if (under_way_ != nullptr) under_way_->CancelPull();
}

}  // namespace codistill
