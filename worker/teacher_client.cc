#include "worker/teacher_client.h"

#include <algorithm>
#include <deque>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/base/random.h"
#include "common/config/schedule.h"
#include "common/config/teachers.h"
#include "glog/logging.h"

namespace codistill {
namespace {

constexpr absl::Duration kFirstBackoff = absl::Milliseconds(50);
constexpr absl::Duration kLongestBackoff = absl::Seconds(1);
// Batches kept beyond those the job prefetches: the one in hand, and chained ones whose step has
// passed.
constexpr int kExtraBatches = 8;

// Doubles with every failure in a row, with 20 % of jitter.
absl::Duration Backoff(uint64_t server, int failures) {
  const absl::Duration doubled = kFirstBackoff * (1 << std::min(failures - 1, 10));
  const double jitter = 0.8 + 0.4 * UniformDouble(Mix(server, failures));
  return std::min(doubled, kLongestBackoff) * jitter;
}

struct Server {
  int index = 0;  // in the channel
  std::string address;
  int outstanding = 0;
  int failures_in_row = 0;
  absl::Time not_before = absl::InfinitePast();  // after a failure
  uint64_t generation = 0;                       // of its last answer; 0 = none, or not told
};

// One batch's question to one teacher.
struct Question {
  enum State { kPending, kInFlight, kAnswered };
  State state = kPending;
  std::shared_ptr<InferenceChannel::Call> call;  // kInFlight
  Tensor logits;                                 // kAnswered
  uint64_t generation = 0;                       // of the teacher
  int64_t staleness_steps = 0;
  int64_t answered_at_step = 0;  // of the student
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
  std::vector<Server> servers;
  uint64_t generation = 0;  // its group's, as far as its servers have told
  // Recurrent state after (chain_generation, chain_step).
  std::vector<Tensor> chain_states;
  uint64_t chain_generation = 0;
  int64_t chain_step = -1;
  Metrics::Histogram* latency = nullptr;
};

class TeacherClientImpl : public TeacherClient {
 public:
  explicit TeacherClientImpl(Options options)
      : model_(std::make_shared<ModelConfig>(options.model)),
        config_(options.codistillation),
        recurrent_(options.model.states_size() > 0),
        wait_(Wait(options.codistillation)) {
    std::vector<std::string> addresses;
    for (const Teacher& teacher : options.teachers) {
      TeacherState state;
      state.name = teacher.name;
      for (const std::string& address : teacher.addresses) {
        Server server;
        server.index = static_cast<int>(addresses.size());
        server.address = address;
        state.servers.push_back(server);
        addresses.push_back(address);
      }
      if (options.metrics != nullptr) {
        state.latency = options.metrics->latency("codistill_worker_teacher_request_seconds",
                                                 "Time from a question to a teacher to its answer.",
                                                 {{"teacher", teacher.name}});
      }
      teachers_.push_back(std::move(state));
    }
    channel_ = options.channel != nullptr ? std::move(options.channel)
                                          : InferenceChannel::Create(addresses);
    retry_thread_ = std::thread([this] { RunRetries(); });
  }

  ~TeacherClientImpl() override {
    {
      MutexLock lock(&mu_);
      stopping_ = true;
      changed_.SignalAll();
    }
    retry_thread_.join();
    channel_.reset();  // every callback has run
  }

  void Request(const TeacherBatch& batch) override {
    MutexLock lock(&mu_);
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
    const absl::Time deadline = absl::Now() + wait_;
    while (!AllAnswered(*entry) && !stop_waiting_ && !entry->abandoned) {
      if (changed_.WaitWithDeadline(&mu_, deadline) || absl::Now() >= deadline) break;
    }
    TeacherPredictions predictions;
    std::vector<std::string> missing;
    int64_t answered_at = batch.step;
    for (size_t i = 0; i < teachers_.size(); ++i) {
      Question& question = entry->questions[i];
      if (question.state != Question::kAnswered) {
        missing.push_back(teachers_[i].name);
        continue;
      }
      predictions.logits.push_back(std::move(question.logits));
      predictions.staleness_steps = std::max(predictions.staleness_steps, question.staleness_steps);
      answered_at = std::min(answered_at, question.answered_at_step);
    }
    predictions.prefetch_lag_steps = batch.step - answered_at;
    Pass(entry);
    if (!missing.empty() && config_.on_teacher_loss() == CodistillationConfig::FAIL &&
        !stop_waiting_) {
      return absl::UnavailableError(absl::StrCat(
          "codistillation.on_teacher_loss is FAIL, and at step ", batch.step,
          " there were no predictions of ", absl::StrJoin(missing, ", "), " after ",
          absl::FormatDuration(wait_),
          counters_.last_error.empty() ? ""
                                       : absl::StrCat("; last error: ", counters_.last_error)));
    }
    return predictions;
  }

