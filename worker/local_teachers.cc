#include "worker/local_teachers.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/executor.h"
#include "common/base/status.h"
#include "common/base/trace.h"
#include "common/config/schedule.h"
#include "glog/logging.h"
#include "worker/announced_batches.h"
#include "worker/teacher_chain.h"

namespace codistill {
namespace {

// How often a failing teacher is tried.
constexpr absl::Duration kTryAgain = absl::Milliseconds(20);

// What a teacher says of a batch.
struct Pass {
  bool done = false;
  Tensor logits;
  uint64_t generation = 0;  // of the teacher
  int64_t staleness_steps = 0;
  int64_t done_at_step = 0;  // of the student
};

struct Entry {
  std::shared_ptr<const TeacherBatch> batch;
  std::vector<Pass> passes;  // by teacher
  bool passed = false;       // nobody wants them any more
};

struct TeacherState {
  // What is computed now is not the chain's any more.
  void Restart() {
    chain.Reset();
    ++restarts;
  }

  TeacherChain chain;
  int64_t restarts = 0;
  bool failing = false;                          // the last attempt
  absl::Time not_before = absl::InfinitePast();  // failing: the next attempt
};

class LocalTeachersImpl final : public LocalTeachers {
 public:
  explicit LocalTeachersImpl(Options options)
      : options_(std::move(options)),
        recurrent_(options_.model.states_size() > 0),
        wait_(absl::Milliseconds(TeacherWaitMs(options_.codistillation))),
        teachers_(options_.teachers.size()) {
    for (const Teacher& teacher : options_.teachers) {
      counters_.teachers.push_back({teacher.name, {}});
      seconds_.push_back(
          options_.metrics == nullptr
              ? nullptr
              : options_.metrics->latency("codistill_worker_teacher_pass_seconds",
                                          "Time of a teacher's forward pass in the worker.",
                                          {{"teacher", teacher.name}}));
    }
    thread_ = std::thread([this] { Run(); });
  }

  ~LocalTeachersImpl() override {
    {
      MutexLock lock(&mu_);
      stopping_ = true;
      changed_.SignalAll();
    }
    thread_.join();
  }

  void Request(const TeacherBatch& batch) override {
    MutexLock lock(&mu_);
    // A worker that resumes announces before it says where it is: at the step before.
    if (!current_step_.has_value()) current_step_ = batch.step - 1;
    FindOrAdd(batch);
  }

  void BeginStep(int64_t step) override {
    MutexLock lock(&mu_);
    current_step_ = step;
  }

  absl::StatusOr<TeacherPredictions> Take(const TeacherBatch& batch) override {
    MutexLock lock(&mu_);
    current_step_ = batch.step;
    for (const auto& entry : entries_) {
      entry->passed |=
          entry->batch->generation != batch.generation || entry->batch->step < batch.step;
    }
    RemovePassed();
    const std::shared_ptr<Entry> entry = FindOrAdd(batch);
    DropOldGenerations();
    const absl::Time deadline = absl::Now() + wait_;
    while (!stop_waiting_ && !entry->passed) {
      bool under_way = false;
      bool failing = false;
      for (size_t i = 0; i < teachers_.size(); ++i) {
        if (!entry->passes[i].done) (teachers_[i].failing ? failing : under_way) = true;
      }
      if (under_way) {
        changed_.Wait(&mu_);
      } else if (failing && absl::Now() < deadline) {
        changed_.WaitWithDeadline(&mu_, deadline);
      } else {
        break;
      }
    }
    return Collect(entry.get());
  }

  void Reset() override {
    MutexLock lock(&mu_);
    for (const auto& entry : entries_) entry->passed = true;
    entries_.clear();
    for (TeacherState& teacher : teachers_) teacher.Restart();
    current_step_.reset();
    changed_.SignalAll();
  }

  void StopWaiting() override {
    MutexLock lock(&mu_);
    stop_waiting_ = true;
    changed_.SignalAll();
  }

  Counters counters() const override {
    MutexLock lock(&mu_);
    return counters_;
  }

 private:
  std::shared_ptr<Entry> FindOrAdd(const TeacherBatch& batch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    std::shared_ptr<Entry> entry = FindBatch(entries_, batch);
    if (entry != nullptr) return entry;
    entry = std::make_shared<Entry>();
    entry->batch = std::make_shared<TeacherBatch>(batch);
    entry->passes.resize(teachers_.size());
    entries_.push_back(entry);
    while (entries_.size() >
           static_cast<size_t>(options_.codistillation.prefetch()) + kExtraBatches) {
      entries_.front()->passed = true;
      entries_.pop_front();
    }
    changed_.SignalAll();
    return entry;
  }

  void RemovePassed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    entries_.erase(std::remove_if(entries_.begin(), entries_.end(),
                                  [](const auto& entry) { return entry->passed; }),
                   entries_.end());
  }

