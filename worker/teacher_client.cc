#include "worker/teacher_client.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/base/trace.h"
#include "common/config/schedule.h"
#include "glog/logging.h"
#include "worker/announced_batches.h"
#include "worker/teacher_chain.h"
#include "worker/teacher_endpoints.h"

namespace codistill {
namespace {

// One batch's question to one server.
struct Attempt {
  int server = 0;  // of its teacher
  absl::Time sent;
  bool hedge = false;      // another one was under way
  bool cancelled = false;  // by us: nobody wants the answer
  std::shared_ptr<InferenceChannel::Call> call;
  int64_t traced_since = 0;  // 0 = not traced
};

// One batch's question to one teacher.
struct Question {
  bool answered = false;
  // Under way and not cancelled: none (then, unless answered, it is to be asked), one, or one and
  // its hedge.
  std::vector<std::shared_ptr<Attempt>> attempts;
  // Once answered:
  Tensor logits;  // one of the two
  TopKPrediction top_k;
  uint64_t generation = 0;  // of the teacher
  int64_t staleness_steps = 0;
  int64_t answered_at_step = 0;  // of the student

  bool in_flight() const { return !attempts.empty(); }
};

struct Entry {
  std::shared_ptr<const TeacherBatch> batch;
  std::vector<Question> questions;  // by teacher
  // Nobody wants the predictions any more; a chained question may still be under way for its state.
  bool passed = false;
  bool abandoned = false;  // nor the state
};

struct TeacherState {
  std::string name;
  std::shared_ptr<const TeacherDialect> dialect;
  TeacherEndpoints endpoints;
  TeacherSource::Counts counts = {};
  uint64_t generation = 0;  // its group's, as far as its servers have told
  TeacherChain chain = {};
  Metrics::Histogram* latency = nullptr;
};

class TeacherClientImpl : public TeacherClient {
 public:
  explicit TeacherClientImpl(Options options)
      : model_(std::make_shared<ModelConfig>(options.model)),
        config_(options.codistillation),
        format_(AnswerFormatOf(options.codistillation)),
        recurrent_(options.model.states_size() > 0),
        wait_(absl::Milliseconds(TeacherWaitMs(options.codistillation))),
        hedge_after_(config_.hedge_after_ms() > 0 ? absl::Milliseconds(config_.hedge_after_ms())
                                                  : absl::InfiniteDuration()) {
    std::random_device random;
    std::vector<std::string> addresses;
    for (Teacher& teacher : options.teachers) {
      const int first = static_cast<int>(addresses.size());
      addresses.insert(addresses.end(), teacher.addresses.begin(), teacher.addresses.end());
      if (teacher.dialect.model.empty()) teacher.dialect.model = teacher.name;
      TeacherState state{teacher.name, std::make_shared<TeacherDialect>(std::move(teacher.dialect)),
                         TeacherEndpoints(std::move(teacher.addresses), first, random())};
      if (options.metrics != nullptr) {
        state.latency = options.metrics->latency("codistill_worker_teacher_request_seconds",
                                                 "Time from a question to a teacher to its answer.",
                                                 {{"teacher", teacher.name}});
      }
      teachers_.push_back(std::move(state));
    }
    channel_ = options.channel != nullptr ? std::move(options.channel)
                                          : InferenceChannel::Create(addresses);
    sender_ = std::thread([this] { RunSender(); });
  }

  ~TeacherClientImpl() override {
    {
      MutexLock lock(&mu_);
      stopping_ = true;
      changed_.SignalAll();
    }
    sender_.join();
    channel_.reset();  // every callback has run
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
    PassOlderThan(batch);
    const std::shared_ptr<Entry> entry = FindOrAdd(batch);
    if (wait_ > absl::ZeroDuration() && !AllAnswered(*entry)) {
      TraceSpan span("wait", "wait for the teachers");
      span.Arg("step", batch.step);
      const absl::Time deadline = absl::Now() + wait_;
      while (!AllAnswered(*entry) && !stop_waiting_ && !entry->abandoned) {
        if (changed_.WaitWithDeadline(&mu_, deadline) || absl::Now() >= deadline) break;
      }
    }
    TeacherPredictions predictions;
    std::vector<std::string> missing;
    int64_t answered_at = batch.step;
    for (size_t i = 0; i < teachers_.size(); ++i) {
      Question& question = entry->questions[i];
      if (!question.answered) {
        missing.push_back(teachers_[i].name);
        continue;
      }
      if (question.top_k.empty()) {
        predictions.logits.push_back(std::move(question.logits));
      } else {
        predictions.top_k.push_back(std::move(question.top_k));
      }
      predictions.staleness_steps = std::max(predictions.staleness_steps, question.staleness_steps);
      answered_at = std::min(answered_at, question.answered_at_step);
    }
    predictions.prefetch_lag_steps = batch.step - answered_at;
    Pass(entry.get());
    RemovePassed();
    // What may be sent now, the sender sends: training goes on.
    changed_.SignalAll();
    if (!missing.empty() && config_.on_teacher_loss() == CodistillationConfig::FAIL &&
        !stop_waiting_) {
      return MissingPredictions(batch.step, missing, wait_, last_error_);
    }
    return predictions;
  }

