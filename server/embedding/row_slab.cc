#include "server/embedding/row_slab.h"

#include "glog/logging.h"

namespace codistill {
namespace {

// A few large batches of new rows.
constexpr int kChunksAhead = 16;

}  // namespace

RowSlab::RowSlab(int row_floats) : row_floats_(row_floats) {
  while ((row_floats_ * sizeof(float) << shift_) < HugeMemory::kUnit) ++shift_;
  mask_ = (1u << shift_) - 1;
  ahead_ = std::make_unique<MemoryAhead>(row_floats_ * sizeof(float) << shift_, kChunksAhead);
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
    chunks_.push_back(chunks_.empty()
                          ? HugeMemory(row_floats_ * sizeof(float) << shift_, /*huge=*/false)
                          : ahead_->Take());
  }
  return next_++;
}

uint64_t RowSlab::bytes() const {
  uint64_t bytes = free_.capacity() * sizeof(uint32_t) + ahead_->bytes();
  for (const HugeMemory& chunk : chunks_) bytes += chunk.size();
  return bytes;
}

void RowSlab::Clear() {
  chunks_.clear();
  ahead_->Clear();
  free_.clear();
  next_ = 0;
}

}  // namespace codistill