  // What a teacher said before its group was restored is not used: those passes are computed again.
  // Of a recurrent teacher all that are still to be taken are, in order and from zeros: its chain
  // stands behind those that are dropped, and one gap is better than one a batch.
  void DropOldGenerations() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (size_t i = 0; i < teachers_.size(); ++i) {
      const auto held = options_.teachers[i].model->Get();
      if (!held.ok()) continue;
      const uint64_t generation = (*held)->version.generation();
      const auto old = [i, generation](const std::shared_ptr<Entry>& entry) {
        return entry->passes[i].done && entry->passes[i].generation != generation;
      };
      if (std::none_of(entries_.begin(), entries_.end(), old)) continue;
      for (const auto& entry : entries_) {
        if (recurrent_ || old(entry)) entry->passes[i] = Pass();
      }
      if (recurrent_) teachers_[i].Restart();
      changed_.SignalAll();
    }
  }

  absl::StatusOr<TeacherPredictions> Collect(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const int64_t step = entry->batch->step;
    TeacherPredictions predictions;
    std::vector<std::string> missing;
    int64_t done_at = step;
    for (size_t i = 0; i < teachers_.size(); ++i) {
      Pass& pass = entry->passes[i];
      if (!pass.done) {
        missing.push_back(options_.teachers[i].name);
        if (stop_waiting_ || entry->passed) continue;
        ++counters_.failures;
        ++counters_.teachers[i].second.failures;
        continue;
      }
      predictions.logits.push_back(std::move(pass.logits));
      predictions.staleness_steps = std::max(predictions.staleness_steps, pass.staleness_steps);
      done_at = std::min(done_at, pass.done_at_step);
    }
    predictions.prefetch_lag_steps = step - done_at;
    entry->passed = true;
    RemovePassed();
    if (!missing.empty() && !stop_waiting_ &&
        options_.codistillation.on_teacher_loss() == CodistillationConfig::FAIL) {
      return MissingPredictions(step, missing, wait_, counters_.last_error);
    }
    return predictions;
  }

  // On the thread, from here.

  void Run() {
    SetThreadName("teacher-passes");
    MutexLock lock(&mu_);
    while (!stopping_) {
      absl::Time next = absl::InfiniteFuture();
      size_t teacher = 0;
      const std::shared_ptr<Entry> entry = NextPass(&teacher, &next);
      if (entry != nullptr) {
        Compute(entry, teacher);
      } else if (next == absl::InfiniteFuture()) {
        changed_.Wait(&mu_);
      } else {
        changed_.WaitWithDeadline(&mu_, next);
      }
    }
  }

  // The first pass to compute, in the order of the batches. Null: none yet; `next` is when a
  // failing teacher is to be tried again for one.
  std::shared_ptr<Entry> NextPass(size_t* teacher, absl::Time* next)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const absl::Time now = absl::Now();
    for (const auto& entry : entries_) {
      for (size_t i = 0; i < teachers_.size(); ++i) {
        if (entry->passed || entry->passes[i].done) continue;
        if (teachers_[i].failing && teachers_[i].not_before > now) {
          *next = std::min(*next, teachers_[i].not_before);
          continue;
        }
        *teacher = i;
        return entry;
      }
    }
    return nullptr;
  }

  void Compute(const std::shared_ptr<Entry>& entry, size_t index)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    TeacherState& teacher = teachers_[index];
    const std::shared_ptr<const TeacherBatch> batch = entry->batch;
    Model::States states;
    if (recurrent_) states = teacher.chain.Before(*batch);
    const int64_t restarts = teacher.restarts;
    ++counters_.outstanding;
    mu_.Unlock();
    Pass pass;
    const absl::Status status = Predict(index, *batch, &states, &pass);
    mu_.Lock();
    --counters_.outstanding;
    if (status.ok()) {
      teacher.failing = false;
      ++counters_.requests;
      ++counters_.teachers[index].second.requests;
      const bool chained = recurrent_ && restarts == teacher.restarts;
      // The next batch wants the state even where nobody wants these predictions any more.
      if (chained) teacher.chain.Set(*batch, std::move(states));
      if (!entry->passed && (chained || !recurrent_)) {
        pass.done_at_step = current_step_.value_or(batch->step);
        entry->passes[index] = std::move(pass);
      }
    } else {
      const std::string error =
          absl::StrCat("teacher ", options_.teachers[index].name, ": ", status.ToString());
      LOG_IF(WARNING, !teacher.failing) << error;
      counters_.last_error = error;
      teacher.failing = true;
      teacher.not_before = absl::Now() + kTryAgain;
    }
    changed_.SignalAll();
  }

  // What a teacher holds, if it is new enough to be used.
  absl::StatusOr<std::shared_ptr<const FollowedModel::Snapshot>> Weights(size_t index,
                                                                         int64_t* staleness) const {
    FollowedModel* const followed = options_.teachers[index].model.get();
    CODISTILL_ASSIGN_OR_RETURN(auto snapshot, followed->Get());
    *staleness = std::max<int64_t>(0, followed->group_step() - snapshot->version.step());
    const int64_t allowed = options_.codistillation.max_staleness_steps();
    if (*staleness > allowed) {
      return absl::FailedPreconditionError(
          absl::StrCat("its weights are those of step ", snapshot->version.step(), ", ", *staleness,
                       " steps behind its group; at most ", allowed, " are allowed"));
    }
    return snapshot;
  }

  absl::Status Predict(size_t index, const TeacherBatch& batch, Model::States* states, Pass* pass)
      ABSL_LOCKS_EXCLUDED(mu_) {
    int64_t staleness = 0;
    CODISTILL_ASSIGN_OR_RETURN(auto snapshot, Weights(index, &staleness));
    absl::StatusOr<Model::Logits> logits;
    {
      std::optional<MutexLock> turn;
      if (options_.turn != nullptr) {
        turn.emplace(options_.turn);
        // Its group went on while the student had the threads.
        CODISTILL_ASSIGN_OR_RETURN(snapshot, Weights(index, &staleness));
      }
      TraceSpan span("teacher", "teacher pass");
      span.Arg("step", batch.step).Text("teacher", options_.teachers[index].name);
      const absl::Time start = absl::Now();
      logits = snapshot->model->Predict(batch.inputs, recurrent_ ? states : nullptr);
      if (seconds_[index] != nullptr) {
        seconds_[index]->Observe(absl::ToDoubleSeconds(absl::Now() - start));
      }
    }
    CODISTILL_RETURN_IF_ERROR(logits);
    if (logits->rows != batch.rows) {
      return absl::FailedPreconditionError(absl::StrCat(
          "gives ", logits->rows, " rows of logits for a batch of ", batch.rows, " labels"));
    }
    pass->done = true;
    pass->logits = std::move(logits->values);
    pass->generation = snapshot->version.generation();
    pass->staleness_steps = staleness;
    return absl::OkStatus();
  }

  const Options options_;
  const bool recurrent_;
  const absl::Duration wait_;
  std::vector<Metrics::Histogram*> seconds_;  // by teacher; null without metrics

  mutable Mutex mu_;
  CondVar changed_;  // a pass, a new batch, an end
  std::vector<TeacherState> teachers_ ABSL_GUARDED_BY(mu_);
  std::deque<std::shared_ptr<Entry>> entries_ ABSL_GUARDED_BY(mu_);  // in order of announcement
  std::optional<int64_t> current_step_ ABSL_GUARDED_BY(mu_);         // none since the (re)start
  bool stop_waiting_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  Counters counters_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