  void Reset() override {
    MutexLock lock(&mu_);
    for (const auto& entry : entries_) Abandon(entry.get());
    entries_.clear();
    for (TeacherState& teacher : teachers_) teacher.chain.Reset();
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
    Counters counters;
    for (const TeacherState& teacher : teachers_) {
      counters.requests += teacher.counts.requests;
      counters.failures += teacher.counts.failures;
      counters.refused += teacher.counts.refused;
      counters.hedged += teacher.counts.hedged;
      counters.late += teacher.counts.late;
      counters.teachers.emplace_back(teacher.name, teacher.counts);
    }
    counters.outstanding = outstanding_;
    counters.last_error = last_error_;
    return counters;
  }

 private:
  static bool AllAnswered(const Entry& entry) {
    return std::all_of(entry.questions.begin(), entry.questions.end(),
                       [](const Question& q) { return q.answered; });
  }

  std::shared_ptr<Entry> FindOrAdd(const TeacherBatch& batch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    std::shared_ptr<Entry> entry = FindBatch(entries_, batch);
    if (entry != nullptr) return entry;
    entry = std::make_shared<Entry>();
    entry->batch = std::make_shared<TeacherBatch>(batch);
    entry->questions.resize(teachers_.size());
    entries_.push_back(entry);
    while (entries_.size() > static_cast<size_t>(config_.prefetch()) + kExtraBatches) {
      Abandon(entries_.front().get());
      entries_.pop_front();
    }
    const absl::Time now = absl::Now();
    for (size_t i = 0; i < teachers_.size(); ++i) Advance(i, now);
    // The sender may have slept until now with nothing to wait for.
    changed_.SignalAll();
    return entry;
  }

  // Sends what can be sent to teacher `index`, in batch order: first questions, repetitions,
  // hedges. Returns when to look again if nothing happens until then.
  absl::Time Advance(size_t index, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    absl::Time next = absl::InfiniteFuture();
    if (stopping_) return next;
    TeacherEndpoints& endpoints = teachers_[index].endpoints;
    for (const auto& entry : entries_) {
      Question& question = entry->questions[index];
      if (question.answered) continue;
      if (!question.in_flight()) {
        if (entry->passed) continue;
        const int server = endpoints.Choose(now);
        if (server < 0) return std::min(next, endpoints.NextAvailable());
        Send(index, entry, server);
      }
      if (question.attempts.size() == 1 && endpoints.size() > 1 &&
          hedge_after_ < absl::InfiniteDuration()) {
        const int first = question.attempts[0]->server;
        const absl::Time due = question.attempts[0]->sent + hedge_after_;
        const int other = due <= now ? endpoints.Choose(now, first) : -1;
        if (other >= 0) {
          Send(index, entry, other);
        } else {
          next = std::min(next, std::max(due, endpoints.NextAvailable(first)));
        }
      }
      // A recurrent teacher's next question needs this one's state.
      if (recurrent_) return next;
    }
    return next;
  }

  void Send(size_t index, const std::shared_ptr<Entry>& entry, int server)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    TeacherState& teacher = teachers_[index];
    InferenceQuestion question;
    question.dialect = teacher.dialect;
    question.config = model_;
    question.batch = entry->batch;
    question.max_staleness_steps = config_.max_staleness_steps();
    question.format = format_;
    if (recurrent_) question.states = teacher.chain.Before(*entry->batch);
    auto attempt = std::make_shared<Attempt>();
    attempt->server = server;
    attempt->sent = absl::Now();
    if (TraceRecorder::on()) attempt->traced_since = TraceNow();
    attempt->hedge = entry->questions[index].in_flight();
    entry->questions[index].attempts.push_back(attempt);
    teacher.endpoints.Sent(server);
    ++teacher.counts.requests;
    if (attempt->hedge) ++teacher.counts.hedged;
    ++outstanding_;
    attempt->call =
        channel_->Ask(teacher.endpoints.channel_index(server), std::move(question),
                      attempt->sent + absl::Milliseconds(config_.request_timeout_ms()),
                      [this, index, entry, attempt](absl::StatusOr<InferenceAnswer> answer) {
                        OnAnswer(index, entry, attempt, std::move(answer));
                      });
  }

