#include "worker/testing/fake_group.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/config/schedule.h"
#include "glog/logging.h"

namespace codistill {
namespace {

Tensor CopyOf(const Tensor& tensor) {
  Tensor copy = Tensor::Allocate(tensor.dtype(), tensor.shape());
  std::memcpy(copy.data(), tensor.data(), tensor.bytes());
  return copy;
}

}  // namespace

class FakeGroup::Leader : public LeaderClient {
 public:
  explicit Leader(FakeGroup* group) : group_(group) {}

  absl::StatusOr<RegisterReply> Register(RegisterRequest, absl::Time) override {
    MutexLock lock(&group_->mu_);
    if (absl::Status status = group_->Scripted(kRegister); !status.ok()) return status;
    RegisterReply reply;
    reply.set_generation(group_->generation_);
    reply.set_incarnation(1);
    reply.mutable_shard_map()->set_num_shards(1);
    *reply.mutable_shard_map()->mutable_tensors() = group_->tensors_.tensors();
    reply.add_shard_addresses("shard:1");
    reply.mutable_version()->set_step(group_->step_);
    reply.set_worker_state(group_->restored_state_);
    reply.set_num_workers(1);
    return reply;
  }

  absl::StatusOr<GetAssignmentsReply> GetAssignments(GetAssignmentsRequest request,
                                                     absl::Time) override {
    MutexLock lock(&group_->mu_);
    FakeGroup& g = *group_;
    if (absl::Status status = g.Scripted(kAssign); !status.ok()) return status;
    if (absl::Status status = g.CheckGeneration(request.generation()); !status.ok()) return status;
    GetAssignmentsReply reply;
    if (g.draining_ || g.step_ >= g.job_.stop().steps()) {
      reply.set_finished(true);
      return reply;
    }
    int64_t next = request.first_step();
    if (next == 0) next = g.sync_ ? g.step_ + 1 : g.assigned_ + 1;
    for (int i = 0; i < request.max_assignments(); ++i, ++next) {
      if (g.sync_ && next > g.job_.stop().steps()) break;
      Assignment* assignment = reply.add_assignments();
      assignment->set_step(next);
      assignment->set_first_example((next - 1) * g.job_.training().batch_size());
      assignment->set_num_examples(g.job_.training().batch_size());
      assignment->set_teacher_weight(TeacherWeightAt(g.job_, next));
      assignment->set_weights_step(g.sync_ ? g.WeightsOf(next) : 0);
      assignment->set_want_worker_state(g.want_state_[next]);
      g.assigned_ = std::max(g.assigned_, next);
    }
    return reply;
  }

  absl::StatusOr<HeartbeatReply> Heartbeat(HeartbeatRequest request, absl::Time) override {
    MutexLock lock(&group_->mu_);
    if (absl::Status status = group_->Scripted(kHeartbeat); !status.ok()) return status;
    group_->heartbeats_.push_back(std::move(request));
    HeartbeatReply reply;
    reply.set_drain(group_->draining_);
    reply.set_generation(group_->generation_);
    return reply;
  }

  absl::Status ReportEnd(ReportEndRequest, absl::Time) override {
    return absl::UnimplementedError("not for workers");
  }
  absl::Status ReportEvaluation(EvaluationResult, absl::Time) override { return absl::OkStatus(); }
  absl::StatusOr<GetHistoryReply> GetHistory(absl::Time) override {
    GetHistoryReply reply;
    reply.mutable_state()->set_phase(group_->phase_.load());
    return reply;
  }

 private:
  FakeGroup* const group_;
};

class FakeGroup::Push : public PushStream {
 public:
  Push(FakeGroup* group, TensorClient::PushHeader header) : group_(group), header_(header) {}

