#include "server/embedding/age_ledger.h"

#include <algorithm>

#include "glog/logging.h"

namespace codistill {

void AgeLedger::Add(uint32_t touched, Class cls) {
  if (!bounded()) return;
  if (steps_.empty()) base_ = small_base_ = touched;
  small_base_ = std::min(small_base_, touched);
  while (touched < base_) {
    steps_.push_front({});
    --base_;
  }
  while (touched >= base_ + steps_.size()) steps_.push_back({});
  ++steps_[touched - base_][cls];
  live_bytes_ += Bytes(cls);
}

void AgeLedger::Remove(uint32_t touched, Class cls) {
  if (!bounded()) return;
  CHECK(touched >= base_ && touched - base_ < steps_.size()) << "a row the ledger does not know";
  --steps_[touched - base_][cls];
  live_bytes_ -= Bytes(cls);
}

void AgeLedger::Drop(Counts* counts, int cls) {
  live_bytes_ -= Bytes(cls) * (*counts)[cls];
  (*counts)[cls] = 0;
}

void AgeLedger::Advance(uint32_t now) {
  if (!bounded()) return;
  // Alive at `now` is what was touched at now - max_age or later.
  if (options_.max_age > 0 && now > options_.max_age) {
    const uint32_t first = now - static_cast<uint32_t>(options_.max_age);
    while (!steps_.empty() && base_ < first) {
      for (int cls = 0; cls < kClasses; ++cls) Drop(&steps_.front(), cls);
      steps_.pop_front();
      ++base_;
    }
  }
  if (options_.min_norm_age >= 0 && now > options_.min_norm_age) {
    const uint32_t first = now - static_cast<uint32_t>(options_.min_norm_age);
    for (small_base_ = std::max(small_base_, base_);
         small_base_ < first && small_base_ - base_ < steps_.size(); ++small_base_) {
      Drop(&steps_[small_base_ - base_], kSmallRow);
    }
  }
}

uint32_t AgeLedger::Forget(uint64_t bytes, uint32_t keep_from) {
  const uint64_t spare = options_.max_bytes / 16 + bytes;
  const uint64_t most = options_.max_bytes > spare ? options_.max_bytes - spare : 0;
  while (!steps_.empty() && base_ < keep_from && live_bytes_ > most) {
    for (int cls = 0; cls < kClasses; ++cls) Drop(&steps_.front(), cls);
    steps_.pop_front();
    ++base_;
  }
  return base_;
}

void AgeLedger::Clear() {
  steps_.clear();
  base_ = small_base_ = 0;
  live_bytes_ = 0;
}

}  // namespace codistill
