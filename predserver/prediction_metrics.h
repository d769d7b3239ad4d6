#ifndef CODISTILL_PREDSERVER_PREDICTION_METRICS_H_
#define CODISTILL_PREDSERVER_PREDICTION_METRICS_H_

#include <cstdint>
#include <deque>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/metrics/metrics.h"
#include "common/model/followed_model.h"
#include "proto/control.pb.h"

namespace codistill {

// Counts what a prediction server does, for /metrics and for its status. Thread-safe.
class PredictionMetrics {
 public:
  // Nothing is owned; both outlive this object and every collection of `metrics`, which may be
  // null.
  PredictionMetrics(Metrics* metrics, const FollowedModel* followed);

  // One request has been answered with `status` at `now`, `latency` after it came.
  void Answered(const absl::Status& status, absl::Duration latency, absl::Time now);
  // One forward pass over `rows` examples.
  void Computed(int64_t rows);

  // Answers a second over the last few seconds before `now`.
  double Rate(absl::Time now) const;
  // Requests, failures, mean latency and swaps.
  void Fill(ServedModelStatus* status) const;

 private:
  // Refreshes what mirrors the followed model.
  void Collect();

  Metrics* const metrics_;
  const FollowedModel* const followed_;

  mutable Mutex mu_;
  int64_t requests_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t failures_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Duration total_latency_ ABSL_GUARDED_BY(mu_);
  int64_t swaps_told_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t bytes_told_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t failed_loads_told_ ABSL_GUARDED_BY(mu_) = 0;
  // (second, answers in it), oldest first, of the last few seconds.
  std::deque<std::pair<int64_t, int64_t>> recent_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_PREDICTION_METRICS_H_
