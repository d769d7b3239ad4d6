#ifndef CODISTILL_SERVER_EMBEDDING_MEMORY_AHEAD_H_
#define CODISTILL_SERVER_EMBEDDING_MEMORY_AHEAD_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "server/embedding/huge_memory.h"

namespace codistill {

// Zeroed blocks of one size for something that grows, the next few of which are made ready by a
// thread of the process in the background: the kernel zeroes fresh pages when they are first
// touched, which for the five huge pages of a large batch of new rows takes as long as the rows
// themselves. Nothing is made ahead for what stays small. Thread-safe.
class MemoryAhead {
 public:
  // `ahead`: blocks kept ready at most: one for kShare taken, once kSmall have been.
  MemoryAhead(size_t block_bytes, int ahead);
  // Does not wait for a block that is being made.
  ~MemoryAhead();
  MemoryAhead(const MemoryAhead&) = delete;
  MemoryAhead& operator=(const MemoryAhead&) = delete;

  static constexpr int kSmall = 8;
  static constexpr int kShare = 16;

  // A block that was made ready, or a fresh one where there is none.
  HugeMemory Take();
  // What is ready goes, and counting begins anew.
  void Clear();

  size_t ready() const;    // blocks
  uint64_t bytes() const;  // of them

 private:
  struct State;
  static void Make(const std::shared_ptr<State>& state);

  const std::shared_ptr<State> state_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_MEMORY_AHEAD_H_
