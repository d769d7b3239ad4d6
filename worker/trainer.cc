#include "worker/trainer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/device.h"
#include "common/base/status.h"
#include "common/base/trace.h"
#include "common/config/embedding.h"
#include "common/config/job.h"
#include "common/config/shard_map.h"
#include "glog/logging.h"

namespace codistill {
namespace {

constexpr absl::Duration kRegisterTimeout = absl::Seconds(10);
constexpr absl::Duration kHeartbeatTimeout = absl::Seconds(5);
constexpr absl::Duration kLeaveTimeout = absl::Seconds(3);
// How often the training thread looks up from waiting for work.
constexpr absl::Duration kWorkPoll = absl::Milliseconds(200);
constexpr absl::Duration kFirstBackoff = absl::Milliseconds(50);
constexpr absl::Duration kLongestBackoff = absl::Seconds(1);

// Whether the same call may succeed later. Connections that break show as any of these.
bool IsTransient(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kResourceExhausted:
      return true;
    default:
      return false;
  }
}

TensorList ListOf(const ShardMap& map) {
  TensorList list;
  *list.mutable_tensors() = map.tensors();
  return list;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(Options options) {
  if (options.connect == nullptr) options.connect = TensorClient::Create;
  auto trainer = std::unique_ptr<Trainer>(new Trainer(std::move(options)));
  const Options& o = trainer->options_;
  StepComputer::Options computer;
  computer.job = o.job;
  computer.group = o.group;
  computer.rank = o.rank;
  computer.model = o.model;
  computer.teachers = o.teachers;
  computer.progress = o.progress;
  computer.label_prior = o.label_prior;
  computer.next_rows = [t = trainer.get()] { return t->pipeline_->PeekRows(); };
  computer.test_delay = o.test_step_delay;
  CODISTILL_ASSIGN_OR_RETURN(trainer->computer_, StepComputer::Create(std::move(computer)));
  BatchPipeline::Options pipeline;
  pipeline.leader = o.leader;
  pipeline.batches = o.batches;
  pipeline.teachers = o.teachers;
  pipeline.rank = o.rank;
  pipeline.model = o.job.model();
  pipeline.ahead = std::max(1, o.job.codistillation().prefetch());
  pipeline.undecided = static_cast<int>(trainer->lag_);
  pipeline.announce = o.job.codistillation().prefetch() > 0;
  // As they are only where they are taken whole and as they were built.
  if (o.model->device() != kHostDevice && o.job.training().micro_batches() == 1 &&
      !HasEmbeddings(o.job.model())) {
    pipeline.on_inputs = [model = o.model](absl::Span<const Tensor> inputs) {
      model->Stage(inputs);
    };
  }
  trainer->pipeline_ = std::make_unique<BatchPipeline>(std::move(pipeline));
  return trainer;
}

Trainer::Trainer(Options options)
    : options_(std::move(options)),
      sync_(options_.job.training().update_mode() == TrainingConfig::SYNC),
      lag_(options_.job.training().weights_lag()),
      progress_(options_.progress) {}

Trainer::~Trainer() = default;

absl::Status Trainer::Run() {
  {
    PeriodicTask::Options beat;
    beat.name = "heartbeat";
    beat.interval = options_.heartbeat_interval;
    const TrainingConfig& training = options_.job.training();
    if (training.membership() == TrainingConfig::ELASTIC) {
      beat.interval = std::min(beat.interval, absl::Seconds(training.lease_s()) / 4);
    }
    heartbeat_ = std::make_unique<PeriodicTask>(beat, [this] { Beat(); });
  }
  absl::Status status = Join(/*aborted=*/true);
  if (status.ok()) status = Train();
  if (absl::IsCancelled(status) && leaving()) status = absl::OkStatus();
  heartbeat_->Stop();
  again_.clear();
  undecided_.reset();  // cancelled, where nobody has waited for it
  pipeline_.reset();
  Leave(status);
  return status;
}

void Trainer::Drain() {
  {
    MutexLock lock(&mu_);
    if (drain_) return;
    drain_ = true;
    drain_since_ = absl::Now();
  }
  if (options_.teachers != nullptr) options_.teachers->StopWaiting();
}

bool Trainer::leaving() const {
  MutexLock lock(&mu_);
  return drain_ || !superseded_.ok();
}

absl::Status Trainer::superseded() const {
  MutexLock lock(&mu_);
  return superseded_;
}

const std::string& Trainer::GroupName() const { return options_.job.groups(options_.group).name(); }

absl::Status Trainer::Train() {
  for (;;) {
    CODISTILL_RETURN_IF_ERROR(superseded());
    if (leaving()) return Settle().status();
    if (!again_.empty()) {
      std::unique_ptr<StepInHand> hand = std::move(again_.front());
      again_.pop_front();
      CODISTILL_RETURN_IF_ERROR(Advance(std::move(hand)));
      continue;
    }
    const absl::Time start = absl::Now();
    // Whoever waits for a decision has it before he waits for a step, which may depend on it.
    const bool undecided = undecided_ != nullptr;
    TraceSpan waiting("wait", "wait for a step");
    absl::StatusOr<std::unique_ptr<BatchPipeline::Step>> step =
        pipeline_->Next(undecided ? start : start + kWorkPoll);
    waiting.End();
    progress_->AddTime(WorkerProgress::kAssignment, absl::Now() - start);
    if (!step.ok() && undecided) {
      CODISTILL_ASSIGN_OR_RETURN(const Settled settled, Settle());
      if (absl::IsDeadlineExceeded(step.status()) || settled != Settled::kDecided) continue;
    }
    if (absl::IsDeadlineExceeded(step.status())) {
      if (absl::Now() - start >= kWorkPoll) progress_->SetState("waiting", "for the next step");
      continue;
    }
    if (absl::IsOutOfRange(step.status())) return absl::OkStatus();
    if (!step.ok()) {
      CODISTILL_RETURN_IF_ERROR(Recover(step.status()));
      continue;
    }
    if (!(*step)->data_error.ok()) return Fatal((*step)->data_error);
    CODISTILL_RETURN_IF_ERROR(Advance(std::make_unique<StepInHand>(*std::move(step))));
  }
}

absl::Status Trainer::Advance(std::unique_ptr<StepInHand> hand) {
  TraceSpan whole("step", "step");
  whole.Arg("step", hand->number());
  const uint64_t generation = session_.generation;
  const uint64_t incarnation = session_.incarnation;
  const StepComputer::Result result =
      computer_->Compute(session_, StateBefore(hand->number()), hand.get());
  if (!result.local_error.ok()) return Fatal(result.local_error);
  if (!result.transfer_error.ok()) return WithoutWeights(std::move(hand), result.transfer_error);

  CODISTILL_ASSIGN_OR_RETURN(const Settled settled, Settle());
  if (settled == Settled::kAgain) {
    Again(std::move(hand));
    return absl::OkStatus();
  }
  if (settled == Settled::kObsolete) {
    // ASYNC: nobody else gets its examples, but others may wait for its number.
    if (!sync_ && SameSession(generation, incarnation)) pipeline_->SetCompleted(hand->number());
    return absl::OkStatus();
  }
  if (hand->number() <= decided_without_us_) return absl::OkStatus();
  Remember(hand->after);
  computer_->End(session_, hand.get());
  undecided_ = std::move(hand);
  return lag_ > 0 ? absl::OkStatus() : Settle().status();
}

absl::Status Trainer::Fatal(const absl::Status& error) {
  // The steps before are trained.
  if (const std::unique_ptr<StepInHand> hand = std::move(undecided_); hand != nullptr) {
    const absl::Status pushed = computer_->Wait(hand.get()).status();
    LOG_IF(WARNING, !pushed.ok()) << "step " << hand->number() << ": " << pushed;
  }
  fatal_ = error;
  return fatal_;
}

absl::Status Trainer::WithoutWeights(std::unique_ptr<StepInHand> hand, const absl::Status& error) {
  const uint64_t generation = session_.generation;
  const uint64_t incarnation = session_.incarnation;
  // It may be for want of the decision that there are none.
  CODISTILL_ASSIGN_OR_RETURN(const Settled settled, Settle());
  if (settled == Settled::kObsolete) {
    if (!sync_ && SameSession(generation, incarnation)) pipeline_->SetCompleted(hand->number());
    return absl::OkStatus();
  }
  if (settled == Settled::kDecided && absl::IsOutOfRange(error)) {
    // They are gone because the step was decided, without us or with a push whose answer was lost.
    VLOG(1) << "step " << hand->number() << " is skipped: " << error;
    progress_->StepSkipped();
    return absl::OkStatus();
  }
  if (settled == Settled::kDecided) {
    CODISTILL_RETURN_IF_ERROR(Recover(error));
    // The step in hand may belong to the past.
    if (leaving() || absl::IsAborted(error) || !SameSession(generation, incarnation)) {
      again_.clear();
      return absl::OkStatus();
    }
  }
  Again(std::move(hand));
  return absl::OkStatus();
}

absl::StatusOr<Trainer::Settled> Trainer::Settle() {
  if (undecided_ == nullptr) return Settled::kDecided;
  const uint64_t generation = session_.generation;
  const uint64_t incarnation = session_.incarnation;
  std::unique_ptr<StepInHand> hand = std::move(undecided_);
  const absl::StatusOr<PushStream::Result> pushed = computer_->Wait(hand.get());
  // ASYNC: an answer, or a push that is given up. The leader waits for it where it has a bound.
  if (!sync_) {
    completed_ = hand->number();
    pipeline_->SetCompleted(completed_);
  }
  if (pushed.ok()) {
    Decided(*hand, *pushed);
    return Settled::kDecided;
  }
  if (sync_) progress_->PushLost();
  CODISTILL_RETURN_IF_ERROR(Recover(pushed.status()));
  if (leaving() || absl::IsAborted(pushed.status()) || !SameSession(generation, incarnation)) {
    again_.clear();
    return Settled::kObsolete;
  }
  if (!sync_) {
    WorkerProgress::StepReport lost;
    lost.step = hand->number();
    progress_->StepDone(lost);
    states_.clear();
    return Settled::kDecided;
  }
  Again(std::move(hand));
  return Settled::kAgain;
}

void Trainer::Again(std::unique_ptr<StepInHand> hand) {
  hand->push.reset();
  const auto place = std::find_if(again_.begin(), again_.end(), [&hand](const auto& other) {
    return other->number() > hand->number();
  });
  again_.insert(place, std::move(hand));
}

void Trainer::Decided(const StepInHand& hand, const PushStream::Result& push) {
  failures_in_row_ = 0;
  // With backup workers somebody is late at every step.
  LOG_IF(WARNING, push.outcome != APPLIED && push.outcome != DUPLICATE &&
                      !(sync_ && push.outcome == DROPPED_LATE))
      << "step " << hand.number() << ": push " << PushOutcome_Name(push.outcome) << " "
      << push.message;
  if (push.outcome != DROPPED_LATE) return;
  if (sync_) {
    // The others are ahead: what they have decided meanwhile need not be computed.
    decided_without_us_ = push.step;
    pipeline_->SkipTo(push.step + 1);
  } else {
    // The group has reached its last step, which in ASYNC may be anybody's: what is ready here
    // is not wanted any more, and the leader says so when asked.
    pipeline_->Restart(session_.generation, session_.incarnation);
  }
}

const RecurrentStateAfter& Trainer::StateBefore(int64_t step) const {
  static const RecurrentStateAfter* const none = new RecurrentStateAfter();
  for (const RecurrentStateAfter& state : states_) {
    if (state.step == step - 1) return state;
  }
  return *none;
}

void Trainer::Remember(const RecurrentStateAfter& state) {
  while (!states_.empty() && states_.back().step >= state.step) states_.pop_back();
  states_.push_back(state);
  // The step before the one that is not decided yet.
  while (states_.size() > static_cast<size_t>(lag_) + 2) states_.pop_front();
}

absl::Status Trainer::Recover(const absl::Status& error) {
  CODISTILL_RETURN_IF_ERROR(superseded());
  const bool aborted = absl::IsAborted(error);
  if (!aborted && !IsTransient(error)) return error;
  LOG(WARNING) << "group " << GroupName() << ": " << error;
  if (failures_in_row_++ == 0) failing_since_ = absl::Now();
  const absl::Duration patience = absl::Seconds(options_.job.training().rejoin_timeout_s());
  if (absl::Now() - failing_since_ > patience) {
    if (!GroupIsRestoring()) {
      return Annotate(error, absl::StrCat("no progress for ", absl::FormatDuration(patience),
                                          " (training.rejoin_timeout_s)"));
    }
    failing_since_ = absl::Now();
  }
  // The first time at once: a restored group is usually there already.
  if (failures_in_row_ > 1) BackOff();
  if (leaving()) return absl::OkStatus();
  return Join(aborted);
}

bool Trainer::GroupIsRestoring() {
  const absl::StatusOr<GetHistoryReply> history =
      options_.leader->GetHistory(absl::Now() + kRegisterTimeout);
  if (!history.ok()) return false;
  const GroupState::Phase phase = history->state().phase();
  return phase == GroupState::RESTORING || phase == GroupState::STARTING;
}

void Trainer::BackOff() {
  const absl::Duration pause =
      std::min(kFirstBackoff * (1 << std::min(failures_in_row_, 10)), kLongestBackoff);
  MutexLock lock(&mu_);
  const auto stop = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return drain_ || !superseded_.ok(); };
  mu_.AwaitWithTimeout(absl::Condition(&stop), pause);
}

absl::Status Trainer::Join(bool aborted) {
  progress_->SetState(joined_ ? "waiting" : "starting",
                      absl::StrCat("joining group ", GroupName()));
  CODISTILL_ASSIGN_OR_RETURN(const RegisterReply reply, Register());
  return Enter(reply, aborted);
}

absl::StatusOr<RegisterReply> Trainer::Register() {
  RegisterRequest request;
  request.set_rank(options_.rank);
  request.set_process_nonce(options_.process_nonce);
  *request.mutable_tensors() = options_.model->tensors().tensors();
  request.set_address(options_.address);
  request.set_http_address(options_.http_address);
  request.set_generation(session_.generation);
  if (!sync_) {
    request.set_completed_step(completed_);
    request.set_end_example(pipeline_->end_example());
  }
  const absl::Duration patience = absl::Seconds(options_.job.training().rejoin_timeout_s());
  absl::Time start = absl::Now();
  absl::Duration pause = kFirstBackoff;
  for (;;) {
    absl::StatusOr<RegisterReply> reply =
        options_.leader->Register(request, absl::Now() + kRegisterTimeout);
    if (reply.ok()) return reply;
    if (!IsTransient(reply.status()) && !absl::IsAborted(reply.status())) return reply.status();
    if (absl::Now() - start > patience && GroupIsRestoring()) start = absl::Now();
    if (absl::Now() - start > patience) {
      return Annotate(
          reply.status(),
          absl::StrCat("the leader of group ", GroupName(), " could not be reached for ",
                       absl::FormatDuration(patience), " (training.rejoin_timeout_s)"));
    }
    MutexLock lock(&mu_);
    const auto stop = [this]()
                          ABSL_NO_THREAD_SAFETY_ANALYSIS { return drain_ || !superseded_.ok(); };
    if (mu_.AwaitWithTimeout(absl::Condition(&stop), pause)) {
      return superseded_.ok() ? absl::CancelledError("draining") : superseded_;
    }
    pause = std::min(pause * 2, kLongestBackoff);
  }
}

absl::Status Trainer::Enter(const RegisterReply& reply, bool aborted) {
  const bool same = !aborted && reply.generation() == session_.generation &&
                    reply.incarnation() == session_.incarnation;
  const std::vector<std::string> addresses(reply.shard_addresses().begin(),
                                           reply.shard_addresses().end());
  const std::string difference =
      FirstDifference(ListOf(reply.shard_map()), options_.model->tensors());
  if (!difference.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("this worker's archive is not the group's: ", difference));
  }
  if (session_.tensors == nullptr || addresses != shard_addresses_ ||
      reply.shard_map().num_shards() != shard_map_.num_shards()) {
    TensorClient::Options options;
    options.group.set_run_id(RunId(options_.job));
    options.group.set_group(GroupName());
    options.shard_map = reply.shard_map();
    options.shard_addresses = addresses;
    options.push_dtype = options_.job.transport().push_dtype();
    if (HasEmbeddings(options_.job.model())) {
      RowClient::Options rows;
      rows.group = options.group;
      rows.shard_map_digest = reply.shard_map_digest();
      rows.shard_addresses = addresses;
      CODISTILL_ASSIGN_OR_RETURN(session_.rows, RowClient::Create(std::move(rows)));
    }
    CODISTILL_ASSIGN_OR_RETURN(session_.tensors, options_.connect(std::move(options)));
    shard_map_ = reply.shard_map();
    shard_addresses_ = addresses;
  }
  if (same) {
    pipeline_->Resume();
    return absl::OkStatus();
  }
  const bool same_generation = reply.generation() == session_.generation;
  session_.generation = reply.generation();
  session_.incarnation = reply.incarnation();
  completed_ = 0;
  decided_without_us_ = 0;
  {
    MutexLock lock(&mu_);
    incarnation_ = reply.incarnation();
  }
  progress_->SetGeneration(reply.generation());
  if (!joined_ || !same_generation) RestoreState(reply);
  joined_ = true;
  pipeline_->Restart(session_.generation, session_.incarnation);
  LOG(INFO) << "joined group " << GroupName() << " as worker " << options_.rank << ", generation "
            << reply.generation() << ", incarnation " << reply.incarnation() << ", at step "
            << reply.version().step();
  return absl::OkStatus();
}