class TurnTakingModel final : public Model {
 public:
  TurnTakingModel(Model* model, Mutex* turn) : model_(model), turn_(turn) {}

  const TensorList& tensors() const override { return model_->tensors(); }
  absl::Span<const TensorView> storage() const override { return model_->storage(); }
  int weight_sets() const override { return model_->weight_sets(); }
  absl::Span<const TensorView> storage(int set) const override { return model_->storage(set); }
  absl::Status UseWeights(int set) override {
    MutexLock lock(turn_);
    return model_->UseWeights(set);
  }
  absl::StatusOr<Logits> Predict(absl::Span<const Tensor> inputs, States* states) const override {
    MutexLock lock(turn_);
    return model_->Predict(inputs, states);
  }
  absl::StatusOr<Logits> Forward(absl::Span<const Tensor> inputs, States* states,
                                 uint64_t seed) override {
    MutexLock lock(turn_);
    return model_->Forward(inputs, states, seed);
  }
  absl::Status Backward(const Tensor& gradient, const OnGradient& on_gradient) override {
    MutexLock lock(turn_);
    return model_->Backward(gradient, on_gradient);
  }
  absl::Status Accumulate(const Tensor& gradient) override {
    MutexLock lock(turn_);
    return model_->Accumulate(gradient);
  }
  void ForgetGradients() override { model_->ForgetGradients(); }
  Tensor InputGradient(int index) const override { return model_->InputGradient(index); }
  int device() const override { return model_->device(); }
  void* stream() const override { return model_->stream(); }
  absl::StatusOr<Tensor> Allocate(DataType dtype, std::vector<int64_t> shape) override {
    return model_->Allocate(dtype, std::move(shape));
  }
  absl::StatusOr<Tensor> ToDevice(const Tensor& tensor) override {
    return model_->ToDevice(tensor);
  }
  absl::Status WeightsWritten(int set) override { return model_->WeightsWritten(set); }
  absl::Status AwaitBuffers() override { return model_->AwaitBuffers(); }
  void Stage(absl::Span<const Tensor> inputs) override { model_->Stage(inputs); }

 private:
  Model* const model_;
  Mutex* const turn_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<LocalTeachers>> LocalTeachers::Create(Options options) {
  if (options.teachers.empty()) return absl::InvalidArgumentError("no teachers");
  return std::make_unique<LocalTeachersImpl>(std::move(options));
}

std::unique_ptr<Model> TakeTurns(Model* model, Mutex* turn) {
  return std::make_unique<TurnTakingModel>(model, turn);
}

}  // namespace codistill
