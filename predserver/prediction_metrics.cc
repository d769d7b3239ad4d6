#include "predserver/prediction_metrics.h"

#include <algorithm>

namespace codistill {
namespace {

constexpr int64_t kRateSeconds = 5;
constexpr size_t kMostBatchSizes = 1000;

}  // namespace

PredictionMetrics::PredictionMetrics(Options options)
    : options_(std::move(options)), labels_({{"model", options_.model}}) {
  Metrics* const metrics = options_.metrics;
  if (metrics == nullptr) return;
  latency_ = metrics->latency("codistill_prediction_latency_seconds",
                              "From a request's arrival to its answer, waiting included.", labels_);
  queue_ = metrics->latency("codistill_prediction_queue_seconds",
                            "That a pass's requests waited for it, on average.", labels_);
  infer_ = metrics->latency("codistill_prediction_compute_seconds", "Of a forward pass.", labels_);
  batch_ =
      metrics->sizes("codistill_prediction_batch_examples", "Examples in a forward pass.", labels_);
  batches_ = metrics->counter("codistill_prediction_batches_total", "Forward passes.", labels_);
  examples_ = metrics->counter(
      "codistill_prediction_examples_total",
      "Examples in forward passes; divided by batches, the mean batch size.", labels_);
  hits_ = metrics->counter("codistill_prediction_cache_hits_total",
                           "Examples answered without computing.", labels_);
  misses_ = metrics->counter("codistill_prediction_cache_misses_total",
                             "Examples that the cache did not have.", labels_);
  metrics->OnCollect([this] { Collect(); });
}

Metrics::Counter* PredictionMetrics::Answers(absl::StatusCode code) {
  const size_t index = std::min(static_cast<size_t>(code), answers_.size() - 1);
  if (answers_[index] == nullptr) {
    Metrics::Labels labels = labels_;
    labels["code"] = absl::StatusCodeToString(code);
    answers_[index] = options_.metrics->counter("codistill_prediction_requests_total",
                                                "Requests answered, by status code.", labels);
  }
  return answers_[index];
}

void PredictionMetrics::Answered(const absl::Status& status, absl::Duration latency,
                                 absl::Time now) {
  if (latency_ != nullptr) latency_->Observe(absl::ToDoubleSeconds(latency));
  const int64_t second = absl::ToUnixSeconds(now);
  MutexLock lock(&mu_);
  if (options_.metrics != nullptr) Answers(status.code())->Add();
  (status.ok() ? statistics_.success : statistics_.fail).Add(latency);
  if (absl::IsResourceExhausted(status)) ++statistics_.refused;
  if (recent_.empty() || recent_.back().first < second) recent_.emplace_back(second, 0);
  ++recent_.back().second;
  while (recent_.front().first < second - kRateSeconds) recent_.pop_front();
}

void PredictionMetrics::Computed(const Pass& pass, absl::Time now) {
  if (batches_ != nullptr) {
    batches_->Add();
    examples_->Add(static_cast<double>(pass.examples));
    batch_->Observe(static_cast<double>(pass.examples));
    infer_->Observe(absl::ToDoubleSeconds(pass.infer));
    queue_->Observe(absl::ToDoubleSeconds(pass.queued) / static_cast<double>(pass.requests));
  }
  MutexLock lock(&mu_);
  statistics_.queue.Add(pass.queued, pass.requests);
  statistics_.compute_input.Add(pass.input * pass.requests, pass.requests);
  statistics_.compute_infer.Add(pass.infer * pass.requests, pass.requests);
  statistics_.compute_output.Add(pass.output * pass.requests, pass.requests);
  statistics_.inference_count += pass.examples;
  ++statistics_.execution_count;
  statistics_.last_inference = std::max(statistics_.last_inference, now);
  auto batch = statistics_.batches.find(pass.examples);
  if (batch == statistics_.batches.end()) {
    if (statistics_.batches.size() >= kMostBatchSizes) return;
    batch = statistics_.batches.try_emplace(pass.examples).first;
  }
  batch->second.compute_input.Add(pass.input);
  batch->second.compute_infer.Add(pass.infer);
  batch->second.compute_output.Add(pass.output);
}

void PredictionMetrics::LookedUp(int64_t hits, int64_t misses, absl::Duration took) {
  if (hits_ != nullptr) {
    hits_->Add(static_cast<double>(hits));
    misses_->Add(static_cast<double>(misses));
  }
  const absl::Duration each = took / std::max<int64_t>(1, hits + misses);
  MutexLock lock(&mu_);
  statistics_.cache_hit.Add(each * hits, hits);
  statistics_.cache_miss.Add(each * misses, misses);
}

ModelStatistics PredictionMetrics::statistics() const {
  MutexLock lock(&mu_);
  return statistics_;
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
  const FollowedModel::Counters followed = options_.followed->counters();
  status->set_swaps(followed.swaps);
  status->set_failed_loads(followed.failed_loads);
  status->set_last_load_error(followed.last_load_error);
  const Now now = options_.now();
  status->set_queued(now.queued);
  status->set_cache_bytes(now.cache_bytes);
  MutexLock lock(&mu_);
  const int64_t requests = statistics_.success.count + statistics_.fail.count;
  status->set_requests(requests);
  status->set_failures(statistics_.fail.count);
  status->set_refused(statistics_.refused);
  status->set_batches(statistics_.execution_count);
  status->set_examples(statistics_.inference_count);
  status->set_cache_hits(statistics_.cache_hit.count);
  status->set_cache_misses(statistics_.cache_miss.count);
  if (requests > 0) {
    status->set_mean_latency_ms(
        absl::ToDoubleMilliseconds(statistics_.success.time + statistics_.fail.time) /
        static_cast<double>(requests));
  }
}

void PredictionMetrics::Collect() {
  Metrics* const metrics = options_.metrics;
  const auto held = options_.followed->Get();
  const int64_t group_step = options_.followed->group_state().version().step();
  const int64_t step = held.ok() ? (*held)->version.step() : 0;
  metrics->gauge("codistill_model_step", "Step of the version that answers.", labels_)
      ->Set(static_cast<double>(step));
  metrics->gauge("codistill_model_loaded", "1 once a version answers.", labels_)
      ->Set(held.ok() ? 1 : 0);
  metrics
      ->gauge("codistill_model_staleness_steps",
              "Newest step the group has committed, as last told, minus the step that answers.",
              labels_)
      ->Set(static_cast<double>(std::max<int64_t>(0, group_step - step)));
  const Now now = options_.now();
  metrics->gauge("codistill_prediction_queued", "Requests that wait to be computed.", labels_)
      ->Set(static_cast<double>(now.queued));
  metrics
      ->gauge("codistill_prediction_cache_bytes", "Memory of cached predictions and their keys.",
              labels_)
      ->Set(static_cast<double>(now.cache_bytes));

  const FollowedModel::Counters counters = options_.followed->counters();
  MutexLock lock(&mu_);
  const FollowedModel::Counters told = std::exchange(told_, counters);
  metrics->counter("codistill_model_swaps_total", "Versions that took another's place.", labels_)
      ->Add(static_cast<double>(counters.swaps - told.swaps));
  metrics
      ->counter("codistill_model_failed_loads_total", "Versions that could not be loaded.", labels_)
      ->Add(static_cast<double>(counters.failed_loads - told.failed_loads));
  metrics
      ->counter("codistill_model_pull_bytes_total", "Bytes of weights read from the shards.",
                labels_)
      ->Add(static_cast<double>(counters.pull_bytes - told.pull_bytes));
}

}  // namespace codistill