void Trainer::RestoreState(const RegisterReply& reply) {
  states_.clear();
  if (reply.worker_state().empty()) return;
  absl::StatusOr<RecurrentStateAfter> state =
      DecodeWorkerState(options_.job.model(), reply.worker_state());
  if (!state.ok()) {
    LOG(WARNING) << "recurrent state starts from zeros: " << state.status();
    return;
  }
  states_.push_back(*std::move(state));
}

void Trainer::BreakOffWhenDue() {
  {
    MutexLock lock(&mu_);
    const bool over = drain_ && absl::Now() - drain_since_ > options_.drain_grace;
    if (!over && superseded_.ok()) return;
  }
  // Again at each heartbeat: the transfer may only just have begun.
  computer_->CancelTransfer();
}

void Trainer::Beat() {
  BreakOffWhenDue();
  HeartbeatRequest request;
  {
    MutexLock lock(&mu_);
    if (incarnation_ == 0) return;
    request.set_incarnation(incarnation_);
  }
  if (options_.teachers != nullptr) {
    const TeacherSource::Counters counters = options_.teachers->counters();
    progress_->SetTeachers(counters);
  }
  request.set_rank(options_.rank);
  request.set_process_nonce(options_.process_nonce);
  *request.mutable_counters() = progress_->counters();
  request.set_state(progress_->description());
  const absl::StatusOr<HeartbeatReply> reply =
      options_.leader->Heartbeat(std::move(request), absl::Now() + kHeartbeatTimeout);
  if (reply.ok()) {
    if (reply->drain()) Drain();
    return;
  }
  if (!absl::IsFailedPrecondition(reply.status())) return;  // the training thread meets it too
  {
    MutexLock lock(&mu_);
    superseded_ = reply.status();
  }
  if (options_.teachers != nullptr) options_.teachers->StopWaiting();
  BreakOffWhenDue();
}

void Trainer::Leave(const absl::Status& status) {
  progress_->SetState(status.ok() ? "finished" : "failed", std::string(status.message()));
  if (!joined_ || !superseded().ok()) return;
  if (options_.teachers != nullptr) {
    const TeacherSource::Counters counters = options_.teachers->counters();
    progress_->SetTeachers(counters);
  }
  HeartbeatRequest request;
  request.set_rank(options_.rank);
  request.set_process_nonce(options_.process_nonce);
  request.set_incarnation(session_.incarnation);
  *request.mutable_counters() = progress_->counters();
  request.set_state(progress_->description());
  request.set_leaving(status.ok());
  if (!fatal_.ok()) request.set_fatal_error(fatal_.ToString());
  const absl::Time deadline = absl::Now() + kLeaveTimeout;
  for (;;) {
    const absl::StatusOr<HeartbeatReply> reply = options_.leader->Heartbeat(request, deadline);
    if (reply.ok() || !IsTransient(reply.status()) || absl::Now() >= deadline) break;
    absl::SleepFor(kFirstBackoff);
  }
}

}  // namespace codistill
