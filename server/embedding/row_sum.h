#ifndef CODISTILL_SERVER_EMBEDDING_ROW_SUM_H_
#define CODISTILL_SERVER_EMBEDDING_ROW_SUM_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace codistill {

// Weighted sums of rows by key, in the order in which keys first come: what a step makes of the
// pushes of several ranks. Used by one thread.
class RowSum {
 public:
  explicit RowSum(int dim) : dim_(dim) {}

  // Adds weight * row to the sum of each key.
  void Add(absl::Span<const uint64_t> keys, absl::Span<const float> rows, float weight);

  absl::Span<const uint64_t> keys() const { return keys_; }
  absl::Span<const float> rows() const { return rows_; }  // keys().size() * dim

 private:
  void Grow(size_t more);

  const int dim_;
  std::vector<uint64_t> keys_;
  std::vector<float> rows_;
  std::vector<uint32_t> places_;  // by hash, linear probing: index in keys_ plus 1; 0 = free
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_ROW_SUM_H_
