#ifndef CODISTILL_SERVER_ALIGNED_BUFFER_H_
#define CODISTILL_SERVER_ALIGNED_BUFFER_H_

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "common/base/mutex.h"

namespace codistill {

// A fixed number of bytes at a 64-byte boundary, uninitialised: where a shard keeps weights, slots
// and staged gradients. Movable, not copyable.
class AlignedBuffer {
 public:
  static constexpr size_t kAlignment = 64;

  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size) : data_(Allocate(size)), size_(size) {}

  uint8_t* data() { return data_.get(); }
  const uint8_t* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    std::align_val_t alignment;
    void operator()(uint8_t* data) const { ::operator delete(data, alignment); }
  };
  // Large buffers lie in huge pages where the system has them.
  static std::unique_ptr<uint8_t, Free> Allocate(size_t size) {
    constexpr size_t kHugePage = size_t{2} << 20;
    const bool large = size >= 2 * kHugePage;
    const auto alignment = std::align_val_t(large ? kHugePage : kAlignment);
    auto* const data = size == 0 ? nullptr : static_cast<uint8_t*>(::operator new(size, alignment));
#ifdef MADV_HUGEPAGE
    // Advice: small pages serve as well, only slower.
    if (large) (void)madvise(data, size, MADV_HUGEPAGE);
#endif
    return std::unique_ptr<uint8_t, Free>(data, Free{alignment});
  }

  std::unique_ptr<uint8_t, Free> data_ = Allocate(0);
  size_t size_ = 0;
};

// Buffers of one size that go round: everything as large as a shard (staged pushes, cuts,
// snapshots) is taken from here, so that a running group touches no fresh pages. At most `max_free`
// unused ones are kept. Buffers may outlive the pool. Thread-safe.
class BufferPool {
 public:
  BufferPool(size_t buffer_size, size_t max_free)
      : buffer_size_(buffer_size), state_(std::make_shared<State>(max_free)) {}

  // Contents are what the last user left.
  std::shared_ptr<AlignedBuffer> Get() {
    std::unique_ptr<AlignedBuffer> buffer;
    {
      MutexLock lock(&state_->mu);
      if (!state_->free.empty()) {
        buffer = std::move(state_->free.back());
        state_->free.pop_back();
      }
    }
    if (buffer == nullptr) buffer = std::make_unique<AlignedBuffer>(buffer_size_);
    std::shared_ptr<State> state = state_;
    return std::shared_ptr<AlignedBuffer>(buffer.release(), [state](AlignedBuffer* used) {
      std::unique_ptr<AlignedBuffer> owned(used);
      MutexLock lock(&state->mu);
      if (state->free.size() < state->max_free) state->free.push_back(std::move(owned));
    });
  }

 private:
  struct State {
    explicit State(size_t max) : max_free(max) {}
    const size_t max_free;
    Mutex mu;
    std::vector<std::unique_ptr<AlignedBuffer>> free ABSL_GUARDED_BY(mu);
  };
  const size_t buffer_size_;
  const std::shared_ptr<State> state_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_ALIGNED_BUFFER_H_