  static void TraceAttempt(const TeacherState& teacher, const Entry& entry, const Attempt& attempt,
                           bool answered) {
    TraceEvent event;
    event.category = "teacher";
    event.name = answered ? "teacher request" : "teacher request without an answer";
    event.track = "teachers";
    event.begin_ns = attempt.traced_since;
    event.duration_ns = TraceNow() - attempt.traced_since;
    event.AddArg("step", entry.batch->step);
    event.AddArg("examples", entry.batch->examples);
    event.AddArg("server", attempt.server);
    event.SetText("teacher", teacher.name);
    TraceRecorder::Global().Record(event);
  }

  // On the channel's thread.
  void OnAnswer(size_t index, const std::shared_ptr<Entry>& entry,
                const std::shared_ptr<Attempt>& attempt, absl::StatusOr<InferenceAnswer> answer) {
    MutexLock lock(&mu_);
    const absl::Time now = absl::Now();
    TeacherState& teacher = teachers_[index];
    Question& question = entry->questions[index];
    attempt->call = nullptr;
    if (attempt->traced_since > 0) TraceAttempt(teacher, *entry, *attempt, answer.ok());
    question.attempts.erase(
        std::remove(question.attempts.begin(), question.attempts.end(), attempt),
        question.attempts.end());
    --outstanding_;
    if (answer.ok() && teacher.latency != nullptr) {
      teacher.latency->Observe(absl::ToDoubleSeconds(now - attempt->sent));
    }
    bool restarts = false;
    if (answer.ok()) answer = Believable(index, *attempt, *std::move(answer), &restarts);
    if (answer.ok()) {
      teacher.endpoints.Answered(attempt->server, now - attempt->sent, now);
      if (restarts && recurrent_) {
        RestartChain(index);
      } else if (!attempt->cancelled) {
        Accept(&teacher, entry.get(), &question, *std::move(answer));
      }
    } else if (attempt->cancelled) {
      // What we cancelled ourselves is no failure of the server.
      teacher.endpoints.GivenUp(attempt->server, now - attempt->sent, now);
    } else {
      Fail(&teacher, attempt->server, answer.status(), now);
    }
    RemovePassed();
    Advance(index, now);
    changed_.SignalAll();
  }

