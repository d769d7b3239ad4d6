#include "server/embedding/change_log.h"

#include <algorithm>

namespace codistill {
namespace {

// Marks nobody reads any more must not pile up.
constexpr size_t kMaxIntervals = 4096;

}  // namespace

void ChangeLog::Mark(int64_t step) {
  if (newest_mark() == step) return;
  intervals_.push_back({step, false, {}});
  while (intervals_.size() > kMaxIntervals) {
    keys_ -= static_cast<int64_t>(intervals_.front().keys.size());
    intervals_.pop_front();
  }
}

void ChangeLog::Add(uint64_t key) {
  if (!enabled() || intervals_.back().overflown) return;
  while (keys_ >= max_keys_ && intervals_.size() > 1) {
    keys_ -= static_cast<int64_t>(intervals_.front().keys.size());
    intervals_.pop_front();
  }
  Interval& newest = intervals_.back();
  if (keys_ >= max_keys_) {
    newest.overflown = true;
    newest.keys = {};
    keys_ = 0;
    return;
  }
  newest.keys.push_back(key);
  ++keys_;
}

ChangeLog::Changes ChangeLog::Since(int64_t step) const {
  Changes changes;
  // The interval `step` lies in, or begins.
  auto first = std::upper_bound(intervals_.begin(), intervals_.end(), step,
                                [](int64_t at, const Interval& i) { return at < i.after; });
  if (first == intervals_.begin()) {
    changes.everything = true;
    return changes;
  }
  for (--first; first != intervals_.end(); ++first) {
    if (first->overflown) {
      changes.everything = true;
      changes.keys.clear();
      return changes;
    }
    changes.keys.insert(changes.keys.end(), first->keys.begin(), first->keys.end());
  }
  std::sort(changes.keys.begin(), changes.keys.end());
  changes.keys.erase(std::unique(changes.keys.begin(), changes.keys.end()), changes.keys.end());
  return changes;
}

}  // namespace codistill