  void AddGradient(int index, const float* data, std::shared_ptr<const void>) override {
    const TensorSpec& spec = group_->tensors_.tensors(index);
    CHECK(gradients_.count(index) == 0) << spec.name() << " twice";
    gradients_[index] = Copy(spec, data);
  }
  void AddBuffer(int index, const void* data, std::shared_ptr<const void>) override {
    buffers_[index] = Copy(group_->tensors_.tensors(index), data);
  }
  void Cancel() override { group_->CancelPush(); }
  void End(PushEnd end) override {
    result_ = group_->Decide(header_, std::move(gradients_), std::move(buffers_),
                             std::move(worker_state_), std::move(end), &parked_);
  }
  absl::StatusOr<Result> Wait() override {
    if (!parked_) return std::move(result_);
    MutexLock lock(&group_->mu_);
    return group_->ParkPush();
  }
  void AddRows(int, absl::string_view name, int, absl::Span<const uint64_t>,
               const float*) override {
    LOG(FATAL) << "a fake group has no embedding table " << name;
  }
  void AddWorkerState(std::string state) override { worker_state_ = std::move(state); }

 private:
  static Tensor Copy(const TensorSpec& spec, const void* data) {
    Tensor tensor = Tensor::Allocate(spec.dtype(), {spec.shape().begin(), spec.shape().end()});
    std::memcpy(tensor.data(), data, tensor.bytes());
    return tensor;
  }

  FakeGroup* const group_;
  const TensorClient::PushHeader header_;
  std::map<int, Tensor> gradients_;
  std::map<int, Tensor> buffers_;
  std::string worker_state_;
  absl::StatusOr<Result> result_;
  bool parked_ = false;  // no answer comes
};

class FakeGroup::Tensors : public TensorClient {
 public:
  explicit Tensors(FakeGroup* group) : group_(group) {}

  absl::StatusOr<PullResult> Pull(Source source, uint64_t generation, int64_t step,
                                  absl::Span<const TensorView> tensors, absl::Time) override {
    MutexLock lock(&group_->mu_);
    FakeGroup& g = *group_;
    if (absl::Status status = g.Scripted(kPull); !status.ok()) return status;
    if (absl::Status status = g.CheckGeneration(generation); !status.ok()) return status;
    if (absl::Status status = g.AwaitStep(generation, step); !status.ok()) return status;
    CHECK_EQ(static_cast<int>(source),
             static_cast<int>(g.sync_ ? Source::kStep : Source::kAtLeastStep));
    if (g.sync_ && step != g.step_ && step != std::max<int64_t>(g.step_ - g.lag_, 0)) {
      const std::string gone = absl::StrCat("step ", step, " is gone");
      return g.lag_ > 0 ? absl::OutOfRangeError(gone) : absl::AbortedError(gone);
    }
    const int64_t version = g.sync_ ? step : g.step_;
    const Cut& cut = g.cuts_.at(version);
    PullResult result;
    result.version.set_generation(g.generation_);
    result.version.set_step(version);
    for (size_t i = 0; i < cut.tensors.size(); ++i) {
      std::memcpy(tensors[i].data, cut.tensors[i].data(), tensors[i].bytes());
      result.bytes += tensors[i].bytes();
    }
    return result;
  }

  void CancelPull() override { group_->CancelPull(); }

  std::unique_ptr<PushStream> StartPush(const PushHeader& header, absl::Time) override {
    return std::make_unique<Push>(group_, header);
  }

