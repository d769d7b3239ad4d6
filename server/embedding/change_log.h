#ifndef CODISTILL_SERVER_EMBEDDING_CHANGE_LOG_H_
#define CODISTILL_SERVER_EMBEDDING_CHANGE_LOG_H_

#include <cstdint>
#include <deque>
#include <vector>

namespace codistill {

// Keys that changed, by interval between marks; a bounded number of them. Nothing is kept before
// the first mark. Not thread-safe.
class ChangeLog {
 public:
  explicit ChangeLog(int64_t max_keys) : max_keys_(max_keys) {}

  struct Changes {
    bool everything = false;     // more than is remembered: read the whole table
    std::vector<uint64_t> keys;  // each once, in no particular order
  };

  bool enabled() const { return !intervals_.empty(); }
  // An interval begins after `step`. Marks of one step are one.
  void Mark(int64_t step);
  // Newest mark; -1 without one. A key touched after it is in the log already.
  int64_t newest_mark() const { return intervals_.empty() ? -1 : intervals_.back().after; }

  void Add(uint64_t key);

  Changes Since(int64_t step) const;
  void Clear() {
    intervals_.clear();
    keys_ = 0;
  }
  uint64_t bytes() const { return static_cast<uint64_t>(keys_) * sizeof(uint64_t); }

 private:
  struct Interval {
    int64_t after = 0;
    bool overflown = false;
    std::vector<uint64_t> keys;
  };
  const int64_t max_keys_;
  std::deque<Interval> intervals_;
  int64_t keys_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_CHANGE_LOG_H_
