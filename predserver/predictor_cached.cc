// The way of requests with example ids, some of whose predictions are there already.

#include <algorithm>
#include <utility>

#include "predserver/predictor.h"

namespace codistill {
namespace {

// Bytes of logits that may be put into their format by whoever asks for them. The threads that
// requests come in on are few and serve all connections.
constexpr size_t kMostAtOnce = 1 << 20;

}  // namespace

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
    case CachedRows::Next::kAnswer:
      return AnswerCached(std::move(item), (*snapshot)->precision);
    case CachedRows::Next::kCompute:
      item->only = item->cached->compute();
      return Enqueue(std::move(item));
    case CachedRows::Next::kWait:
      return Park(std::move(item));
  }
}

void Predictor::AnswerCached(Item item, DataType precision) {
  if (item->cached->logits().bytes() <= kMostAtOnce) {
    absl::StatusOr<Prediction> prediction = MakeCached(*item, precision);
    return Finish(std::move(item), std::move(prediction));
  }
  absl::Status status;
  item->bytes = BytesOf(*item);
  {
    MutexLock lock(&mu_);
    if (draining_ && !item->accepted) {
      status = Draining();
    } else if (!HasRoomAside(complete_.size(), item->bytes)) {
      status = Refusal(complete_.size(), options_.clock->Now());
    } else {
      if (!std::exchange(item->accepted, true)) ++unanswered_;
      ++unanswered_;  // the entry stays until Wake has returned
      aside_bytes_ += item->bytes;
      complete_.push_back({std::move(item), precision});
    }
  }
  if (item != nullptr) return Finish(std::move(item), std::move(status));
  options_.pool->Wake(entry_);
  Left(1);
}

void Predictor::Park(Item item) {
  std::shared_ptr<PredictionCache::Waiter> waiter;
  absl::Status status;
  item->bytes = BytesOf(*item);
  {
    MutexLock lock(&mu_);
    const size_t waiting = parked_.size() + resumed_.size();
    if (draining_ && !item->accepted) {
      status = Draining();
    } else if (!HasRoomAside(waiting, item->bytes)) {
      status = Refusal(waiting, options_.clock->Now());
    } else {
      if (!std::exchange(item->accepted, true)) ++unanswered_;
      ++unanswered_;  // for Start below
      const uint64_t key = parked_so_far_++;
      waiter = item->cached->Wait([this, key] { Resume(key); });
      aside_bytes_ += item->bytes;
      parked_[key] = std::move(item);
    }
  }
  if (waiter == nullptr) return Finish(std::move(item), std::move(status));
  waiter->Start();
  Left(1);
}

// Whoever ends claims has other things to do than answering those who waited for them, and may have
// been called by one of them.
void Predictor::Resume(uint64_t parked) {
  {
    MutexLock lock(&mu_);
    const auto found = parked_.find(parked);
    if (found == parked_.end()) return;  // its deadline has passed meanwhile
    resumed_.push_back(std::move(found->second));
    parked_.erase(found);
    ++unanswered_;  // the entry stays until Wake has returned
  }
  options_.pool->Wake(entry_);
  Left(1);
}

void Predictor::ProceedWithResumed() {
  while (true) {
    Item item;
    {
      MutexLock lock(&mu_);
      if (resumed_.empty()) return;
      item = std::move(resumed_.front());
      resumed_.pop_front();
      aside_bytes_ -= item->bytes;
    }
    absl::Status wanted = StillWanted(*item, options_.clock->Now());
    wanted.ok() ? Proceed(std::move(item)) : Finish(std::move(item), std::move(wanted));
  }
}

}  // namespace codistill
