#ifndef CODISTILL_SERVER_EMBEDDING_ROW_SLAB_H_
#define CODISTILL_SERVER_EMBEDDING_ROW_SLAB_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "server/embedding/huge_memory.h"
#include "server/embedding/memory_ahead.h"

namespace codistill {

// Rows of one size by number. They never move; memory grows by 2 to 4 MiB at a time and freed rows
// are used again first. Not thread-safe.
class RowSlab {
 public:
  static constexpr uint32_t kMaxRows = 1u << 30;

  explicit RowSlab(int row_floats);

  // Contents are what the last user left. There must be fewer than kMaxRows.
  uint32_t Allocate();
  void Free(uint32_t row) { free_.push_back(row); }

  float* At(uint32_t row) const {
    return reinterpret_cast<float*>(chunks_[row >> shift_].data()) +
           static_cast<size_t>(row & mask_) * row_floats_;
  }

  size_t rows() const { return next_ - free_.size(); }
  uint64_t bytes() const;
  void Clear();

 private:
  const size_t row_floats_;
  int shift_ = 0;  // log2 of the rows of a chunk
  uint32_t mask_ = 0;
  std::unique_ptr<MemoryAhead> ahead_;
  std::vector<HugeMemory> chunks_;
  std::vector<uint32_t> free_;
  uint32_t next_ = 0;  // first row never used
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_ROW_SLAB_H_
