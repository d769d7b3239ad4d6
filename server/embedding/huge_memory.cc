#include "server/embedding/huge_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "glog/logging.h"

namespace codistill {

HugeMemory::HugeMemory(size_t bytes, bool huge) : size_((bytes + kUnit - 1) / kUnit * kUnit) {
  // A unit more than needed, so that what is on a boundary can be kept.
  const size_t mapped = size_ + kUnit;
  void* const got =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(got != MAP_FAILED) << "no " << size_
                           << " bytes of memory for an embedding table: " << std::strerror(errno);
  uint8_t* const begin = static_cast<uint8_t*>(got);
  const size_t before = (kUnit - reinterpret_cast<uintptr_t>(begin) % kUnit) % kUnit;
  data_ = begin + before;
  if (before > 0) munmap(begin, before);
  munmap(data_ + size_, kUnit - before);
  // Advice: a kernel without huge pages serves as well, more slowly.
  madvise(data_, size_, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

HugeMemory::~HugeMemory() {
  if (data_ != nullptr) munmap(data_, size_);
}

HugeMemory& HugeMemory::operator=(HugeMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace codistill
