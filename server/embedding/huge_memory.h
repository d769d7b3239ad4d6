#ifndef CODISTILL_SERVER_EMBEDDING_HUGE_MEMORY_H_
#define CODISTILL_SERVER_EMBEDDING_HUGE_MEMORY_H_

#include <cstddef>
#include <cstdint>

namespace codistill {

// Zeroed memory in whole multiples of 2 MiB, on a 2 MiB boundary and, where the kernel has them,
// huge pages: a random access to a table of gigabytes costs a cache miss, not a walk of the page
// table too. Movable, not copyable. Dies with the process where the system has no memory left.
class HugeMemory {
 public:
  static constexpr size_t kUnit = size_t{2} << 20;

  HugeMemory() = default;
  // `huge` false: ordinary pages, touched as they are used, for what may stay small.
  HugeMemory(size_t bytes, bool huge);
  ~HugeMemory();
  HugeMemory(HugeMemory&& other) noexcept { *this = static_cast<HugeMemory&&>(other); }
  HugeMemory& operator=(HugeMemory&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_HUGE_MEMORY_H_
