#ifndef CODISTILL_SERVER_EMBEDDING_AGE_LEDGER_H_
#define CODISTILL_SERVER_EMBEDDING_AGE_LEDGER_H_

#include <array>
#include <cstdint>
#include <deque>

namespace codistill {

// How much of a bounded table was last touched at which step: from this the table knows, without
// looking at its rows, what its eviction rules leave alive and which steps' rows must go to make
// room. It counts what is alive by the rules, never what is in memory. 12 bytes a step since the
// oldest living row. Not thread-safe.
class AgeLedger {
 public:
  enum Class { kRow = 0, kSmallRow = 1, kWaiting = 2 };  // small: below min_norm
  static constexpr int kClasses = 3;

  struct Options {
    uint64_t max_bytes = 0;  // 0: no bound; nothing is kept then
    uint64_t row_bytes = 0;
    uint64_t waiting_bytes = 0;
    int64_t max_age = 0;        // 0 = any
    int64_t min_norm_age = -1;  // of small rows; -1 = as the others
  };
  explicit AgeLedger(const Options& options) : options_(options) {}

  bool bounded() const { return options_.max_bytes > 0; }
  void Add(uint32_t touched, Class cls);
  // Of something alive.
  void Remove(uint32_t touched, Class cls);
  // From now on the rules are applied as of step `now`; what they condemn is forgotten.
  void Advance(uint32_t now);

  uint64_t live_bytes() const { return live_bytes_; }
  bool HasRoomFor(uint64_t bytes) const { return live_bytes_ + bytes <= options_.max_bytes; }
  // Forgets steps from the oldest on, none from `keep_from` on, until 1/16 of the bound and `bytes`
  // are free or nothing is left to forget. Returns the first step that is kept.
  uint32_t Forget(uint64_t bytes, uint32_t keep_from);
  void Clear();

 private:
  using Counts = std::array<uint32_t, kClasses>;
  uint64_t Bytes(int cls) const {
    return cls == kWaiting ? options_.waiting_bytes : options_.row_bytes;
  }
  void Drop(Counts* counts, int cls);

  const Options options_;
  std::deque<Counts> steps_;  // from base_ on
  uint32_t base_ = 0;
  uint32_t small_base_ = 0;  // small rows touched before it are forgotten
  uint64_t live_bytes_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_AGE_LEDGER_H_
