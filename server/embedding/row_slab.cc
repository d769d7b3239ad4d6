#include "server/embedding/row_slab.h"

#include "glog/logging.h"

namespace codistill {

RowSlab::RowSlab(int row_floats) : row_floats_(row_floats) {
  while ((row_floats_ * sizeof(float) << shift_) < HugeMemory::kUnit) ++shift_;
  mask_ = (1u << shift_) - 1;
}

uint32_t RowSlab::Allocate() {
  if (!free_.empty()) {
    const uint32_t row = free_.back();
    free_.pop_back();
    return row;
  }
  CHECK_LT(next_, kMaxRows) << "an embedding table of more rows than can be numbered";
  if ((next_ >> shift_) == chunks_.size()) {
    // A small table shall not take a huge page.
    chunks_.emplace_back(row_floats_ * sizeof(float) << shift_, !chunks_.empty());
  }
  return next_++;
}

uint64_t RowSlab::bytes() const {
  uint64_t bytes = free_.capacity() * sizeof(uint32_t);
  for (const HugeMemory& chunk : chunks_) bytes += chunk.size();
  return bytes;
}

void RowSlab::Clear() {
  chunks_.clear();
  free_.clear();
  next_ = 0;
}

}  // namespace codistill
