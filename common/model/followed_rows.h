#ifndef CODISTILL_COMMON_MODEL_FOLLOWED_ROWS_H_
#define CODISTILL_COMMON_MODEL_FOLLOWED_ROWS_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "common/embedding/default_row.h"

namespace codistill {

// A follower's copy of one embedding table at one version: fp32 rows without optimizer slots; a key
// that has none is its default row. Immutable, thread-safe. Versions share what they have in
// common: rows lie in small buckets by hash of the key, and a new version copies the buckets that
// change and no others, so that several versions at once (one that answers, one that loads) cost
// little more than one.
class FollowedRows {
  struct Bucket {
    std::vector<uint64_t> keys;  // sorted
    std::vector<float> rows;     // in their order
  };

 public:
  // Without any row. dim >= 1.
  static std::shared_ptr<const FollowedRows> Empty(int64_t dim, const RowInit& init);

  // Copies the rows of `keys` in their order to `rows` (keys.size() * dim floats).
  void Find(absl::Span<const uint64_t> keys, float* rows) const;

  int64_t dim() const { return dim_; }
  int64_t size() const { return size_; }  // rows
  // Memory of this version, counting what it shares with others.
  uint64_t bytes() const { return bytes_; }

  // Makes the next version. Used by one thread, once.
  class Builder {
   public:
    explicit Builder(std::shared_ptr<const FollowedRows> base);
    // `row`: dim floats; replaces an older one.
    void Put(uint64_t key, const float* row);
    // Nothing happens if there is none.
    void Erase(uint64_t key);
    std::shared_ptr<const FollowedRows> Build();

   private:
    // A bucket of this version's own, to be changed.
    Bucket* Own(size_t index);
    void Grow();

    std::shared_ptr<FollowedRows> next_;
    std::vector<Bucket*> own_;  // by bucket; null: as in the base
  };

 private:
  FollowedRows() = default;
  size_t BucketOf(uint64_t key) const;
  static uint64_t BytesOf(const Bucket& bucket);

  int64_t dim_ = 0;
  RowInit init_;
  int64_t size_ = 0;
  uint64_t bytes_ = 0;
  int bits_ = 0;                                        // log2 of the number of buckets
  std::vector<std::shared_ptr<const Bucket>> buckets_;  // null: empty
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_FOLLOWED_ROWS_H_
