#include "worker/step_computer.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/fault.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "common/config/schedule.h"
#include "glog/logging.h"
#include "worker/loss_options.h"

namespace codistill {
namespace {

// A transfer gets at least this rate, in bytes a second, before it counts as lost.
constexpr double kSlowestTransfer = 10e6;
constexpr absl::Duration kTransferWait = absl::Seconds(60);

// Adds the time since its construction or the last call to an activity.
class StopWatch {
 public:
  explicit StopWatch(WorkerProgress* progress) : progress_(progress) {}
  void Lap(WorkerProgress::Activity activity) {
    const absl::Time now = absl::Now();
    progress_->AddTime(activity, now - start_);
    start_ = now;
  }

 private:
  WorkerProgress* const progress_;
  absl::Time start_ = absl::Now();
};

}  // namespace

absl::StatusOr<std::unique_ptr<StepComputer>> StepComputer::Create(Options options) {
  auto computer = std::unique_ptr<StepComputer>(new StepComputer(std::move(options)));
  LossInputs none;
  none.classes = computer->options_.job.model().num_outputs();
  CODISTILL_RETURN_IF_ERROR(
      Annotate(ValidateLoss(computer->loss_options_, none), "model and codistillation"));
  Executor::Options puller;
  puller.name = "early-pull";
  puller.queue_capacity = 1;
  CODISTILL_ASSIGN_OR_RETURN(computer->puller_, Executor::Create(std::move(puller)));
  return computer;
}

StepComputer::~StepComputer() { EndEarlyPull(/*cancel=*/true); }

StepComputer::StepComputer(Options options)
    : options_(std::move(options)),
      loss_options_(LossOptionsOf(options_.job)),
      group_hash_(HashString(options_.job.groups(options_.group).name())),
      sync_(options_.job.training().update_mode() == TrainingConfig::SYNC) {
  const TensorList& tensors = options_.model->tensors();
  for (int i = 0; i < tensors.tensors_size(); ++i) {
    if (tensors.tensors(i).role() == TensorSpec::BUFFER) buffers_.push_back(i);
    if (tensors.tensors(i).role() != TensorSpec::TIED) {
      model_bytes_ += static_cast<int64_t>(options_.model->storage()[i].bytes());
    }
  }
}

StepComputer::Result StepComputer::Run(const Session& session, const BatchPipeline::Step& step,
                                       RecurrentStateAfter* state) {
  Result result;
  const absl::Time start = absl::Now();
  StopWatch watch(options_.progress);
  const Assignment& assignment = step.assignment;

  options_.progress->SetState("training",
                              absl::StrCat("step ", assignment.step(), ": getting the weights"));
  std::unique_ptr<RowRead> embedded = TakeRows(session, step);
  SetTransfer(session.tensors.get(), nullptr);
  const absl::StatusOr<Version> weights = Pull(session, assignment);
  SetTransfer(nullptr, nullptr);
  // Once the weights are there, so are the rows: nothing to wait for that could be cancelled.
  const absl::Status rows_status = weights.ok() ? Rows(session, step, &embedded) : absl::OkStatus();
  watch.Lap(WorkerProgress::kPull);
  if (!weights.ok() || !rows_status.ok()) {
    result.transfer_error = weights.ok() ? rows_status : weights.status();
    return result;
  }

  FaultPoint("worker.pulled");
  options_.progress->SetState("training", absl::StrCat("step ", assignment.step()));
  Model::States states = state->For(assignment.step(), step.batch.starts_epoch);
  absl::StatusOr<Model::Logits> logits = Forward(step, embedded.get(), &states);
  if (options_.test_delay > absl::ZeroDuration()) absl::SleepFor(options_.test_delay);
  watch.Lap(WorkerProgress::kCompute);
  if (!logits.ok()) {
    result.local_error = logits.status();
    return result;
  }

  result.local_error = TakePredictions(step);
  watch.Lap(WorkerProgress::kTeacher);
  if (!result.local_error.ok()) return result;

  absl::StatusOr<Loss> loss = ComputeLoss(step, *logits);
  if (!loss.ok()) {
    result.local_error = loss.status();
    return result;
  }
  logits->values = Tensor();  // the graph keeps what the backward pass needs

  TensorClient::PushHeader header;
  header.generation = session.generation;
  header.step = assignment.step();
  header.rank = options_.rank;
  header.incarnation = session.incarnation;
  header.weights_step = weights->step();
  if (!sync_) {
    header.shard_steps.assign(weights->shard_steps().begin(), weights->shard_steps().end());
    header.shard_incarnations.assign(weights->shard_incarnations().begin(),
                                     weights->shard_incarnations().end());
    header.end_example =
        assignment.first_example() + static_cast<uint64_t>(assignment.num_examples());
  }
  std::unique_ptr<PushStream> push = session.tensors->StartPush(header, PushDeadline());
  PushBuffers(push.get());
  result.local_error = options_.model->Backward(
      gradient_, [&push](int index, const float* data, std::shared_ptr<const void> owner) {
        push->AddGradient(index, data, std::move(owner));
      });
  if (result.local_error.ok() && embedded != nullptr) PushRows(*embedded, push.get());
  watch.Lap(WorkerProgress::kCompute);
  if (!result.local_error.ok()) return result;
  FaultPoint("worker.computed");

  RecurrentStateAfter after;
  after.step = assignment.step();
  after.states = std::move(states);
  if (assignment.want_worker_state()) {
    push->AddWorkerState(EncodeWorkerState(options_.job.model(), after));
  }

  PushEnd end;
  end.set_num_examples(step.batch.examples);
  // A sum that is not a number would spoil the group's curves; the gradient tells on itself.
  if (loss->finite) {
    end.set_label_loss_sum(loss->sums.label_loss_sum);
    end.set_teacher_loss_sum(loss->sums.teacher_loss_sum);
    end.set_num_labels(step.batch.rows);
  }
  end.set_used_teacher(loss->used_teacher);
  end.set_teacher_weight(loss->used_teacher ? assignment.teacher_weight() : 0);
  // Nothing reads the weights any more: gradients and buffers have memory of their own.
  StartEarlyPull(session, assignment.step());
  StartEarlyRows(session, assignment.step());
  SetTransfer(session.tensors.get(), push.get());
  absl::StatusOr<PushStream::Result> pushed = push->Finish(std::move(end));
  SetTransfer(nullptr, nullptr);
  if (!pushed.ok()) {
    EndEarlyPull(/*cancel=*/true);
    early_rows_.reset();
  }
  watch.Lap(WorkerProgress::kPush);
  if (!pushed.ok()) {
    result.transfer_error = pushed.status();
    result.pushing = true;
    return result;
  }
  FaultPoint("worker.pushed");
  result.push = *std::move(pushed);
  *state = std::move(after);
  last_step_ = absl::Now() - start;

  WorkerProgress::StepReport report;
  report.step = assignment.step();
  report.outcome = result.push.outcome;
  report.examples = step.batch.examples;
  report.push_bytes = result.push.bytes;
  const double rows = static_cast<double>(std::max<int64_t>(step.batch.rows, 1));
  report.label_loss = loss->sums.label_loss_sum / rows;
  report.wanted_teacher = assignment.teacher_weight() > 0;
  report.used_teacher = loss->used_teacher;
  if (loss->used_teacher) {
    report.teacher_loss = loss->sums.teacher_loss_sum / rows;
    report.staleness_steps = predictions_->staleness_steps;
    report.prefetch_lag_steps = predictions_->prefetch_lag_steps;
  }
  options_.progress->StepDone(report);
  ForgetPredictions();
  return result;
}

void StepComputer::SetTransfer(TensorClient* pull, PushStream* push) {
  MutexLock lock(&mu_);
  pull_ = pull;
  push_ = push;
}

void StepComputer::CancelTransfer() {
  MutexLock lock(&mu_);
  if (pull_ != nullptr) pull_->CancelPull();
  if (push_ != nullptr) push_->Cancel();
}

absl::StatusOr<Version> StepComputer::Pull(const Session& session, const Assignment& assignment) {
  const auto early = EndEarlyPull(/*cancel=*/false);
  if (early != nullptr && early->status.ok() && early->generation == session.generation &&
      early->step == assignment.weights_step()) {
    Version version;
    version.set_generation(early->generation);
    version.set_step(early->step);
    return version;
  }
  return PullNow(session.tensors.get(), session.generation, assignment.weights_step());
}

absl::StatusOr<Version> StepComputer::PullNow(TensorClient* tensors, uint64_t generation,
                                              int64_t step) {
  CODISTILL_ASSIGN_OR_RETURN(
      const TensorClient::PullResult pulled,
      tensors->Pull(sync_ ? TensorClient::Source::kStep : TensorClient::Source::kAtLeastStep,
                    generation, step, options_.model->storage(),
                    absl::Now() + kTransferWait + absl::Seconds(model_bytes_ / kSlowestTransfer)));
  options_.progress->AddPulled(pulled.bytes);
  return pulled.version;
}

void StepComputer::StartEarlyPull(const Session& session, int64_t step) {
  // ASYNC: what could be had now would lack this very push.
  if (!sync_ || step >= options_.job.stop().steps()) return;
  auto early = std::make_shared<EarlyPull>();
  early->tensors = session.tensors;
  early->generation = session.generation;
  early->step = step;
  const absl::Status status = puller_->Schedule([this, early] {
    early->status = PullNow(early->tensors.get(), early->generation, early->step).status();
    early->done.Notify();
  });
  if (status.ok()) early_pull_ = std::move(early);
}

std::shared_ptr<StepComputer::EarlyPull> StepComputer::EndEarlyPull(bool cancel) {
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

std::unique_ptr<StepComputer::RowRead> StepComputer::StartRows(const Session& session, int64_t step,
                                                               BatchPipeline::Rows batches) {
  auto read = std::make_unique<RowRead>();
  read->client = session.rows;
  read->generation = session.generation;
  read->step = step;
  read->batches = std::move(batches);
  for (const RowBatch& batch : *read->batches) {
    read->rows.push_back(
        Tensor::Allocate(DT_FLOAT, {static_cast<int64_t>(batch.keys.size()), batch.dim}));
    RowClient::Request request;
    request.source = sync_ ? TensorClient::Source::kStep : TensorClient::Source::kAtLeastStep;
    request.generation = session.generation;
    request.step = step;
    request.table = batch.table;
    request.dim = static_cast<int>(batch.dim);
    request.keys = batch.keys;
    request.rows = read->rows.back().As<float>().data();
    read->pending.push_back(read->client->Start(request, PushDeadline()));
  }
  return read;
}

absl::Status StepComputer::WaitForRows(RowRead* read) {
  for (auto& pending : read->pending) {
    CODISTILL_ASSIGN_OR_RETURN(const RowClient::Result got, pending->Wait());
    options_.progress->AddPulled(got.bytes);
  }
  read->pending.clear();
  return absl::OkStatus();
}

std::unique_ptr<StepComputer::RowRead> StepComputer::TakeRows(const Session& session,
                                                              const BatchPipeline::Step& step) {
  std::unique_ptr<RowRead> early = std::move(early_rows_);
  if (step.rows == nullptr) return nullptr;
  if (early != nullptr && early->generation == session.generation &&
      early->client == session.rows && early->step == step.assignment.weights_step() &&
      early->batches == step.rows) {
    return early;
  }
  return StartRows(session, step.assignment.weights_step(), step.rows);
}

absl::Status StepComputer::Rows(const Session& session, const BatchPipeline::Step& step,
                                std::unique_ptr<RowRead>* read) {
  if (*read == nullptr) return absl::OkStatus();
  if (WaitForRows(read->get()).ok()) return absl::OkStatus();
  *read = StartRows(session, step.assignment.weights_step(), step.rows);
  return WaitForRows(read->get());
}

void StepComputer::StartEarlyRows(const Session& session, int64_t step) {
  // As StartEarlyPull.
  if (!sync_ || session.rows == nullptr || !options_.next_rows) return;
  BatchPipeline::NextRows next = options_.next_rows();
  if (next.rows == nullptr || next.generation != session.generation || next.weights_step != step) {
    return;
  }
  early_rows_ = StartRows(session, step, std::move(next.rows));
}

void StepComputer::PushRows(const RowRead& read, PushStream* push) {
  std::vector<Tensor> gradients;
  for (int i = 0; i < options_.job.model().inputs_size(); ++i) {
    gradients.push_back(options_.model->InputGradient(i));
  }
  for (const RowBatch& batch : *read.batches) {
    const Tensor sums = ScatterGradients(batch, gradients);
    push->AddRows(batch.table, options_.job.model().embedding_tables(batch.table).name(),
                  static_cast<int>(batch.dim), batch.keys, sums.As<float>().data());
  }
}

absl::StatusOr<Model::Logits> StepComputer::Forward(const BatchPipeline::Step& step,
                                                    const RowRead* rows, Model::States* states) {
  std::vector<Tensor> inputs = step.batch.inputs;
  if (rows != nullptr) {
    std::vector<const float*> pointers;
    for (const Tensor& tensor : rows->rows) pointers.push_back(tensor.As<float>().data());
    inputs = GatherRows(inputs, *rows->batches, pointers);
  }
  const uint64_t seed =
      Mix(options_.job.seed(), group_hash_, step.assignment.step(), options_.rank);
  CODISTILL_ASSIGN_OR_RETURN(
      Model::Logits logits,
      options_.model->Forward(inputs, options_.job.model().states_size() > 0 ? states : nullptr,
                              seed));
  if (logits.rows != step.batch.rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("the model gives ", logits.rows, " rows of logits for a batch of ",
                     step.batch.examples, " examples with ", step.batch.rows, " labels"));
  }
  return logits;
}

absl::Status StepComputer::TakePredictions(const BatchPipeline::Step& step) {
  if (options_.teachers == nullptr || predictions_.has_value()) return absl::OkStatus();
  const int64_t number = step.assignment.step();
  if (!(step.assignment.teacher_weight() > 0)) {
    options_.teachers->BeginStep(number);
    return absl::OkStatus();
  }
  options_.progress->SetState("waiting", absl::StrCat("for the teachers at step ", number));
  absl::StatusOr<TeacherPredictions> predictions = options_.teachers->Take(step.question);
  const TeacherSource::Counters counters = options_.teachers->counters();
  options_.progress->SetTeachers(counters);
  CODISTILL_RETURN_IF_ERROR(predictions);
  options_.progress->SetState(
      "training", predictions->teachers() == 0
                      ? absl::StrCat("step ", number, " goes on without teachers",
                                     counters.last_error.empty() ? "" : ": ", counters.last_error)
                      : absl::StrCat("step ", number, " with ", predictions->teachers(),
                                     predictions->teachers() == 1 ? " teacher" : " teachers"));
  predictions_ = *std::move(predictions);
  return absl::OkStatus();
}

absl::StatusOr<StepComputer::Loss> StepComputer::ComputeLoss(const BatchPipeline::Step& step,
                                                             const Model::Logits& logits) {
  LossInputs inputs;
  inputs.rows = logits.rows;
  inputs.classes = options_.job.model().num_outputs();
  inputs.logits = logits.values.As<float>().data();
  if (!step.batch.labels.empty()) inputs.labels = step.batch.labels.As<int64_t>().data();
  if (!step.batch.targets.empty()) inputs.targets = step.batch.targets.As<float>().data();
  std::vector<const float*> teachers;
  std::vector<TopKTeacher> topk_teachers;
  if (predictions_.has_value()) {
    const std::vector<Tensor>& all = predictions_->logits;
    for (const Tensor& tensor : all) teachers.push_back(tensor.As<float>().data());
    for (const TopKPrediction& top_k : predictions_->top_k) {
      topk_teachers.push_back(TopKTeacherOf(top_k));
    }
  }
  inputs.teachers = teachers;
  inputs.topk_teachers = topk_teachers;
  const bool taught = !teachers.empty() || !topk_teachers.empty();
  inputs.teacher_weight = taught ? step.assignment.teacher_weight() : 0;
  if (gradient_.empty() || gradient_.shape() != logits.values.shape()) {
    gradient_ = Tensor::Allocate(DT_FLOAT, logits.values.shape());
  }
  const int threads = options_.job.training().worker_threads();
  LossOutputs outputs;
  outputs.gradient = gradient_.As<float>().data();
  absl::Status status = ComputeLossCpu(loss_options_, inputs, &outputs, threads);
  if ((!status.ok() || !outputs.finite) && inputs.teacher_weight > 0) {
    // A teacher that has diverged, or names classes that make no distribution, must not take its
    // students along: the labels alone, if they can.
    const std::string wrong =
        status.ok() ? "predictions of a teacher are not finite" : std::string(status.message());
    inputs.teacher_weight = 0;
    status = ComputeLossCpu(loss_options_, inputs, &outputs, threads);
    LOG_IF(WARNING, status.ok() && outputs.finite)
        << "step " << step.assignment.step() << ": " << wrong << "; left out";
  }
  if (!status.ok()) return Annotate(status, absl::StrCat("step ", step.assignment.step()));
  return Loss{outputs.sums, outputs.finite, inputs.teacher_weight > 0};
}

void StepComputer::PushBuffers(PushStream* push) {
  for (int index : buffers_) {
    const TensorView& view = options_.model->storage()[index];
    // A copy: the next pull writes into the model while gRPC may still hold these bytes.
    Tensor copy = Tensor::Allocate(view.dtype, view.shape);
    std::memcpy(copy.data(), view.data, view.bytes());
    push->AddBuffer(index, copy.data(), copy.owner());
  }
}

absl::Time StepComputer::PushDeadline() const {
  // Decided when the slowest member has pushed, or a lost one has come back.
  // Any of them may be waiting for its teachers as long as the job lets it.
  return absl::Now() + kTransferWait + absl::Seconds(model_bytes_ / kSlowestTransfer) +
         absl::Seconds(options_.job.training().rejoin_timeout_s()) +
         absl::Milliseconds(TeacherWaitMs(options_.job.codistillation())) + 20 * last_step_;
}

}  // namespace codistill
