// From the queue through a forward pass to predictions, on the threads of the pool.

#include <algorithm>
#include <utility>

#include "common/base/status.h"
#include "predserver/output_format.h"
#include "predserver/predictor.h"

namespace codistill {
namespace {

// A pass is not cut into smaller ones than this to keep other threads busy: reading the weights
// would cost more than is won.
constexpr int64_t kLeastShare = 16;

}  // namespace

void Predictor::TakeBatch(const ComputePool::Situation& situation, absl::Time now, Taken* taken) {
  int64_t most = options_.max_batch_size;
  const bool shared = situation.idle_threads > 0 && !situation.others_waiting;
  if (shared) {
    const int64_t threads = situation.idle_threads + 1;
    most = std::min(most, std::max(kLeastShare, (queue_.examples() + threads - 1) / threads));
  }
  int64_t examples = 0;
  std::vector<absl::Status> statuses;
  std::vector<Item> items = queue_.Take([&](const WaitingRequest& item) {
    absl::StatusOr<Snapshot> snapshot = Choose(item.request);
    if (snapshot.ok()) {
      if (examples == 0) {
        taken->snapshot = *snapshot;
      } else if (taken->snapshot != *snapshot) {
        return RequestQueue::Verdict::kSkip;
      } else if (examples + item.examples() > most) {
        return RequestQueue::Verdict::kStop;
      }
      examples += item.examples();
    }
    statuses.push_back(snapshot.status());
    return RequestQueue::Verdict::kTake;
  });
  for (size_t i = 0; i < items.size(); ++i) {
    if (!statuses[i].ok()) {
      taken->failed.push_back({std::move(items[i]), std::move(statuses[i])});
      continue;
    }
    items[i]->taken = now;
    taken->items.push_back(std::move(items[i]));
  }
  policy_.Started(static_cast<int>(taken->items.size()), shared ? queue_.size() : 0);
}

ComputePool::Offer Predictor::Next(const ComputePool::Situation& situation) {
  ComputePool::Offer offer;
  auto taken = std::make_shared<Taken>();
  const absl::Time now = options_.clock->Now();
  {
    MutexLock lock(&mu_);
    RemoveDead(now, taken.get());
    if (queue_.size() > 0) {
      const absl::Time start =
          draining_ ? now : policy_.StartAt(queue_.size(), queue_.examples(), now);
      if (start > now) {
        offer.again = start;
      } else {
        TakeBatch(situation, now, taken.get());
        offer.more = queue_.size() > 0;
        if (taken->items.empty() && offer.more) offer.again = now;
      }
    } else {
      policy_.StopWaiting();
    }
  }
  FinishFailed(std::move(taken->failed));
  if (!taken->items.empty()) offer.pass = [this, taken] { Compute(taken.get()); };
  return offer;
}

void Predictor::Compute(Taken* taken) {
  std::vector<Item>& items = taken->items;
  const FollowedModel::Snapshot& snapshot = *taken->snapshot;
  std::vector<const WaitingRequest*> requests;
  absl::Time waiting_since = absl::InfiniteFuture();
  absl::Duration queued;
  for (const Item& item : items) {
    requests.push_back(item.get());
    waiting_since = std::min(waiting_since, item->arrived);
    queued += item->taken - item->arrived;
  }
  std::vector<PassTimes> passes;
  std::vector<absl::StatusOr<Computed>> computed =
      ComputeBatch(options_.config, *snapshot.model, requests, options_.clock, &passes);

  const absl::Time computed_at = options_.clock->Now();
  std::vector<absl::StatusOr<Prediction>> predictions(items.size());
  std::vector<Item> unfinished;  // with cached rows, which are not all there yet
  for (size_t i = 0; i < items.size(); ++i) {
    if (!computed[i].ok()) {
      predictions[i] = computed[i].status();
    } else if (items[i]->cached == nullptr) {
      predictions[i] = MakePrediction(*items[i], *computed[i], snapshot.version, snapshot.loaded_at,
                                      snapshot.precision);
    } else if (!items[i]->cached->Take(computed[i]->logits, snapshot.version, snapshot.loaded_at)) {
      items[i]->cached = nullptr;
      items[i]->only.clear();
      unfinished.push_back(std::move(items[i]));
    } else if (!items[i]->cached->complete()) {
      unfinished.push_back(std::move(items[i]));
    } else {
      predictions[i] = MakeCached(*items[i], snapshot.precision);
    }
  }
  const absl::Time now = options_.clock->Now();
  const auto count = static_cast<int64_t>(items.size());
  for (const PassTimes& pass : passes) {
    metrics_.Computed({pass.requests, pass.examples, queued * pass.requests / count, pass.input,
                       pass.infer, (now - computed_at) / static_cast<int64_t>(passes.size())},
                      now);
  }
  {
    // Before the answers leave: who asks again at once is not one more.
    MutexLock lock(&mu_);
    rate_.Passed(static_cast<int>(count), waiting_since, now);
    policy_.Computed(static_cast<int>(count));
    int answered = 0;
    for (const Item& item : items) answered += item != nullptr && std::exchange(item->open, false);
    policy_.Answered(answered, now);
  }
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i] != nullptr) Finish(std::move(items[i]), std::move(predictions[i]));
  }
  for (Item& item : unfinished) {
    item->cached == nullptr ? Enqueue(std::move(item)) : Proceed(std::move(item));
  }
}

absl::StatusOr<Prediction> Predictor::MakePrediction(const WaitingRequest& item,
                                                     const Computed& computed,
                                                     const Version& version, absl::Time loaded_at,
                                                     DataType precision) const {
  Prediction prediction;
  CODISTILL_ASSIGN_OR_RETURN(
      prediction.outputs,
      FormatOutputs(computed.logits, options_.config.label_loss(), item.plan, item.request.format));
  for (size_t i = 0; i < computed.states.size(); ++i) {
    if (!item.plan.want_states[i]) continue;
    prediction.outputs.push_back(
        {options_.config.states(static_cast<int>(i)).name(), computed.states[i]});
  }
  prediction.version = version;
  prediction.precision = precision;
  prediction.latest_step = LatestStep(version);
  prediction.staleness_steps = prediction.latest_step - version.step();
  prediction.age = std::max(absl::ZeroDuration(), options_.clock->Now() - loaded_at);
  return prediction;
}

absl::StatusOr<Prediction> Predictor::MakeCached(const WaitingRequest& item,
                                                 DataType precision) const {
  Version version;
  version.set_generation(item.cached->generation());
  version.set_step(item.cached->oldest().step);
  return MakePrediction(item, {item.cached->logits(), {}}, version, item.cached->oldest().loaded_at,
                        precision);
}

}  // namespace codistill
