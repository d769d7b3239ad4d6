#include "predserver/prediction_metrics.h"

#include <algorithm>
#include <string>

namespace codistill {
namespace {

constexpr int64_t kRateSeconds = 5;

}  // namespace

PredictionMetrics::PredictionMetrics(Metrics* metrics, const FollowedModel* followed)
    : metrics_(metrics), followed_(followed) {
  if (metrics_ != nullptr) metrics_->OnCollect([this] { Collect(); });
}

void PredictionMetrics::Answered(const absl::Status& status, absl::Duration latency,
                                 absl::Time now) {
  if (metrics_ != nullptr) {
    metrics_
        ->counter("codistill_prediction_requests_total", "Requests answered, by status code.",
                  {{"code", absl::StatusCodeToString(status.code())}})
        ->Add();
    metrics_
        ->latency("codistill_prediction_latency_seconds",
                  "From a request's arrival to its answer, waiting included.")
        ->Observe(absl::ToDoubleSeconds(latency));
  }
  const int64_t second = absl::ToUnixSeconds(now);
  MutexLock lock(&mu_);
  ++requests_;
  if (!status.ok()) ++failures_;
  total_latency_ += latency;
  if (recent_.empty() || recent_.back().first < second) recent_.emplace_back(second, 0);
  ++recent_.back().second;
  while (recent_.front().first < second - kRateSeconds) recent_.pop_front();
}

void PredictionMetrics::Computed(int64_t rows) {
  if (metrics_ == nullptr) return;
  metrics_->counter("codistill_prediction_batches_total", "Forward passes.")->Add();
  metrics_
      ->counter("codistill_prediction_examples_total",
                "Examples in forward passes; divided by batches, the mean batch size.")
      ->Add(static_cast<double>(rows));
}

double PredictionMetrics::Rate(absl::Time now) const {
  // Whole seconds only: the running one is not over.
  const int64_t second = absl::ToUnixSeconds(now);
  int64_t answers = 0;
  MutexLock lock(&mu_);
  for (const auto& [when, count] : recent_) {
    if (when < second && when >= second - kRateSeconds) answers += count;
  }
  return static_cast<double>(answers) / kRateSeconds;
}

void PredictionMetrics::Fill(ServedModelStatus* status) const {
  status->set_swaps(followed_->counters().swaps);
  MutexLock lock(&mu_);
  status->set_requests(requests_);
  status->set_failures(failures_);
  if (requests_ > 0) {
    status->set_mean_latency_ms(absl::ToDoubleMilliseconds(total_latency_) /
                                static_cast<double>(requests_));
  }
}

void PredictionMetrics::Collect() {
  const auto held = followed_->Get();
  const GroupState group = followed_->group_state();
  const int64_t step = held.ok() ? (*held)->version.step() : 0;
  metrics_->gauge("codistill_model_step", "Step of the version that answers.")
      ->Set(static_cast<double>(step));
  metrics_->gauge("codistill_model_loaded", "1 once a version answers.")->Set(held.ok() ? 1 : 0);
  metrics_
      ->gauge("codistill_model_staleness_steps",
              "Newest step the group has committed, as last told, minus the step that answers.")
      ->Set(static_cast<double>(std::max<int64_t>(0, group.version().step() - step)));

  const FollowedModel::Counters now = followed_->counters();
  MutexLock lock(&mu_);
  metrics_->counter("codistill_model_swaps_total", "Versions that took another's place.")
      ->Add(static_cast<double>(now.swaps - std::exchange(swaps_told_, now.swaps)));
  metrics_->counter("codistill_model_failed_loads_total", "Versions that could not be loaded.")
      ->Add(static_cast<double>(now.failed_loads -
                                std::exchange(failed_loads_told_, now.failed_loads)));
  metrics_->counter("codistill_model_pull_bytes_total", "Bytes of weights read from the shards.")
      ->Add(static_cast<double>(now.pull_bytes - std::exchange(bytes_told_, now.pull_bytes)));
}

}  // namespace codistill
