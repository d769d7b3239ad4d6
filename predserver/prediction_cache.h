#ifndef CODISTILL_PREDSERVER_PREDICTION_CACHE_H_
#define CODISTILL_PREDSERVER_PREDICTION_CACHE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/hash/hash.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"

namespace codistill {

// The logits of examples that a model has computed, by example id and generation of the group. Keys
// are stored and compared in full. Memory is counted with all that goes with a row and never
// exceeds the limit: rows that nobody asked for lately make room (CLOCK, Corbató 1968). Locks are
// sharded by key.
//
// It also knows which examples are being computed and for whom, so that others who ask for the same
// wait rather than compute them too. Thread-safe.
class PredictionCache {
 public:
  explicit PredictionCache(int64_t bytes) : limit_(bytes) {}
  PredictionCache(const PredictionCache&) = delete;
  PredictionCache& operator=(const PredictionCache&) = delete;

  struct Key {
    int64_t example = 0;
    uint64_t generation = 0;

    friend bool operator==(const Key& a, const Key& b) {
      return a.example == b.example && a.generation == b.generation;
    }
    template <typename H>
    friend H AbslHashValue(H h, const Key& key) {
      return H::combine(std::move(h), key.example, key.generation);
    }
  };
  // The version that computed a row.
  struct Origin {
    int64_t step = 0;
    absl::Time loaded_at;
  };

  // Floats of one example, the same for all; 0 until the first Insert.
  int64_t row_floats() const { return row_floats_.load(std::memory_order_acquire); }

  // Copies the example's row to `to` if there is one of step `least_step` or a newer one.
  bool Find(const Key& key, int64_t least_step, float* to, Origin* origin);

  // Keeps a copy of a row, in place of an older one; not one of another size than the first, and
  // none that the limit has no room for.
  void Insert(const Key& key, const Origin& origin, const float* row, int64_t floats);

  // Whether `owner` is the one to compute the example: nobody else has said so before, and not
  // called Release since.
  bool Claim(const Key& key, const void* owner);
  // Somebody who waits for examples to be released. `go` runs once when as many have been as were
  // waited for, in the thread that released the last.
  class Waiter {
   public:
    explicit Waiter(std::function<void()> go) : go_(std::move(go)) {}
    // Once all waits have begun: those that ended meanwhile count too.
    void Start() { Released(); }

   private:
    friend class PredictionCache;
    void Released() {
      if (left_.fetch_sub(1) == 1) go_();
    }

    std::atomic<int64_t> left_{1};
    const std::function<void()> go_;
  };
  // False if nobody has claimed the example (any more).
  bool Wait(const Key& key, const std::shared_ptr<Waiter>& waiter);
  // Ends the claims of `owner`, whether or not it has inserted rows.
  void Release(const std::vector<Key>& keys, const void* owner);

  // Of rows, keys and tables.
  int64_t bytes() const;

 private:
  struct Slot {
    Key key;
    Origin origin;
    std::unique_ptr<float[]> row;
    bool wanted = false;  // since the hand last came by
  };
  struct Flight {
    const void* owner = nullptr;
    std::vector<std::shared_ptr<Waiter>> waiters;
  };
  struct Shard {
    mutable Mutex mu;
    absl::flat_hash_map<Key, uint32_t> index ABSL_GUARDED_BY(mu);  // in slots
    std::vector<Slot> slots ABSL_GUARDED_BY(mu);
    size_t hand ABSL_GUARDED_BY(mu) = 0;
    absl::flat_hash_map<Key, Flight> flights ABSL_GUARDED_BY(mu);
  };
  static constexpr int kShardBits = 4;
  static constexpr size_t kShards = size_t{1} << kShardBits;

  // By the bits of the hash that the tables do not use.
  Shard& ShardOf(const Key& key) { return shards_[absl::Hash<Key>()(key) >> (64 - kShardBits)]; }
  // Lays the tables out for rows of this size; whether they are.
  bool Prepare(int64_t floats);
  int64_t SlotBytes() const;
  // A slot of the shard to use, as one that is new or has lost its row.
  Slot* FreeSlot(Shard* shard) ABSL_EXCLUSIVE_LOCKS_REQUIRED(shard->mu);

  const int64_t limit_;
  Mutex prepare_mu_;
  std::atomic<int64_t> row_floats_{0};
  std::atomic<size_t> slots_each_{0};  // that a shard may have
  Shard shards_[kShards];
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_PREDICTION_CACHE_H_