 private:
  FakeGroup* const group_;
};

FakeGroup::FakeGroup(JobConfig job, TensorList tensors)
    : job_(std::move(job)),
      tensors_(std::move(tensors)),
      sync_(job_.training().update_mode() == TrainingConfig::SYNC),
      lag_(job_.training().weights_lag()) {
  Cut& initial = cuts_[0];
  for (const TensorSpec& spec : tensors_.tensors()) {
    Tensor tensor = Tensor::Zeros(spec.dtype(), {spec.shape().begin(), spec.shape().end()});
    // Not all the same, so that a transposed or shifted tensor shows.
    if (spec.dtype() == DT_FLOAT) {
      int i = 0;
      for (float& value : tensor.As<float>()) value = 0.01f * static_cast<float>(++i % 7);
    }
    initial.tensors.push_back(tensor);
  }
}

FakeGroup::~FakeGroup() = default;

std::unique_ptr<LeaderClient> FakeGroup::leader() { return std::make_unique<Leader>(this); }

std::function<absl::StatusOr<std::unique_ptr<TensorClient>>(TensorClient::Options)>
FakeGroup::connect() {
  return [this](TensorClient::Options) -> absl::StatusOr<std::unique_ptr<TensorClient>> {
    return std::make_unique<Tensors>(this);
  };
}

int64_t FakeGroup::WeightsOf(int64_t step) const { return std::max(restored_at_, step - 1 - lag_); }

absl::Status FakeGroup::AwaitStep(uint64_t generation, int64_t step) {
  pull_waits_ = true;
  pull_parked_ = step == park_pull_;
  const auto over = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return pull_cancelled_ || generation != generation_ || (step_ >= step && step != park_pull_);
  };
  mu_.Await(absl::Condition(&over));
  pull_waits_ = pull_parked_ = false;
  if (!std::exchange(pull_cancelled_, false)) return CheckGeneration(generation);
  return absl::CancelledError("pull cancelled");
}

absl::Status FakeGroup::ParkPush() {
  push_parked_ = true;
  mu_.Await(absl::Condition(&push_cancelled_));
  push_parked_ = push_cancelled_ = false;
  return absl::CancelledError("push cancelled");
}

void FakeGroup::CancelPull() {
  MutexLock lock(&mu_);
  pull_cancelled_ = pull_waits_;
}

void FakeGroup::CancelPush() {
  MutexLock lock(&mu_);
  push_cancelled_ = push_parked_;
}

void FakeGroup::ParkPullsOf(int64_t step) {
  MutexLock lock(&mu_);
  park_pull_ = step;
}

void FakeGroup::ParkPushOf(int64_t step) {
  MutexLock lock(&mu_);
  park_push_ = step;
}

int64_t FakeGroup::parked() const {
  MutexLock lock(&mu_);
  return (pull_parked_ ? 1 : 0) + (push_parked_ ? 1 : 0);
}

absl::Status FakeGroup::Scripted(Call call) {
  ++counts_[call];
  if (!errors_[call].empty()) {
    absl::Status status = errors_[call].front();
    errors_[call].pop_front();
    return status;
  }
  return always_[call];
}

absl::Status FakeGroup::CheckGeneration(uint64_t generation) const {
  if (generation == generation_) return absl::OkStatus();
  return absl::AbortedError(
      absl::StrCat("generation ", generation, "; the group is at ", generation_));
}

absl::StatusOr<PushStream::Result> FakeGroup::Decide(const TensorClient::PushHeader& header,
                                                     std::map<int, Tensor> gradients,
                                                     std::map<int, Tensor> buffers,
                                                     std::string worker_state, PushEnd end,
                                                     bool* parked) {
  std::function<void()> after;
  PushStream::Result result;
  absl::Status lost;
  {
    MutexLock lock(&mu_);
    if (absl::Status status = Scripted(kPush); !status.ok()) return status;
    if (absl::Status status = CheckGeneration(header.generation); !status.ok()) return status;
    if (header.step == park_push_) {
      *parked = true;
      return absl::CancelledError("parked");
    }
    result.bytes = 1;
    if (sync_ && header.step <= step_) {
      result.outcome = DUPLICATE;
      result.step = header.step;
      return result;
    }
    if (step_ >= job_.stop().steps()) {
      result.outcome = DROPPED_LATE;
      return result;
    }
    CHECK(!sync_ || header.step == step_ + 1) << header.step << " after " << step_;
    CHECK(!sync_ || header.weights_step == WeightsOf(header.step));
    result.outcome = APPLIED;
    if (!outcomes_.empty()) {
      result.outcome = outcomes_.front();
      outcomes_.pop_front();
    }
    Cut next;
    for (const Tensor& tensor : cuts_.at(step_).tensors) next.tensors.push_back(CopyOf(tensor));
    if (result.outcome == APPLIED) {
      const float rate = static_cast<float>(LearningRateAt(job_, header.step));
      for (int i = 0; i < tensors_.tensors_size(); ++i) {
        const TensorSpec& spec = tensors_.tensors(i);
        if (spec.role() == TensorSpec::PARAMETER) {
          CHECK(gradients.count(i) == 1) << "no gradient of " << spec.name();
          const auto gradient = static_cast<const Tensor&>(gradients[i]).As<float>();
          auto values = next.tensors[i].As<float>();
          for (size_t j = 0; j < values.size(); ++j) values[j] -= rate * gradient[j];
        } else if (spec.role() == TensorSpec::BUFFER) {
          CHECK(buffers.count(i) == 1) << "no value of " << spec.name();
          next.tensors[i] = buffers[i];
        }
      }
    }
    ++step_;
    cuts_[step_] = std::move(next);
    if (!worker_state.empty()) worker_states_[step_] = worker_state;
    result.step = step_;
    pushes_.push_back({header.step, std::move(end), result.outcome, std::move(worker_state)});
    if (auto found = after_.find(step_); found != after_.end()) {
      after = std::move(found->second);
      after_.erase(found);
    }
    if (!lost_answers_.empty()) {
      lost = lost_answers_.front();
      lost_answers_.pop_front();
    }
  }
  if (after) after();
  if (!lost.ok()) return lost;
  return result;
}