  // The answer, or why it cannot be used. `restarts`: it is the first of another generation, and
  // there were answers of the one before.
  absl::StatusOr<InferenceAnswer> Believable(size_t index, const Attempt& attempt,
                                             InferenceAnswer answer, bool* restarts)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (answer.staleness_steps() > config_.max_staleness_steps()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "answered by step ", answer.step, " when its group was at ", answer.latest_step,
          "; at most ", config_.max_staleness_steps(), " steps are allowed"));
    }
    if (!FollowGeneration(index, attempt, answer.generation, restarts)) {
      return absl::FailedPreconditionError(
          absl::StrCat("answered from generation ", answer.generation,
                       " of its group, which is in ", teachers_[index].generation));
    }
    return answer;
  }

  // A server answers from `generation` of the teacher's group. What was predicted in another one is
  // not used: its steps are no longer the group's. False: it is this answer that is of the past.
  // `dropped`: whether there were predictions of another one.
  bool FollowGeneration(size_t index, const Attempt& attempt, uint64_t generation, bool* dropped)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (generation == 0) return true;
    TeacherState& teacher = teachers_[index];
    // A server that changes over knows best, even where numbers begin anew; but its answers may
    // overtake one another, so that it goes back only in answer to what it was asked since. One
    // that is heard for the first time may lag behind the others.
    const int server = attempt.server;
    const uint64_t before = teacher.endpoints.generation(server);
    if (generation < before && attempt.sent <= teacher.endpoints.generation_since(server)) {
      return false;
    }
    const bool changed = before != 0 && before != generation;
    teacher.endpoints.set_generation(server, generation, absl::Now());
    if (generation == teacher.generation) return true;
    if (!changed && generation < teacher.generation) return false;
    teacher.generation = generation;
    for (const auto& entry : entries_) {
      Question& question = entry->questions[index];
      if (!question.answered || entry->passed || question.generation == generation) continue;
      Forget(&question);
      *dropped = true;
    }
    return true;
  }

  // An answered question, asked again.
  static void Forget(Question* question) {
    question->answered = false;
    question->logits = Tensor();
    question->top_k = TopKPrediction();
  }

  // Asks every batch that is still to come of a recurrent teacher again, in order and from zeros:
  // its chain stands behind those whose answers were dropped, and one gap is better than two.
  void RestartChain(size_t index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const auto& entry : entries_) {
      Question& question = entry->questions[index];
      Cancel(&question);
      if (!entry->passed) Forget(&question);
    }
    teachers_[index].chain.Reset();
  }

  void Accept(TeacherState* teacher, Entry* entry, Question* question, InferenceAnswer answer)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Cancel(question);  // the hedge, or what it was a hedge of
    question->answered = true;
    question->generation = answer.generation;
    question->staleness_steps = answer.staleness_steps();
    question->answered_at_step = current_step_.value_or(entry->batch->step);
    if (!entry->passed) {
      question->logits = std::move(answer.logits);
      question->top_k = std::move(answer.top_k);
    }
    if (recurrent_) teacher->chain.Set(*entry->batch, std::move(answer.states));
  }

  void Fail(TeacherState* teacher, int server, const absl::Status& status, absl::Time now)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    ++teacher->counts.failures;
    if (absl::IsResourceExhausted(status)) ++teacher->counts.refused;
    last_error_ = absl::StrCat("teacher ", teacher->name, " at ",
                               teacher->endpoints.address(server), ": ", status.ToString());
    if (teacher->endpoints.Failed(server, status, now)) LOG(WARNING) << last_error_;
  }

  // The batch's step is over: only a chained question may go on.
  void Pass(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (entry->passed) return;
    entry->passed = true;
    for (size_t i = 0; i < teachers_.size(); ++i) {
      Question& question = entry->questions[i];
      if (question.answered || !question.in_flight()) continue;
      ++teachers_[i].counts.late;
      if (!recurrent_) Cancel(&question);
    }
  }

  void PassOlderThan(const TeacherBatch& batch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const auto& entry : entries_) {
      if (entry->batch->generation != batch.generation) {
        Abandon(entry.get());
      } else if (entry->batch->step < batch.step) {
        Pass(entry.get());
      }
    }
    RemovePassed();
  }

  static void Abandon(Entry* entry) {
    entry->passed = true;
    entry->abandoned = true;
    for (Question& question : entry->questions) Cancel(&question);
  }

  // Cheap: gRPC tells the server and forgets the rest.
  static void Cancel(Question* question) {
    for (const auto& attempt : question->attempts) {
      attempt->cancelled = true;
      if (attempt->call != nullptr) attempt->call->Cancel();
    }
    question->attempts.clear();
  }

  // Forgets passed batches with nothing under way that somebody waits for.
  void RemovePassed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    entries_.erase(std::remove_if(entries_.begin(), entries_.end(),
                                  [this](const std::shared_ptr<Entry>& entry) {
                                    return entry->passed && !(recurrent_ && Chained(*entry));
                                  }),
                   entries_.end());
  }

  static bool Chained(const Entry& entry) {
    return !entry.abandoned && std::any_of(entry.questions.begin(), entry.questions.end(),
                                           [](const Question& q) { return q.in_flight(); });
  }

  // Sends what time makes due: repetitions when a back-off is over, hedges; and what a step that
  // was taken has made way for.
  void RunSender() {
    SetThreadName("teacher-questions");
    MutexLock lock(&mu_);
    while (!stopping_) {
      const absl::Time now = absl::Now();
      absl::Time next = absl::InfiniteFuture();
      for (size_t i = 0; i < teachers_.size(); ++i) next = std::min(next, Advance(i, now));
      if (next == absl::InfiniteFuture()) {
        changed_.Wait(&mu_);
      } else {
        changed_.WaitWithDeadline(&mu_, next);
      }
    }
  }

  const std::shared_ptr<const ModelConfig> model_;
  const CodistillationConfig config_;
  const AnswerFormat format_;
  const bool recurrent_;
  const absl::Duration wait_;
  const absl::Duration hedge_after_;
  std::unique_ptr<InferenceChannel> channel_;  // thread-safe
  // Lock order: before the channel's own lock.
  mutable Mutex mu_;
  CondVar changed_;  // an answer, a new batch, an end
  std::vector<TeacherState> teachers_ ABSL_GUARDED_BY(mu_);
  // In order of announcement.
  std::deque<std::shared_ptr<Entry>> entries_ ABSL_GUARDED_BY(mu_);
  std::optional<int64_t> current_step_ ABSL_GUARDED_BY(mu_);  // none since the (re)start
  int64_t outstanding_ ABSL_GUARDED_BY(mu_) = 0;
  std::string last_error_ ABSL_GUARDED_BY(mu_);
  bool stop_waiting_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread sender_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TeacherClient>> TeacherClient::Create(Options options) {
  if (options.teachers.empty()) return absl::InvalidArgumentError("no teachers");
  for (const Teacher& teacher : options.teachers) {
    if (teacher.addresses.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "teacher ", teacher.name, ": prediction_servers: at least one address is needed"));
    }
  }
  return std::make_unique<TeacherClientImpl>(std::move(options));
}

}  // namespace codistill
