#include "worker/step_computer.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/fault.h"
#include "common/base/status.h"
#include "common/base/trace.h"
#include "common/config/schedule.h"
#include "common/model/row_batch.h"

namespace codistill {
namespace {

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

// The inputs of forward().
std::vector<Tensor> InputsOf(const BatchPipeline::Step& step, const EmbeddedRows* embedded) {
  if (embedded == nullptr) return step.batch.inputs;
  std::vector<const float*> rows;
  for (const Tensor& tensor : embedded->rows) rows.push_back(tensor.As<float>().data());
  return GatherRows(step.batch.inputs, *embedded->batches, rows);
}

}  // namespace

absl::StatusOr<std::unique_ptr<StepComputer>> StepComputer::Create(Options options) {
  auto computer = std::unique_ptr<StepComputer>(new StepComputer(std::move(options)));
  const Options& checked = computer->options_;
  TrainingPass::Options pass;
  pass.job = checked.job;
  pass.group = checked.group;
  pass.rank = checked.rank;
  pass.model = checked.model;
  pass.label_prior = checked.label_prior;
  pass.test_delay = checked.test_delay;
  CODISTILL_ASSIGN_OR_RETURN(computer->pass_, TrainingPass::Create(std::move(pass)));
  WeightPuller::Options weights;
  weights.job = checked.job;
  weights.model = checked.model;
  weights.progress = checked.progress;
  weights.next_rows = checked.next_rows;
  CODISTILL_ASSIGN_OR_RETURN(computer->weights_, WeightPuller::Create(std::move(weights)));
  return computer;
}

StepComputer::StepComputer(Options options)
    : options_(std::move(options)),
      sync_(options_.job.training().update_mode() == TrainingConfig::SYNC) {
  const TensorList& tensors = options_.model->tensors();
  for (int i = 0; i < tensors.tensors_size(); ++i) {
    if (tensors.tensors(i).role() == TensorSpec::BUFFER) buffers_.push_back(i);
  }
}

StepComputer::Result StepComputer::Compute(const GroupSession& session,
                                           const RecurrentStateAfter& state, StepInHand* hand) {
  Result result;
  hand->begun = absl::Now();
  StopWatch watch(options_.progress);
  const BatchPipeline::Step& step = *hand->step;
  const Assignment& assignment = step.assignment;

  options_.progress->SetState("training",
                              absl::StrCat("step ", assignment.step(), ": getting the weights"));
  TraceSpan waiting("wait", "wait for the weights");
  const absl::StatusOr<WeightPuller::Weights> weights =
      weights_->Get(session, step, PushDeadline());
  waiting.End();
  watch.Lap(WorkerProgress::kPull);
  if (!weights.ok()) {
    result.transfer_error = weights.status();
    return result;
  }
  result.local_error = options_.model->UseWeights(weights->set);
  if (!result.local_error.ok()) return result;

  FaultPoint("worker.pulled");
  options_.progress->SetState("training", absl::StrCat("step ", assignment.step()));
  const EmbeddedRows* const embedded = weights->rows.get();
  Model::States states = state.For(assignment.step(), step.batch.starts_epoch);
  PushStream* push = nullptr;
  absl::StatusOr<TrainingPass::Result> loss = pass_->Run(
      step, InputsOf(step, embedded), &states,
      [&] {
        watch.Lap(WorkerProgress::kCompute);
        auto predictions = TakePredictions(hand);
        watch.Lap(WorkerProgress::kTeacher);
        return predictions;
      },
      [&]() -> Model::OnGradient {
        weights_->StartNewest(session, assignment, PushDeadline());
        hand->push = session.tensors->StartPush(HeaderOf(session, assignment, weights->version),
                                                PushDeadline());
        push = hand->push.get();
        // Those of a device are on their way while it computes the backward pass.
        if (options_.model->device() == kHostDevice) PushBuffers(push);
        return [push](int index, const float* data, std::shared_ptr<const void> owner) {
          push->AddGradient(index, data, std::move(owner));
        };
      });
  if (loss.ok() && options_.model->device() != kHostDevice) {
    const absl::Status here = options_.model->AwaitBuffers();
    if (!here.ok()) loss = here;
    if (here.ok()) PushBuffers(push);
  }
  if (loss.ok() && embedded != nullptr) PushRows(*embedded, push);
  watch.Lap(WorkerProgress::kCompute);
  if (!loss.ok()) {
    hand->push.reset();
    result.local_error = loss.status();
    return result;
  }
  FaultPoint("worker.computed");

  hand->loss = *std::move(loss);
  hand->after.step = assignment.step();
  hand->after.states = std::move(states);
  if (assignment.want_worker_state()) {
    push->AddWorkerState(EncodeWorkerState(options_.job.model(), hand->after));
  }
  PushEnd& end = hand->end;
  end.Clear();
  end.set_num_examples(step.batch.examples);
  // A sum that is not a number would spoil the group's curves; the gradient tells on itself.
  if (hand->loss.finite) {
    end.set_label_loss_sum(hand->loss.sums.label_loss_sum);
    end.set_teacher_loss_sum(hand->loss.sums.teacher_loss_sum);
    end.set_num_labels(hand->loss.sums.counted_rows);
  }
  end.set_used_teacher(hand->loss.used_teacher);
  end.set_teacher_weight(hand->loss.used_teacher ? assignment.teacher_weight() : 0);
  return result;
}

void StepComputer::End(const GroupSession& session, StepInHand* hand) {
  // Nothing reads the weights any more: gradients and buffers have memory of their own.
  weights_->StartEarly(session, hand->number(), PushDeadline());
  hand->push->End(hand->end);
  SetPush(hand->push.get());
}

absl::StatusOr<PushStream::Result> StepComputer::Wait(StepInHand* hand) {
  StopWatch watch(options_.progress);
  TraceSpan deciding("wait", "wait for the decision");
  deciding.Arg("step", hand->number());
  absl::StatusOr<PushStream::Result> pushed = hand->push->Wait();
  deciding.End();
  SetPush(nullptr);
  hand->push.reset();
  if (!pushed.ok()) weights_->ForgetEarly();
  watch.Lap(WorkerProgress::kPush);
  CODISTILL_RETURN_IF_ERROR(pushed.status());
  FaultPoint("worker.pushed");
  last_step_ = absl::Now() - hand->begun;
  Report(*hand, *pushed);
  return pushed;
}

void StepComputer::Report(const StepInHand& hand, const PushStream::Result& push) {
  const BatchPipeline::Step& step = *hand.step;
  const TrainingPass::Result& loss = hand.loss;
  WorkerProgress::StepReport report;
  report.step = hand.number();
  report.outcome = push.outcome;
  report.examples = step.batch.examples;
  report.push_bytes = push.bytes;
  const double rows = static_cast<double>(std::max<int64_t>(step.batch.rows, 1));
  report.label_loss = loss.sums.label_loss_sum / rows;
  report.wanted_teacher = step.assignment.teacher_weight() > 0;
  report.used_teacher = loss.used_teacher;
  if (loss.used_teacher) {
    report.teacher_loss = loss.sums.teacher_loss_sum / rows;
    report.staleness_steps = hand.predictions->staleness_steps;
    report.prefetch_lag_steps = hand.predictions->prefetch_lag_steps;
  }
  options_.progress->StepDone(report);
}

TensorClient::PushHeader StepComputer::HeaderOf(const GroupSession& session,
                                                const Assignment& assignment,
                                                const Version& weights) const {
  TensorClient::PushHeader header;
  header.generation = session.generation;
  header.step = assignment.step();
  header.rank = options_.rank;
  header.incarnation = session.incarnation;
  header.weights_step = weights.step();
  if (!sync_) {
    header.shard_steps.assign(weights.shard_steps().begin(), weights.shard_steps().end());
    header.shard_incarnations.assign(weights.shard_incarnations().begin(),
                                     weights.shard_incarnations().end());
    header.end_example =
        assignment.first_example() + static_cast<uint64_t>(assignment.num_examples());
  }
  return header;
}

void StepComputer::SetPush(PushStream* push) {
  MutexLock lock(&mu_);
  push_ = push;
}

void StepComputer::CancelTransfer() {
  weights_->Cancel();
  MutexLock lock(&mu_);
  if (push_ != nullptr) push_->Cancel();
}

void StepComputer::PushRows(const EmbeddedRows& rows, PushStream* push) {
  const std::vector<Tensor> gradients = pass_->InputGradients();
  for (const RowBatch& batch : *rows.batches) {
    const Tensor sums = ScatterGradients(batch, gradients);
    push->AddRows(batch.table, options_.job.model().embedding_tables(batch.table).name(),
                  static_cast<int>(batch.dim), batch.keys, sums.As<float>().data());
  }
}

absl::StatusOr<const TeacherPredictions*> StepComputer::TakePredictions(StepInHand* hand) {
  if (options_.teachers == nullptr) return nullptr;
  if (hand->predictions.has_value()) return &*hand->predictions;
  const BatchPipeline::Step& step = *hand->step;
  const int64_t number = step.assignment.step();
  if (!(step.assignment.teacher_weight() > 0)) {
    options_.teachers->BeginStep(number);
    return nullptr;
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
  hand->predictions = *std::move(predictions);
  return &*hand->predictions;
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
  return absl::Now() + weights_->LongestTransfer() +
         absl::Seconds(options_.job.training().rejoin_timeout_s()) +
         absl::Milliseconds(TeacherWaitMs(options_.job.codistillation())) + 20 * last_step_;
}

}  // namespace codistill
