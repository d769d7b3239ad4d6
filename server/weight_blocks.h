#ifndef CODISTILL_SERVER_WEIGHT_BLOCKS_H_
#define CODISTILL_SERVER_WEIGHT_BLOCKS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "common/base/mutex.h"

// Reference-counted memory for weights and optimizer slots. What a shard holds is cut into blocks
// of one size; a version of it is a list of references to blocks. To keep a version is to copy that
// list; to change one, its writer writes blocks in place that nobody else holds and the others
// into fresh blocks (copy-on-write without the copy: an update reads every old value and writes
// every new one anyway).
namespace codistill {

class BlockPool;

namespace internal {

// Books of one pool; lives until the pool and its last block in use are gone.
struct BlockPoolState;

struct Block {
  std::atomic<uint32_t> references{0};
  uint8_t* data = nullptr;
  std::shared_ptr<BlockPoolState> state;  // while in use
};

void ReturnBlock(Block* block);

}  // namespace internal

// A counted reference to one block, or to none. Copies refer to the same bytes. Different
// references may be used by different threads, one reference by one thread at a time.
class BlockRef {
 public:
  BlockRef() = default;
  BlockRef(const BlockRef& other) : block_(other.block_) {
    if (block_ != nullptr) block_->references.fetch_add(1, std::memory_order_relaxed);
  }
  BlockRef(BlockRef&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  BlockRef& operator=(BlockRef other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~BlockRef() {
    if (block_ != nullptr && block_->references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      internal::ReturnBlock(block_);
    }
  }

  explicit operator bool() const { return block_ != nullptr; }
  const uint8_t* data() const { return block_->data; }
  // Only for the one who writes the block, while no reader may see it.
  uint8_t* mutable_data() { return block_->data; }

  // Whether this is the only reference. Once true it stays true until this one is copied, and all
  // that other holders read was read before.
  bool unique() const { return block_->references.load(std::memory_order_acquire) == 1; }

 private:
  friend class BlockPool;
  explicit BlockRef(internal::Block* block) : block_(block) {}  // takes the first reference over

  internal::Block* block_ = nullptr;
};

// Where blocks come from and return to. Freed blocks are kept for the next user, so that a running
// group touches no fresh pages. Blocks may outlive the pool. Thread-safe.
class BlockPool {
 public:
  // Of a block that is as large as a bulk frame's payload, so that a frame is one block.
  static constexpr size_t kMaxBlockBytes = size_t{1} << 20;

  // `block_bytes` is a multiple of 64, at most kMaxBlockBytes. Blocks begin at multiples of 64
  // bytes, those of kMaxBlockBytes at multiples of a page, in huge pages where the system has them.
  explicit BlockPool(size_t block_bytes);
  ~BlockPool();
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // Contents are what the last user left.
  BlockRef Get();

  // Makes sure that `count` blocks can be taken without touching a fresh page.
  void Reserve(size_t count);

  size_t block_bytes() const { return block_bytes_; }
  size_t in_use() const;     // blocks
  size_t allocated() const;  // blocks, in use or free

 private:
  const size_t block_bytes_;
  const std::shared_ptr<internal::BlockPoolState> state_;
};

// `bytes` bytes in blocks: byte o is byte o % block_bytes of block o / block_bytes. A copy is
// another version that shares every block with this one.
class BlockArray {
 public:
  BlockArray() = default;
  // Takes the blocks from the pool; contents are unspecified.
  BlockArray(BlockPool* pool, uint64_t bytes);

  size_t size() const { return blocks_.size(); }  // in blocks
  BlockRef& operator[](size_t i) { return blocks_[i]; }
  const BlockRef& operator[](size_t i) const { return blocks_[i]; }

 private:
  std::vector<BlockRef> blocks_;
};

// The next contents of one block of an array: in place where nobody else holds the block,
// otherwise in a fresh one that takes its place. Between construction and Commit the caller reads
// from() and writes all of to() that matters; both are the same memory in the first case.
class BlockUpdate {
 public:
  BlockUpdate(BlockPool* pool, BlockRef* block) : block_(block) {
    if (!block->unique()) fresh_ = pool->Get();
  }

  bool in_place() const { return !fresh_; }
  const uint8_t* from() const { return block_->data(); }
  uint8_t* to() { return fresh_ ? fresh_.mutable_data() : block_->mutable_data(); }
  void Commit() {
    if (fresh_) *block_ = std::move(fresh_);
  }

 private:
  BlockRef* const block_;
  BlockRef fresh_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_WEIGHT_BLOCKS_H_