  void Reset() override {
    MutexLock lock(&mu_);
    for (const auto& entry : entries_) Abandon(entry.get());
    entries_.clear();
    for (TeacherState& teacher : teachers_) {
      teacher.chain_states.clear();
      teacher.chain_step = -1;
    }
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
  static absl::Duration Wait(const CodistillationConfig& config) {
    return absl::Milliseconds(TeacherWaitMs(config));
  }

  static bool AllAnswered(const Entry& entry) {
    return std::all_of(entry.questions.begin(), entry.questions.end(),
                       [](const Question& q) { return q.state == Question::kAnswered; });
  }

  std::shared_ptr<Entry> FindOrAdd(const TeacherBatch& batch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const auto& entry : entries_) {
      if (!entry->passed && entry->batch->SameAs(batch)) return entry;
    }
    auto entry = std::make_shared<Entry>();
    entry->batch = std::make_shared<TeacherBatch>(batch);
    entry->questions.resize(teachers_.size());
    entries_.push_back(entry);
    while (entries_.size() > static_cast<size_t>(config_.prefetch() + kExtraBatches)) {
      Abandon(entries_.front().get());
      entries_.pop_front();
    }
    for (size_t i = 0; i < teachers_.size(); ++i) Advance(i);
    // The retry thread may have slept until now with nothing to wait for.
    changed_.SignalAll();
    return entry;
  }

  // Sends what can be sent to teacher `index`, in batch order.
  void Advance(size_t index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (stopping_) return;
    TeacherState& teacher = teachers_[index];
    for (const auto& entry : entries_) {
      Question& question = entry->questions[index];
      if (question.state == Question::kAnswered) continue;
      if (question.state == Question::kPending && !entry->passed) {
        Server* server = ChooseServer(&teacher);
        if (server == nullptr) return;
        Send(index, entry, server);
      }
      // A recurrent teacher's next question needs this one's state.
      if (recurrent_ && question.state == Question::kInFlight) return;
    }
  }

  // The one with the fewest questions under way among those not backing off; null if all are.
  Server* ChooseServer(TeacherState* teacher) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const absl::Time now = absl::Now();
    Server* best = nullptr;
    for (Server& server : teacher->servers) {
      if (server.not_before > now) continue;
      if (best == nullptr || server.outstanding < best->outstanding) best = &server;
    }
    return best;
  }

  void Send(size_t index, const std::shared_ptr<Entry>& entry, Server* server)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const TeacherState& teacher = teachers_[index];
    InferenceQuestion question;
    question.model = teacher.name;
    question.config = model_;
    question.batch = entry->batch;
    question.max_staleness_steps = config_.max_staleness_steps();
    if (recurrent_ && !entry->batch->starts_epoch &&
        teacher.chain_generation == entry->batch->generation &&
        teacher.chain_step + 1 == entry->batch->step) {
      question.states = teacher.chain_states;
    }
    ++server->outstanding;
    ++counters_.requests;
    ++counters_.outstanding;
    const absl::Time sent = absl::Now();
    Question& mine = entry->questions[index];
    mine.state = Question::kInFlight;
    mine.call = channel_->Ask(
        server->index, std::move(question), sent + absl::Milliseconds(config_.request_timeout_ms()),
        [this, index, entry, server, sent](absl::StatusOr<InferenceAnswer> answer) {
          OnAnswer(index, entry, server, sent, std::move(answer));
        });
  }

  // On the channel's thread.
  void OnAnswer(size_t index, const std::shared_ptr<Entry>& entry, Server* server, absl::Time sent,
                absl::StatusOr<InferenceAnswer> answer) {
    MutexLock lock(&mu_);
    TeacherState& teacher = teachers_[index];
    Question& question = entry->questions[index];
    question.call = nullptr;
    question.state = Question::kPending;
    --server->outstanding;
    --counters_.outstanding;
    const bool unwanted = entry->abandoned || (entry->passed && !recurrent_);
    if (answer.ok()) {
      if (teacher.latency != nullptr) {
        teacher.latency->Observe(absl::ToDoubleSeconds(absl::Now() - sent));
      }
      if (answer->staleness_steps() > config_.max_staleness_steps()) {
        answer = absl::FailedPreconditionError(absl::StrCat(
            "answered by step ", answer->step, " when its group was at ", answer->latest_step,
            "; at most ", config_.max_staleness_steps(), " steps are allowed"));
      } else if (!FollowGeneration(index, server, answer->generation)) {
        answer = absl::FailedPreconditionError(
            absl::StrCat("answered from generation ", answer->generation,
                         " of its group, which is in ", teacher.generation));
      }
    }
    if (answer.ok()) {
      server->failures_in_row = 0;
      server->not_before = absl::InfinitePast();
      if (!entry->abandoned) Accept(&teacher, entry.get(), &question, *std::move(answer));
    } else if (!unwanted) {
      // What we cancelled ourselves is no failure of the server.
      Fail(teacher, server, answer.status());
    }
    RemovePassed();
    Advance(index);
    changed_.SignalAll();
  }

