#ifndef CODISTILL_SERVER_EMBEDDING_CUTS_H_
#define CODISTILL_SERVER_EMBEDDING_CUTS_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/mutex.h"
#include "server/embedding/embedding_table.h"

namespace codistill {

// Rows on their way to a follower: those of one table, and keys whose rows are gone.
struct FollowedChunk {
  int table = 0;
  std::vector<uint64_t> keys;
  std::vector<float> rows;  // [keys, dim]
  std::vector<uint64_t> evicted;
};

// What one follower reads, a few thousand rows at a time. Used by one thread at a time.
class FollowReader {
 public:
  virtual ~FollowReader() = default;
  // False at the end.
  virtual bool Next(FollowedChunk* chunk) = 0;
  // The chunks are the whole of every table rather than what has changed.
  virtual bool whole() const = 0;
  // The rows are those of the cut asked for. False: they are of a later step, and become those of
  // the next cut with that cut's changes.
  virtual bool exact() const = 0;
};

// The cuts of one shard's embedding tables. A table is never copied for a cut: what is kept is a
// log of the rows that changed from cut to cut, with their values at the later one, and of the keys
// whose rows were evicted in between. A follower takes the tables whole once and from then on the
// changes.
//
// Publish and Clear are called by the thread that changes the tables, between updates; the rest is
// thread-safe.
class EmbeddingCuts {
 public:
  struct Options {
    // Of rows in the log. Beyond it the oldest changes are forgotten; a follower that is so far
    // behind takes the tables whole.
    uint64_t max_bytes = uint64_t{256} << 20;
    // Cuts from which the changes are known one by one; older ones are merged.
    int max_deltas = 64;
  };
  // The tables outlive this.
  EmbeddingCuts(std::vector<EmbeddingTable*> tables, Options options);

  // Forgets all cuts; the tables as they are become the cut `label`.
  void Start(int64_t label);
  // Makes the tables as they are the cut `label`, larger than the last one.
  void Publish(int64_t label);

  // What takes a follower from the cut `since` to the cut `label`; with since < 0, or one that is
  // not known any more, from nothing: the tables whole. The thread that changes the tables, between
  // updates. ABORTED: the cut is not known (any more).
  absl::StatusOr<std::unique_ptr<FollowReader>> Read(int64_t label, int64_t since);

  uint64_t bytes() const;  // of the log

 private:
  struct TableDelta {
    std::vector<uint64_t> keys;
    std::vector<float> rows;
    std::vector<uint64_t> evicted;
  };
  // From one cut to the next.
  struct Delta {
    int64_t label = 0;  // the later one
    std::vector<TableDelta> tables;
    uint64_t bytes = 0;
  };
  using DeltaPtr = std::shared_ptr<const Delta>;
  class LogReader;
  class WholeReader;

  DeltaPtr Merge(const Delta& older, const Delta& newer) const;
  void Trim() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const std::vector<EmbeddingTable*> tables_;
  const Options options_;

  mutable Mutex mu_;
  int64_t base_ ABSL_GUARDED_BY(mu_) = -1;        // cut that the first delta begins at; -1 = none
  bool base_empty_ ABSL_GUARDED_BY(mu_) = false;  // it has no rows
  std::deque<DeltaPtr> deltas_ ABSL_GUARDED_BY(mu_);
  uint64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<int64_t> steps_ ABSL_GUARDED_BY(mu_);  // of each table at the newest cut
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_CUTS_H_
