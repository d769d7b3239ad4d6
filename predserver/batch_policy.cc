#include "predserver/batch_policy.h"

#include <algorithm>
#include <cmath>

namespace codistill {

void BatchPolicy::Came(absl::Time now) {
  if (open_ == 0 && now - idle_since_ > options_.delay) peaks_.clear();  // nobody is expected back
  ++open_;
  if (peaks_.empty()) peaks_.push_back(0);
  peaks_.back() = std::max(peaks_.back(), open_);
}

void BatchPolicy::Answered(int requests, absl::Time now) {
  open_ -= requests;
  if (open_ == 0) idle_since_ = now;
}

int BatchPolicy::Expected() const {
  return peaks_.empty() ? 0 : *std::max_element(peaks_.begin(), peaks_.end());
}

bool BatchPolicy::Enough(int requests, int64_t examples) const {
  return examples >= options_.max_examples || requests + computing_ >= Expected();
}

absl::Time BatchPolicy::StartAt(int requests, int64_t examples, absl::Time now) {
  const bool enough = Enough(requests, examples);
  if (waiting()) {
    if (!enough && now < wait_until_) return wait_until_;
    if (!enough && requests > seen_ && delays_ < kMostDelays) {
      // They are coming, only not so fast.
      ++delays_;
      seen_ = requests;
      return wait_until_ = now + options_.delay;
    }
    EndWait(requests, !enough);
    return absl::InfinitePast();
  }
  if (enough || others_ > 0 || options_.delay <= absl::ZeroDuration()) return absl::InfinitePast();
  if (without_wait_ > 0) {
    --without_wait_;
    return absl::InfinitePast();
  }
  wait_until_ = now + options_.delay;
  delays_ = 1;
  seen_ = waited_with_ = requests;
  return wait_until_;
}

void BatchPolicy::EndWait(int requests, bool by_time) {
  wait_until_ = absl::InfiniteFuture();
  if (!by_time) {
    patience_ = 0;
    return;
  }
  peaks_.assign(1, open_);
  if (requests > waited_with_) {
    patience_ = 0;
  } else {
    without_wait_ = std::min(1 << patience_, kMostWithoutWait);
    patience_ = std::min(patience_ + 1, 10);
  }
}

void BatchPolicy::Started(int requests, int others) {
  wait_until_ = absl::InfiniteFuture();
  others_ = others > 0 ? others : std::max(0, others_ - requests);
  computing_ += requests;
  peaks_.push_back(open_);
  while (peaks_.size() > kRemembered) peaks_.pop_front();
}

void DrainRate::Passed(int requests, absl::Time waiting_since, absl::Time now) {
  constexpr double kMemorySeconds = 1;
  const double took = absl::ToDoubleSeconds(now - std::max(last_, waiting_since));
  last_ = std::max(last_, now);
  if (!(took > 0)) {
    requests_ += requests;
    return;
  }
  const double keep = std::exp(-took / kMemorySeconds);
  requests_ = requests_ * keep + requests;
  seconds_ = seconds_ * keep + took;
}

absl::Duration DrainRate::RetryDelay(int queued, absl::Time now) {
  constexpr absl::Duration kLeast = absl::Milliseconds(1), kMost = absl::Seconds(10);
  const double rate = per_second();
  if (rate <= 0) return absl::Milliseconds(100);
  const absl::Duration one = absl::Seconds(1 / rate);
  const absl::Duration whole = std::max(1, queued) * one;
  promised_ = std::max(promised_, now) + one;
  if (promised_ - now > whole) promised_ = now + one;
  return std::clamp(promised_ - now, kLeast, kMost);
}

}  // namespace codistill
