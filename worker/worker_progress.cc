#include "worker/worker_progress.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace codistill {
namespace {

// Rates are means over about so long.
constexpr absl::Duration kRateWindow = absl::Seconds(5);
// Points of the rate's history are at least so far apart.
constexpr absl::Duration kRateInterval = absl::Milliseconds(100);

constexpr const char* kActivityNames[] = {"assignment", "pull", "teacher", "compute", "push"};

// Metric labels are lower-case words.
const char* OutcomeName(PushOutcome outcome) {
  switch (outcome) {
    case APPLIED:
      return "applied";
    case DUPLICATE:
      return "duplicate";
    case DROPPED_LATE:
      return "dropped_late";
    case TOO_STALE:
      return "too_stale";
    case REJECTED:
      return "rejected";
    default:
      return "lost";
  }
}

}  // namespace

WorkerProgress::WorkerProgress(Metrics* metrics, Clock* clock) : clock_(clock), metrics_(metrics) {
  history_.emplace_back(clock_->Now(), 0);
  if (metrics == nullptr) return;
  for (int i = 0; i < kActivities; ++i) {
    seconds_[i] = metrics->counter("codistill_worker_seconds_total",
                                   "Time of the training thread, by what it went into.",
                                   {{"activity", kActivityNames[i]}});
  }
  steps_ = metrics->counter("codistill_worker_steps_total", "Pushes that were applied.");
  examples_ = metrics->counter("codistill_worker_examples_total", "Examples in applied pushes.");
  push_bytes_ = metrics->counter("codistill_worker_push_bytes_total", "Bytes sent to shards.");
  pull_bytes_ = metrics->counter("codistill_worker_pull_bytes_total", "Bytes read from shards.");
  teacher_used_ = metrics->counter("codistill_worker_teacher_used_steps_total",
                                   "Steps whose loss had teacher predictions in it.");
  teacher_skipped_ = metrics->counter("codistill_worker_teacher_skipped_steps_total",
                                      "Steps after burn-in that went on without predictions.");
  teacher_requests_ = metrics->counter("codistill_worker_teacher_requests_total",
                                       "Questions sent to teachers, repetitions included.");
  teacher_failures_ =
      metrics->counter("codistill_worker_teacher_failures_total", "Questions that failed.");
  teacher_refused_ = metrics->counter("codistill_worker_teacher_refused_total",
                                      "Of those, by servers that were busy.");
  teacher_hedged_ =
      metrics->counter("codistill_worker_teacher_hedged_total",
                       "Questions asked of another server too, for the first one was slow.");
  teacher_late_ =
      metrics->counter("codistill_worker_teacher_late_total",
                       "Questions that were under way when their step was computed without them.");
  label_loss_ = metrics->gauge("codistill_worker_label_loss", "Of the last step, nats a label.");
  teacher_loss_ =
      metrics->gauge("codistill_worker_teacher_loss", "Of the last step with predictions.");
  staleness_ =
      metrics->gauge("codistill_worker_teacher_staleness_steps",
                     "Of the last predictions used: how far behind its group the teacher was.");
  current_step_ = metrics->gauge("codistill_worker_step", "Newest step that was decided.");
}

void WorkerProgress::SetState(const std::string& state, const std::string& detail) {
  MutexLock lock(&mu_);
  state_ = state;
  detail_ = detail;
}

void WorkerProgress::SetGeneration(uint64_t generation) {
  MutexLock lock(&mu_);
  generation_ = generation;
}

void WorkerProgress::AddTime(Activity activity, absl::Duration time) {
  const double seconds = absl::ToDoubleSeconds(time);
  if (seconds_[activity] != nullptr) seconds_[activity]->Add(seconds);
  MutexLock lock(&mu_);
  if (activity == kCompute) {
    counters_.set_compute_seconds(counters_.compute_seconds() + seconds);
  } else {
    counters_.set_wait_seconds(counters_.wait_seconds() + seconds);
  }
}

void WorkerProgress::AddPulled(uint64_t bytes) {
  if (pull_bytes_ != nullptr) pull_bytes_->Add(static_cast<double>(bytes));
  MutexLock lock(&mu_);
  counters_.set_pull_bytes(counters_.pull_bytes() + bytes);
}

void WorkerProgress::SetTeachers(const TeacherSource::Counters& teachers) {
  MutexLock lock(&mu_);
  WorkerCounters& c = counters_;
  // Counters only grow: one that is smaller is of a snapshot taken before the last one, by another
  // thread, which says nothing new.
  if (teachers.requests < c.teacher_requests() || teachers.failures < c.teacher_failures() ||
      teachers.refused < refused_so_far_ || teachers.hedged < c.teacher_hedged() ||
      teachers.late < c.teacher_late()) {
    return;
  }
  if (teacher_requests_ != nullptr) {
    teacher_requests_->Add(static_cast<double>(teachers.requests - c.teacher_requests()));
    teacher_failures_->Add(static_cast<double>(teachers.failures - c.teacher_failures()));
    teacher_refused_->Add(static_cast<double>(teachers.refused - refused_so_far_));
    teacher_hedged_->Add(static_cast<double>(teachers.hedged - c.teacher_hedged()));
    teacher_late_->Add(static_cast<double>(teachers.late - c.teacher_late()));
  }
  refused_so_far_ = teachers.refused;
  c.set_teacher_requests(teachers.requests);
  c.set_teacher_failures(teachers.failures);
  c.set_teacher_hedged(teachers.hedged);
  c.set_teacher_late(teachers.late);
  c.clear_teachers();
  for (const auto& [name, counts] : teachers.teachers) {
    TeacherCounters* teacher = c.add_teachers();
    teacher->set_name(name);
    teacher->set_requests(counts.requests);
    teacher->set_failures(counts.failures);
    teacher->set_refused(counts.refused);
    teacher->set_hedged(counts.hedged);
    teacher->set_late(counts.late);
  }
}

