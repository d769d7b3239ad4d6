#ifndef CODISTILL_SERVER_EMBEDDING_EMBEDDING_TABLE_H_
#define CODISTILL_SERVER_EMBEDDING_EMBEDDING_TABLE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/mutex.h"
#include "common/embedding/default_row.h"
#include "server/embedding/age_ledger.h"
#include "server/embedding/change_log.h"
#include "server/embedding/row_index.h"
#include "server/embedding/row_optimizer.h"
#include "server/embedding/row_slab.h"

namespace codistill {

// One shard's part of an embedding table: fp32 rows of `dim` elements by 64-bit key (every value is
// a key), each with its optimizer slots beside it.
//
// Which rows there are, and what they are, is a function of the updates and of nothing else: not of
// the order of keys in memory, of how often rows were read, of when memory was cleaned up, nor of
// whether the table was saved and loaded in between. Therefore eviction is a rule, not an event: a
// row that the rule condemns is gone for everybody at once, and its memory is taken back later, a
// little with every update. (With insert_on_gather reads count as uses; then the reads belong to
// the function's arguments.)
//
//   admission  A key gets a row in the min_count-th update (or, with insert_on_gather, reading) it
//              occurs in. Before, its default row is read and its gradient dropped and counted; the
//              count takes 16 bytes.
//   age        A row that no update has touched in the last max_age_steps steps is evicted, counts
//   of
//              keys not admitted too.
//   norm       A row whose Euclidean norm was below min_norm after it was last touched is evicted
//              min_norm_age_steps later unless touched again.
//   max_bytes  When a row is to be made for which there is no room, those touched longest ago are
//              evicted, whole steps at a time, until 1/16 of the bound is free. Where all are of
//              the present step the new key is refused and counted.
//
// Memory: row_floats * 4 bytes a row and 16 bytes of index, filled to 60-81 %; no batch waits for
// more than 32,768 keys to be moved when the index grows.
//
// Thread-safe. One thread at a time calls the methods under "Changes" (they are the updates whose
// order matters); the others may run beside them. Locks are held for 2,048 keys of a batch at a
// time, so readers and the writer take turns. Keys of one batch should be unique; a repeated one is
// updated twice.
class EmbeddingTable {
 public:
  struct Options {
    std::string name;
    int dim = 0;
    RowInit init;
    RowOptimizer::Options optimizer;
    int64_t min_count = 1;
    int64_t max_age_steps = 0;  // 0 = any age
    float min_norm = 0;         // 0 = any norm
    int64_t min_norm_age_steps = 0;
    uint64_t max_bytes = 0;  // 0 = no bound
    // Readers make rows and keep them young, as for ASYNC groups. False: reading changes nothing.
    bool insert_on_gather = false;
    // Keys that ChangesSince remembers; beyond, it answers "everything".
    int64_t max_log_keys = int64_t{4} << 20;
  };
  // INVALID_ARGUMENT names the field and what would be right.
  static absl::StatusOr<std::unique_ptr<EmbeddingTable>> Create(Options options);
  ~EmbeddingTable();

  const Options& options() const { return options_; }
  const RowOptimizer& optimizer() const { return optimizer_; }
  int dim() const { return options_.dim; }
  // Number of the newest update.
  int64_t step() const;

  // ---------------------------------------------------------------------------------- Reading

  // Copies the rows of `keys` in their order to `rows` (keys.size() * dim floats); of keys without
  // a row the default. With `exact_step` >= 0: ABORTED unless the table is at exactly that step.
  // Makes rows where the options say so.
  absl::Status Gather(absl::Span<const uint64_t> keys, absl::Span<float> rows,
                      int64_t exact_step = -1);

  // Like Gather, never making a row; `present` (may be empty) tells which keys have one.
  void Read(absl::Span<const uint64_t> keys, absl::Span<float> rows,
            absl::Span<uint8_t> present) const;

  // ---------------------------------------------------------------------------------- Changes

  struct Update {
    int64_t step = 0;  // larger than step()
    double learning_rate = 0;
  };
  struct Counts {
    int64_t applied = 0;       // gradients that changed a row
    int64_t created = 0;       // rows made
    int64_t not_admitted = 0;  // gradients dropped: the key has not been seen often enough
    int64_t refused = 0;       // gradients dropped: max_bytes
    int64_t evicted = 0;       // rows whose memory was taken back
  };
  struct Batch {
    absl::Span<const uint64_t> keys;
    absl::Span<const float> gradients;  // keys.size() * dim, finite
  };
  // Makes step `update.step`: the rows of the batches' keys by the optimizer from their gradients.
  // Without keys the step is only counted.
  Counts Apply(const Update& update, absl::Span<const Batch> batches);
  Counts Apply(const Update& update, absl::Span<const uint64_t> keys,
               absl::Span<const float> gradients) {
    const Batch batch = {keys, gradients};
    return Apply(update, absl::MakeConstSpan(&batch, 1));
  }

