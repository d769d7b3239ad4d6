#ifndef CODISTILL_WORKER_WORKER_PROGRESS_H_
#define CODISTILL_WORKER_WORKER_PROGRESS_H_

#include <array>
#include <cstdint>
#include <deque>
#include <string>
#include <utility>

#include "absl/time/time.h"
#include "common/base/clock.h"
#include "common/base/mutex.h"
#include "common/metrics/metrics.h"
#include "proto/control.pb.h"
#include "proto/parameter_server.pb.h"
#include "worker/teacher_source.h"

namespace codistill {

// What one process of a worker has done so far and is doing now: written by the training thread,
// read by heartbeats, status pages and metrics. Thread-safe.
class WorkerProgress {
 public:
  // What a worker's time goes into.
  enum Activity { kAssignment, kPull, kTeacher, kCompute, kPush, kActivities };

  struct StepReport {
    int64_t step = 0;
    PushOutcome outcome = PUSH_OUTCOME_INVALID;
    int64_t examples = 0;
    uint64_t push_bytes = 0;
    double label_loss = 0;  // nats a label
    // The step's weight of psi was above 0.
    bool wanted_teacher = false;
    bool used_teacher = false;
    double teacher_loss = 0;
    int64_t staleness_steps = 0;
    int64_t prefetch_lag_steps = 0;
  };

  // `metrics` (optional) and `clock` are not owned.
  explicit WorkerProgress(Metrics* metrics, Clock* clock = Clock::Real());

  // One word, and for people the rest of the line that it begins ("waiting", "for the next step").
  void SetState(const std::string& state, const std::string& detail = "");
  void SetGeneration(uint64_t generation);
  void AddTime(Activity activity, absl::Duration time);
  void AddPulled(uint64_t bytes);
  // Snapshots of one source; one that is older than the last is left out.
  void SetTeachers(const TeacherSource::Counters& teachers);
  // The decision about a push has come.
  void StepDone(const StepReport& report);
  // A push was begun, and no answer came.
  void PushLost();
  // A step was decided before it was begun here.
  void StepSkipped();

  WorkerCounters counters() const;
  std::string state() const;
  // State and detail in one line.
  std::string description() const;
  // state, detail, step, generation, rate and worker.
  void FillStatus(DaemonStatus* status) const;

 private:
  struct Handles;

  double ExamplesPerSecond() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  Clock* const clock_;
  mutable Mutex mu_;
  WorkerCounters counters_ ABSL_GUARDED_BY(mu_);
  int64_t refused_so_far_ ABSL_GUARDED_BY(mu_) = 0;  // by teachers
  std::string state_ ABSL_GUARDED_BY(mu_) = "starting";
  std::string detail_ ABSL_GUARDED_BY(mu_);
  int64_t step_ ABSL_GUARDED_BY(mu_) = 0;  // newest decided
  uint64_t generation_ ABSL_GUARDED_BY(mu_) = 0;
  // (time, examples so far), over the last few seconds.
  std::deque<std::pair<absl::Time, int64_t>> history_ ABSL_GUARDED_BY(mu_);
  // Null without metrics.
  std::array<Metrics::Counter*, kActivities> seconds_{};
  Metrics::Counter* steps_ = nullptr;
  Metrics::Counter* examples_ = nullptr;
  Metrics::Counter* push_bytes_ = nullptr;
  Metrics::Counter* pull_bytes_ = nullptr;
  Metrics::Counter* teacher_used_ = nullptr;
  Metrics::Counter* teacher_skipped_ = nullptr;
  Metrics::Gauge* label_loss_ = nullptr;
  Metrics::Gauge* teacher_loss_ = nullptr;
  Metrics::Gauge* staleness_ = nullptr;
  Metrics::Gauge* current_step_ = nullptr;
  Metrics::Counter* teacher_requests_ = nullptr;
  Metrics::Counter* teacher_failures_ = nullptr;
  Metrics::Counter* teacher_refused_ = nullptr;
  Metrics::Counter* teacher_hedged_ = nullptr;
  Metrics::Counter* teacher_late_ = nullptr;
  Metrics* const metrics_;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_WORKER_PROGRESS_H_