  // A server answers from `generation` of the teacher's group. What was predicted in another one is
  // not used: its steps are no longer the group's. False: it is this answer that is of the past.
  bool FollowGeneration(size_t index, Server* server, uint64_t generation)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (generation == 0) return true;
    TeacherState& teacher = teachers_[index];
    // A server that changes over knows best, even where numbers begin anew; one that is heard for
    // the first time may lag behind the others.
    const bool changed = server->generation != 0 && server->generation != generation;
    server->generation = generation;
    if (!changed && generation <= teacher.generation) return generation == teacher.generation;
    if (generation == teacher.generation) return true;
    teacher.generation = generation;
    for (const auto& entry : entries_) {
      Question& question = entry->questions[index];
      if (question.state != Question::kAnswered || entry->passed ||
          question.generation == generation) {
        continue;
      }
      question.state = Question::kPending;  // asked again
      question.logits = Tensor();
    }
    return true;
  }

  void Accept(TeacherState* teacher, Entry* entry, Question* question, InferenceAnswer answer)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    question->state = Question::kAnswered;
    question->generation = answer.generation;
    question->staleness_steps = answer.staleness_steps();
    question->answered_at_step = current_step_;
    if (!entry->passed) question->logits = std::move(answer.logits);
    if (recurrent_) {
      teacher->chain_states = std::move(answer.states);
      teacher->chain_generation = entry->batch->generation;
      teacher->chain_step = entry->batch->step;
    }
  }

  void Fail(const TeacherState& teacher, Server* server, const absl::Status& status)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    ++counters_.failures;
    ++server->failures_in_row;
    server->not_before = absl::Now() + Backoff(server->index, server->failures_in_row);
    counters_.last_error =
        absl::StrCat("teacher ", teacher.name, " at ", server->address, ": ", status.ToString());
    LOG_IF(WARNING, server->failures_in_row == 1) << counters_.last_error;
  }

  // The batch's step is over: only a chained question may go on.
  void Pass(const std::shared_ptr<Entry>& entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    entry->passed = true;
    if (!recurrent_) Cancel(entry.get());
    RemovePassed();
    for (size_t i = 0; i < teachers_.size(); ++i) Advance(i);
  }

  void PassOlderThan(const TeacherBatch& batch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const auto& entry : entries_) {
      if (entry->batch->generation != batch.generation) Abandon(entry.get());
      if (entry->batch->step < batch.step && !entry->passed) {
        entry->passed = true;
        if (!recurrent_) Cancel(entry.get());
      }
    }
    RemovePassed();
  }

  void Abandon(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    entry->passed = true;
    entry->abandoned = true;
    Cancel(entry);
  }

  void Cancel(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (Question& question : entry->questions) {
      if (question.call != nullptr) question.call->Cancel();
    }
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
    return !entry.abandoned &&
           std::any_of(entry.questions.begin(), entry.questions.end(),
                       [](const Question& q) { return q.state == Question::kInFlight; });
  }

  // Sends again what failed, when its servers' back-off is over.
  void RunRetries() {
    SetThreadName("teacher-retries");
    MutexLock lock(&mu_);
    while (!stopping_) {
      const absl::Time next = NextRetry();
      if (next == absl::InfiniteFuture()) {
        changed_.Wait(&mu_);
      } else {
        changed_.WaitWithDeadline(&mu_, next);
      }
      for (size_t i = 0; i < teachers_.size(); ++i) Advance(i);
    }
  }

  // When the first server comes out of its back-off that a pending question waits for.
  absl::Time NextRetry() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    absl::Time next = absl::InfiniteFuture();
    for (size_t i = 0; i < teachers_.size(); ++i) {
      bool pending = false, chain_busy = false;
      for (const auto& entry : entries_) {
        const Question::State state = entry->questions[i].state;
        pending |= state == Question::kPending && !entry->passed;
        chain_busy |= recurrent_ && state == Question::kInFlight;
      }
      // Behind a busy chain there is nothing to send until its answer comes.
      if (!pending || chain_busy) continue;
      for (const Server& server : teachers_[i].servers) {
        if (server.failures_in_row > 0) next = std::min(next, server.not_before);
      }
    }
    return next;
  }

  const std::shared_ptr<const ModelConfig> model_;
  const CodistillationConfig config_;
  const bool recurrent_;
  const absl::Duration wait_;
  std::unique_ptr<InferenceChannel> channel_;  // thread-safe
  // Lock order: before the channel's own lock.
  mutable Mutex mu_;
  CondVar changed_;  // an answer, a new batch, an end
  std::vector<TeacherState> teachers_ ABSL_GUARDED_BY(mu_);
  // In order of announcement.
  std::deque<std::shared_ptr<Entry>> entries_ ABSL_GUARDED_BY(mu_);
  int64_t current_step_ ABSL_GUARDED_BY(mu_) = 0;
  bool stop_waiting_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  Counters counters_ ABSL_GUARDED_BY(mu_);
  std::thread retry_thread_;
};

}  // namespace

std::vector<TeacherClient::Teacher> TeacherClient::TeachersInJob(const JobConfig& job, int group) {
  std::vector<Teacher> teachers;
  for (const TeacherRef& ref : TeachersOf(job, group)) {
    Teacher teacher;
    teacher.name = ref.name;
    for (const Endpoint& endpoint : PredictionServersOf(job, ref)) {
      teacher.addresses.push_back(endpoint.address());
    }
    teachers.push_back(std::move(teacher));
  }
  return teachers;
}

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
