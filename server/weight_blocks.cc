#include "server/weight_blocks.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace codistill {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kHugePageBytes = size_t{2} << 20;
// Blocks are allocated this many at a time, so that small ones share a page and large ones huge
// pages.
constexpr size_t kBlocksAtOnce = 16;

}  // namespace

namespace internal {

struct BlockPoolState {
  struct Free {
    size_t alignment;
    void operator()(uint8_t* memory) const {
      ::operator delete(memory, std::align_val_t(alignment));
    }
  };

  // Adds `count` free blocks; touches their pages if `touch`.
  void Grow(size_t count, size_t block_bytes, bool touch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    const size_t bytes = count * block_bytes;
    const size_t alignment = bytes >= kHugePageBytes ? kHugePageBytes : size_t{64};
    slabs.emplace_back(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(alignment))),
                       Free{alignment});
    uint8_t* const memory = slabs.back().get();
#ifdef MADV_HUGEPAGE
    // Advice: memory in small pages serves as well, only slower.
    if (bytes >= kHugePageBytes) {
      (void)madvise(memory, bytes / kPageBytes * kPageBytes, MADV_HUGEPAGE);
    }
#endif
    if (touch) {
      for (size_t i = 0; i < bytes; i += kPageBytes) memory[i] = 0;
    }
    for (size_t i = count; i > 0; --i) {  // the lowest address is taken first
      blocks.emplace_back();
      blocks.back().data = memory + (i - 1) * block_bytes;
      free.push_back(&blocks.back());
    }
  }

  Mutex mu;
  std::vector<std::unique_ptr<uint8_t, Free>> slabs ABSL_GUARDED_BY(mu);
  std::deque<Block> blocks ABSL_GUARDED_BY(mu);  // a deque: they never move
  std::vector<Block*> free ABSL_GUARDED_BY(mu);
};

void ReturnBlock(Block* block) {
  const std::shared_ptr<BlockPoolState> state = std::move(block->state);
  MutexLock lock(&state->mu);
  state->free.push_back(block);
}

}  // namespace internal

BlockPool::BlockPool(size_t block_bytes)
    : block_bytes_(std::max<size_t>(block_bytes, 64)),
      state_(std::make_shared<internal::BlockPoolState>()) {}

BlockPool::~BlockPool() = default;

BlockRef BlockPool::Get() {
  internal::Block* block = nullptr;
  {
    MutexLock lock(&state_->mu);
    if (state_->free.empty()) state_->Grow(kBlocksAtOnce, block_bytes_, false);
    block = state_->free.back();
    state_->free.pop_back();
  }
  block->state = state_;
  block->references.store(1, std::memory_order_relaxed);
  return BlockRef(block);
}

void BlockPool::Reserve(size_t count) {
  MutexLock lock(&state_->mu);
  if (state_->free.size() < count) {
    state_->Grow(count - state_->free.size(), block_bytes_, true);
  }
}

size_t BlockPool::in_use() const {
  MutexLock lock(&state_->mu);
  return state_->blocks.size() - state_->free.size();
}

size_t BlockPool::allocated() const {
  MutexLock lock(&state_->mu);
  return state_->blocks.size();
}

BlockArray::BlockArray(BlockPool* pool, uint64_t bytes) {
  const uint64_t count = (bytes + pool->block_bytes() - 1) / pool->block_bytes();
  blocks_.reserve(count);
  for (uint64_t i = 0; i < count; ++i) blocks_.push_back(pool->Get());
}

}  // namespace codistill
