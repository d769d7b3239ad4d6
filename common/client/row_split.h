#ifndef CODISTILL_COMMON_CLIENT_ROW_SPLIT_H_
#define CODISTILL_COMMON_CLIENT_ROW_SPLIT_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/types/span.h"
#include "common/embedding/row_placement.h"

namespace codistill {

// Keys by the shard that holds them, each shard's in their order. With one shard nothing is copied:
// `keys` must outlive this. Immutable once made.
class RowSplit {
 public:
  RowSplit(absl::Span<const uint64_t> keys, int num_shards) : all_(keys) {
    if (num_shards == 1) return;
    shards_.resize(num_shards);
    const size_t expected = keys.size() / num_shards + keys.size() / (8 * num_shards) + 16;
    for (Shard& shard : shards_) {
      shard.keys.reserve(expected);
      shard.places.reserve(expected);
    }
    for (size_t i = 0; i < keys.size(); ++i) {
      Shard& shard = shards_[ShardOfKey(keys[i], num_shards)];
      shard.keys.push_back(keys[i]);
      shard.places.push_back(static_cast<uint32_t>(i));
    }
  }

  absl::Span<const uint64_t> keys(int shard) const {
    return shards_.empty() ? all_ : absl::MakeConstSpan(shards_[shard].keys);
  }
  // Whether a shard's rows lie together, in the order of its keys, in an array of all rows.
  bool contiguous() const { return shards_.empty(); }
  // Where the row of a shard's i-th key is in an array of all rows.
  size_t place(int shard, size_t i) const { return shards_.empty() ? i : shards_[shard].places[i]; }

  // Copies rows [first, first + count) of a shard from an array of all rows.
  void CopyRows(int shard, size_t first, size_t count, size_t row_bytes, const void* all,
                void* to) const {
    const auto* const from = static_cast<const uint8_t*>(all);
    if (contiguous()) {
      std::memcpy(to, from + first * row_bytes, count * row_bytes);
      return;
    }
    auto* next = static_cast<uint8_t*>(to);
    for (size_t i = first; i < first + count; ++i, next += row_bytes) {
      std::memcpy(next, from + size_t{shards_[shard].places[i]} * row_bytes, row_bytes);
    }
  }

 private:
  struct Shard {
    std::vector<uint64_t> keys;
    std::vector<uint32_t> places;
  };
  const absl::Span<const uint64_t> all_;
  std::vector<Shard> shards_;  // empty with one shard
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_ROW_SPLIT_H_
