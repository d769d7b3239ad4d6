// The way of requests with example ids, some of whose predictions are there already.

#include <algorithm>
#include <utility>

#include "predserver/predictor.h"

namespace codistill {

void Predictor::Proceed(Item item) {
  const absl::StatusOr<Snapshot> snapshot = Choose(item->request);
  if (!snapshot.ok()) return Finish(std::move(item), snapshot.status());
  const absl::Time start = options_.clock->Now();
  const Version& held = (*snapshot)->version;
  int64_t least_step = held.step() - options_.cache_window_steps;
  if (item->request.max_staleness_steps >= 0) {
    least_step = std::max(least_step, LatestStep(held) - item->request.max_staleness_steps);
  }
  int64_t hits = 0, misses = 0;
  const CachedRows::Next next = item->cached->Look(held.generation(), least_step, &hits, &misses);
  metrics_.LookedUp(hits, misses, options_.clock->Now() - start);
  switch (next) {
    case CachedRows::Next::kAnswer: {
      absl::StatusOr<Prediction> prediction = MakeCached(*item, (*snapshot)->precision);
      return Finish(std::move(item), std::move(prediction));
    }
    case CachedRows::Next::kCompute:
      item->only = item->cached->compute();
      return Enqueue(std::move(item));
    case CachedRows::Next::kWait:
      return Park(std::move(item));
  }
}

void Predictor::Park(Item item) {
  const WaitingRequest* const key = item.get();
  std::shared_ptr<PredictionCache::Waiter> waiter;
  absl::Status status;
  {
    MutexLock lock(&mu_);
    if (draining_ && !item->accepted) {
      status = Draining();
    } else if (parked_.size() >= static_cast<size_t>(options_.max_queue)) {
      status = Refusal(options_.clock->Now());
    } else {
      if (!std::exchange(item->accepted, true)) ++unanswered_;
      ++unanswered_;  // for Start below
      waiter = item->cached->Wait([this, key] { Resume(key); });
      parked_[key] = std::move(item);
    }
  }
  if (waiter == nullptr) return Finish(std::move(item), std::move(status));
  waiter->Start();
  Left(1);
}

void Predictor::Resume(const WaitingRequest* parked) {
  Item item;
  {
    MutexLock lock(&mu_);
    const auto found = parked_.find(parked);
    if (found == parked_.end()) return;  // its deadline has passed meanwhile
    item = std::move(found->second);
    parked_.erase(found);
  }
  absl::Status wanted = StillWanted(*item, options_.clock->Now());
  wanted.ok() ? Proceed(std::move(item)) : Finish(std::move(item), std::move(wanted));
}

}  // namespace codistill