void FakeGroup::FailNext(Call call, std::vector<absl::Status> errors) {
  MutexLock lock(&mu_);
  errors_[call].insert(errors_[call].end(), errors.begin(), errors.end());
}

void FakeGroup::FailAlways(Call call, absl::Status error) {
  MutexLock lock(&mu_);
  always_[call] = std::move(error);
}

void FakeGroup::LoseNextAnswers(int count, absl::Status error) {
  MutexLock lock(&mu_);
  lost_answers_.insert(lost_answers_.end(), count, error);
}

void FakeGroup::AnswerNext(std::vector<PushOutcome> outcomes) {
  MutexLock lock(&mu_);
  outcomes_.insert(outcomes_.end(), outcomes.begin(), outcomes.end());
}

void FakeGroup::AfterStep(int64_t step, std::function<void()> f) {
  MutexLock lock(&mu_);
  after_[step] = std::move(f);
}

void FakeGroup::Restore(int64_t step) {
  MutexLock lock(&mu_);
  ++generation_;
  step_ = step;
  assigned_ = step;
  restored_at_ = step;
  cuts_.erase(cuts_.upper_bound(step), cuts_.end());
  auto found = worker_states_.find(step);
  restored_state_ = found == worker_states_.end() ? "" : found->second;
}

void FakeGroup::Drain() {
  MutexLock lock(&mu_);
  draining_ = true;
}

void FakeGroup::WantWorkerState(int64_t step) {
  MutexLock lock(&mu_);
  want_state_[step] = true;
}

int64_t FakeGroup::step() const {
  MutexLock lock(&mu_);
  return step_;
}

uint64_t FakeGroup::generation() const {
  MutexLock lock(&mu_);
  return generation_;
}

std::string FakeGroup::weights(int64_t step) const {
  MutexLock lock(&mu_);
  std::string bytes;
  for (const Tensor& tensor : cuts_.at(step).tensors) {
    bytes.append(static_cast<const char*>(tensor.data()), tensor.bytes());
  }
  return bytes;
}

std::vector<float> FakeGroup::parameter(int64_t step, int index) const {
  MutexLock lock(&mu_);
  const auto values = cuts_.at(step).tensors[index].As<float>();
  return {values.begin(), values.end()};
}

std::vector<FakeGroup::Pushed> FakeGroup::pushes() const {
  MutexLock lock(&mu_);
  return pushes_;
}

std::vector<HeartbeatRequest> FakeGroup::heartbeats() const {
  MutexLock lock(&mu_);
  return heartbeats_;
}

int64_t FakeGroup::calls(Call call) const {
  MutexLock lock(&mu_);
  return counts_[call];
}

}  // namespace codistill