  // Evicts, besides what the options say, all rows not touched for more than `older_than` steps and
  // all with a norm below `norm_below` (negative, zero: not this rule). Returns how many. Goes
  // through the whole table; others wait for one segment of it at a time.
  int64_t Evict(int64_t older_than, float norm_below);

  // Forgets all rows, counts, changes and marks; the table is at `step`.
  void Clear(int64_t step);

  // ---------------------------------------------------------------------------------- Contents

  // Rows with everything needed to go on from them.
  struct Rows {
    std::vector<uint64_t> keys;
    std::vector<uint32_t> touched;  // by key: step of the last use
    std::vector<float> data;        // by key: row_floats(): weights, then slots
    // Keys that wait for admission.
    std::vector<uint64_t> waiting;
    std::vector<uint32_t> waiting_touched;
    std::vector<uint32_t> waiting_count;

    bool empty() const { return keys.empty() && waiting.empty(); }
    void clear();
  };

  // The table as it is now, read while updates go on: what an update is about to change is set
  // aside first. Used by one thread; the table outlives it. At most kMaxSnapshots at a time.
  class Snapshot {
   public:
    virtual ~Snapshot() = default;
    virtual int64_t step() const = 0;
    // Replaces `rows` by the next few thousand, in no particular order; false at the end.
    virtual bool Next(Rows* rows) = 0;
  };
  static constexpr int kMaxSnapshots = 16;
  // Only what was touched after step `since`; -1 = all. RESOURCE_EXHAUSTED beyond kMaxSnapshots.
  // Between updates, from the thread that makes them.
  absl::StatusOr<std::unique_ptr<Snapshot>> TakeSnapshot(int64_t since = -1);

  // Adds rows of a snapshot of a table with equal dim and optimizer; a key that is there already is
  // replaced. Between Clear(step) and the first update, from the thread that makes them.
  // INVALID_ARGUMENT if the vectors do not fit together.
  absl::Status Load(const Rows& rows);

  // ---------------------------------------------------------------------------------- Followers

  // From now on changes are remembered by interval; the present step() ends one. Between updates.
  void Mark();
  // Keys updated or evicted after step `since`, at which Mark was called, each once. `everything`:
  // more than are remembered, or unknown.
  ChangeLog::Changes ChangesSince(int64_t since) const;

  struct Stats {
    int64_t rows = 0;     // in memory, those condemned but not yet cleaned up included
    int64_t waiting = 0;  // keys not admitted yet
    uint64_t bytes = 0;   // memory held: rows, slots, index
    Counts total;         // since it was created or cleared
  };
  Stats stats() const;

 private:
  class SnapshotImpl;
  friend class SnapshotImpl;
  using Entry = RowIndex::Entry;

  explicit EmbeddingTable(Options options);

  // By age and norm, and by these or floor_.
  bool ExpiredByAge(const Entry& entry, uint32_t now) const;
  bool Expired(const Entry& entry, uint32_t now) const;
  // With the lock held, for kTouch exclusively.
  template <bool kTouch>
  void GatherLocked(absl::Span<const uint64_t> keys, float* rows,
                    uint8_t* present) ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void ApplyLocked(const RowOptimizer::Step& step, absl::Span<const uint64_t> keys,
                   const float* gradients, Counts* counts) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The row of a key that has none yet, or whose row is condemned; -1 if it gets none now.
  int64_t Admit(uint64_t key, uint64_t hash, uint32_t use, const RowOptimizer::Step& step,
                Counts* counts) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool MakeRoom(uint64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Bookkeeping of a use, before it.
  void Touch(Entry* entry, uint64_t hash, uint32_t use) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Remove(Entry* entry, uint64_t hash) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SetAside(const Entry& entry, uint64_t hash, uint32_t use) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int64_t Sweep(int64_t groups) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  const RowOptimizer optimizer_;

  mutable Mutex mu_;
  RowIndex index_ ABSL_GUARDED_BY(mu_);
  RowSlab slab_ ABSL_GUARDED_BY(mu_);
  AgeLedger ledger_ ABSL_GUARDED_BY(mu_);
  ChangeLog log_ ABSL_GUARDED_BY(mu_);
  int64_t step_ ABSL_GUARDED_BY(mu_) = 0;
  bool applying_ ABSL_GUARDED_BY(mu_) = false;
  // The step for which the rules are asked: the one that is being made, or will be next.
  uint32_t now_ ABSL_GUARDED_BY(mu_) = 1;
  uint32_t floor_ ABSL_GUARDED_BY(mu_) = 0;  // rows touched before it are condemned
  // Where the search for condemned rows goes on.
  size_t hand_segment_ ABSL_GUARDED_BY(mu_) = 0;
  uint32_t hand_group_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<SnapshotImpl*> snapshots_ ABSL_GUARDED_BY(mu_);
  Counts total_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_EMBEDDING_TABLE_H_
