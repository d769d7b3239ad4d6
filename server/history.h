#ifndef CODISTILL_SERVER_HISTORY_H_
#define CODISTILL_SERVER_HISTORY_H_

#include <cstdint>

#include "proto/parameter_server.pb.h"
#include "server/step_collector.h"

namespace codistill {

// The curves of a group: training losses averaged over windows of steps, and evaluations. Bounded:
// when there are more than kMaxPoints training points, neighbours are merged in pairs. Goes into
// every checkpoint, so that curves roll back with the weights. Not thread-safe.
class History {
 public:
  static constexpr int kMaxPoints = 4000;

  explicit History(int64_t window_steps) : window_steps_(window_steps < 1 ? 1 : window_steps) {}

  // A committed step, in order; `seconds` of training up to its commit. A point is made at every
  // multiple of the window and where `last`.
  void AddStep(int64_t step, const StepStatistics& statistics, double learning_rate, double seconds,
               bool last);

  // Replaces one of the same version.
  void AddEvaluation(const EvaluationResult& result);

  // Copies the curves into `training` and `evaluations`.
  void Fill(GetHistoryReply* reply) const;
  // Goes back to curves that Fill made, which end at `step`; training goes on at `seconds`.
  // Evaluations come some time after their step: those made since of steps up to `step` stay.
  void Reset(const GetHistoryReply& saved, int64_t step, double seconds);
  // A pause that belongs to no window: rates count from `seconds` on.
  void SkipTo(double seconds) { window_begin_seconds_ = seconds; }

  int points() const { return curves_.training_size(); }

 private:
  void Thin();

  const int64_t window_steps_;
  GetHistoryReply curves_;  // training and evaluations only
  StepStatistics window_;
  double window_begin_seconds_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_HISTORY_H_
