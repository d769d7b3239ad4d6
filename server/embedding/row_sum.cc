#include "server/embedding/row_sum.h"

#include <algorithm>

#include "common/embedding/row_placement.h"

namespace codistill {

void RowSum::Grow(size_t more) {
  // Half full at most.
  size_t size = std::max<size_t>(places_.size(), 64);
  while (size < 2 * (keys_.size() + more)) size *= 2;
  if (size == places_.size()) return;
  places_.assign(size, 0);
  for (size_t i = 0; i < keys_.size(); ++i) {
    size_t at = KeyHash(keys_[i]) & (size - 1);
    while (places_[at] != 0) at = (at + 1) & (size - 1);
    places_[at] = static_cast<uint32_t>(i + 1);
  }
}

void RowSum::Add(absl::Span<const uint64_t> keys, absl::Span<const float> rows, float weight) {
  Grow(keys.size());
  const size_t mask = places_.size() - 1;
  for (size_t i = 0; i < keys.size(); ++i) {
    const float* const from = rows.data() + i * dim_;
    size_t at = KeyHash(keys[i]) & mask;
    while (places_[at] != 0 && keys_[places_[at] - 1] != keys[i]) at = (at + 1) & mask;
    if (places_[at] == 0) {
      keys_.push_back(keys[i]);
      places_[at] = static_cast<uint32_t>(keys_.size());
      const size_t first = rows_.size();
      rows_.resize(first + dim_);
      for (int d = 0; d < dim_; ++d) rows_[first + d] = weight * from[d];
    } else {
      float* const to = rows_.data() + static_cast<size_t>(places_[at] - 1) * dim_;
      for (int d = 0; d < dim_; ++d) to[d] += weight * from[d];
    }
  }
}

}  // namespace codistill
