#ifndef CODISTILL_COMMON_EMBEDDING_DEFAULT_ROW_H_
#define CODISTILL_COMMON_EMBEDDING_DEFAULT_ROW_H_

#include <cstdint>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace codistill {

// What the rows of one embedding table are before anything was learned about their keys.
struct RowInit {
  uint64_t seed = 0;  // of this table, see TableSeed
  float scale = 0;    // elements are uniform in [-scale, scale); 0 = zeros
};

// A table's own seed: tables of one job, and equal tables of two groups, start from different rows.
uint64_t TableSeed(uint64_t seed, absl::string_view group, absl::string_view table);

// The row of a key nobody has trained: a function of (init, key) alone, the same on every machine,
// so that it does not matter when a key first arrives, and whoever meets a key without a row (a
// shard, a worker, a follower) computes the row by itself. About 10 ns for 16 elements.
void DefaultRow(const RowInit& init, uint64_t key, absl::Span<float> row);

}  // namespace codistill

#endif  // CODISTILL_COMMON_EMBEDDING_DEFAULT_ROW_H_