void WorkerProgress::StepDone(const StepReport& report) {
  const bool applied = report.outcome == APPLIED || report.outcome == DUPLICATE;
  {
    MutexLock lock(&mu_);
    WorkerCounters& c = counters_;
    step_ = report.step;
    c.set_push_bytes(c.push_bytes() + report.push_bytes);
    if (applied) {
      c.set_steps(c.steps() + 1);
      c.set_examples(c.examples() + report.examples);
      if (report.outcome == DUPLICATE) c.set_pushes_duplicate(c.pushes_duplicate() + 1);
    } else if (report.outcome == PUSH_OUTCOME_INVALID) {
      c.set_pushes_lost(c.pushes_lost() + 1);
    } else if (report.outcome == REJECTED) {
      c.set_pushes_rejected(c.pushes_rejected() + 1);
    } else if (report.outcome == TOO_STALE) {
      c.set_pushes_too_stale(c.pushes_too_stale() + 1);
    } else {
      c.set_pushes_dropped(c.pushes_dropped() + 1);
    }
    if (report.used_teacher) {
      c.set_teacher_used_steps(c.teacher_used_steps() + 1);
      if (c.first_step_used() == 0) c.set_first_step_used(report.step);
      c.set_max_staleness_steps(std::max(c.max_staleness_steps(), report.staleness_steps));
      c.set_sum_staleness_steps(c.sum_staleness_steps() + report.staleness_steps);
      c.set_sum_prefetch_lag_steps(c.sum_prefetch_lag_steps() + report.prefetch_lag_steps);
    } else if (report.wanted_teacher) {
      c.set_teacher_skipped_steps(c.teacher_skipped_steps() + 1);
    }
    const absl::Time now = clock_->Now();
    if (now - history_.back().first >= kRateInterval) {
      history_.emplace_back(now, c.examples());
      while (history_.size() > 2 && now - history_[1].first >= kRateWindow) history_.pop_front();
    }
  }
  if (metrics_ == nullptr) return;
  metrics_
      ->counter("codistill_worker_pushes_total", "Pushes, by what was decided about them.",
                {{"outcome", OutcomeName(report.outcome)}})
      ->Add();
  if (applied) {
    steps_->Add();
    examples_->Add(static_cast<double>(report.examples));
  }
  push_bytes_->Add(static_cast<double>(report.push_bytes));
  label_loss_->Set(report.label_loss);
  current_step_->Set(static_cast<double>(report.step));
  if (report.used_teacher) {
    teacher_used_->Add();
    teacher_loss_->Set(report.teacher_loss);
    staleness_->Set(static_cast<double>(report.staleness_steps));
  } else if (report.wanted_teacher) {
    teacher_skipped_->Add();
  }
}

double WorkerProgress::ExamplesPerSecond() const {
  // Up to now, not to the last point: the rate of a worker that waits falls.
  const double seconds = absl::ToDoubleSeconds(clock_->Now() - history_.front().first);
  return seconds > 0 ? (counters_.examples() - history_.front().second) / seconds : 0;
}

void WorkerProgress::PushLost() {
  {
    MutexLock lock(&mu_);
    counters_.set_pushes_lost(counters_.pushes_lost() + 1);
  }
  if (metrics_ == nullptr) return;
  metrics_
      ->counter("codistill_worker_pushes_total", "Pushes, by what was decided about them.",
                {{"outcome", OutcomeName(PUSH_OUTCOME_INVALID)}})
      ->Add();
}

void WorkerProgress::StepSkipped() {
  MutexLock lock(&mu_);
  counters_.set_steps_skipped(counters_.steps_skipped() + 1);
}

WorkerCounters WorkerProgress::counters() const {
  MutexLock lock(&mu_);
  WorkerCounters counters = counters_;
  counters.set_examples_per_second(ExamplesPerSecond());
  return counters;
}

std::string WorkerProgress::state() const {
  MutexLock lock(&mu_);
  return state_;
}

std::string WorkerProgress::description() const {
  MutexLock lock(&mu_);
  return detail_.empty() ? state_ : absl::StrCat(state_, " ", detail_);
}

void WorkerProgress::FillStatus(DaemonStatus* status) const {
  MutexLock lock(&mu_);
  status->set_state(state_);
  status->set_detail(detail_);
  status->set_step(step_);
  status->set_generation(generation_);
  status->set_rate(ExamplesPerSecond());
  status->set_rate_unit("examples/s");
  *status->mutable_worker() = counters_;
  status->mutable_worker()->set_examples_per_second(status->rate());
}

}  // namespace codistill
