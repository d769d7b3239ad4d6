#ifndef CODISTILL_PREDSERVER_PREDICTION_METRICS_H_
#define CODISTILL_PREDSERVER_PREDICTION_METRICS_H_

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/metrics/metrics.h"
#include "common/model/followed_model.h"
#include "predserver/model_statistics.h"
#include "proto/control.pb.h"

namespace codistill {

// Counts what one model of a prediction server does: for /metrics, labelled with the model's name,
// for the server's status and for ModelStatistics. Thread-safe.
class PredictionMetrics {
 public:
  // What is so now.
  struct Now {
    int64_t queued = 0;  // requests
    int64_t cache_bytes = 0;
  };
  struct Options {
    std::string model;
    Metrics* metrics = nullptr;  // may be null
    const FollowedModel* followed = nullptr;
    std::function<Now()> now;
  };
  // Nothing is owned. All, and this object, outlive every collection of `metrics`.
  explicit PredictionMetrics(Options options);

  // One request has been answered with `status` at `now`, `latency` after it came.
  void Answered(const absl::Status& status, absl::Duration latency, absl::Time now);

  // One forward pass.
  struct Pass {
    int64_t requests = 0;
    int64_t examples = 0;
    absl::Duration queued;  // by all its requests together
    absl::Duration input;   // putting the batch together
    absl::Duration infer;
    absl::Duration output;
  };
  void Computed(const Pass& pass, absl::Time now);

  // Examples of one request that the cache had / had not, and what finding out took.
  void LookedUp(int64_t hits, int64_t misses, absl::Duration took);

  ModelStatistics statistics() const;
  // Answers a second over the last few seconds before `now`.
  double Rate(absl::Time now) const;
  // All but the model's name, versions and newest step.
  void Fill(ServedModelStatus* status) const;

 private:
  Metrics::Counter* Answers(absl::StatusCode code);
  // Refreshes what mirrors other state.
  void Collect();

  const Options options_;
  const Metrics::Labels labels_;
  // Null without metrics.
  Metrics::Histogram* latency_ = nullptr;
  Metrics::Histogram* queue_ = nullptr;
  Metrics::Histogram* infer_ = nullptr;
  Metrics::Histogram* batch_ = nullptr;
  Metrics::Counter* batches_ = nullptr;
  Metrics::Counter* examples_ = nullptr;
  Metrics::Counter* hits_ = nullptr;
  Metrics::Counter* misses_ = nullptr;

  mutable Mutex mu_;
  ModelStatistics statistics_ ABSL_GUARDED_BY(mu_);
  // By code, as they are met.
  std::array<Metrics::Counter*, 17> answers_ ABSL_GUARDED_BY(mu_) = {};
  FollowedModel::Counters told_ ABSL_GUARDED_BY(mu_);
  // (second, answers in it), oldest first, of the last few seconds.
  std::deque<std::pair<int64_t, int64_t>> recent_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_PREDICTION_METRICS_H_
