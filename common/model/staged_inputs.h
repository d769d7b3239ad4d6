#ifndef CODISTILL_COMMON_MODEL_STAGED_INPUTS_H_
#define CODISTILL_COMMON_MODEL_STAGED_INPUTS_H_

#include <algorithm>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <utility>

#include "common/base/mutex.h"
#include "common/tensor/tensor.h"

namespace codistill {

// What has been brought to a device ahead of the pass that will take it, by the host tensor it was
// made of. Bounded in bytes; of a tensor that nobody holds any more, because its batch is not
// wanted, the copy is dropped. Thread-safe.
template <typename Copy>
class StagedInputs {
 public:
  explicit StagedInputs(int64_t most_bytes) : most_bytes_(most_bytes) {}

  // Whether there is room for the copy of `input`; if so, it is counted from now on, and Put or
  // GiveUp must follow.
  bool Reserve(const Tensor& input) {
    MutexLock lock(&mu_);
    entries_.remove_if([this](const Entry& entry) {
      const bool gone = entry.copy.has_value() && entry.owner.expired();
      if (gone) bytes_ -= entry.bytes;
      return gone;
    });
    const auto bytes = static_cast<int64_t>(input.bytes());
    const bool here = std::any_of(entries_.begin(), entries_.end(),
                                  [&input](const Entry& entry) { return entry.Is(input); });
    if (here || bytes_ + bytes > most_bytes_) return false;
    bytes_ += bytes;
    entries_.push_back({input.data(), input.owner(), bytes, std::nullopt});
    return true;
  }
  void Put(const Tensor& input, Copy copy) {
    MutexLock lock(&mu_);
    for (Entry& entry : entries_) {
      if (entry.Is(input)) entry.copy = std::move(copy);
    }
  }
  void GiveUp(const Tensor& input) {
    MutexLock lock(&mu_);
    Remove(input);
  }
  // The copy of `input`, if it is here; it is forgotten.
  std::optional<Copy> Take(const Tensor& input) {
    MutexLock lock(&mu_);
    for (Entry& entry : entries_) {
      if (!entry.Is(input) || !entry.copy.has_value()) continue;
      std::optional<Copy> copy = std::move(entry.copy);
      Remove(input);
      return copy;
    }
    return std::nullopt;
  }
  int64_t bytes() const {
    MutexLock lock(&mu_);
    return bytes_;
  }

 private:
  struct Entry {
    const void* data = nullptr;
    std::weak_ptr<const void> owner;
    int64_t bytes = 0;
    std::optional<Copy> copy;  // none: being made

    // The same address alone might be another tensor's by now.
    bool Is(const Tensor& input) const {
      return data == input.data() && !owner.owner_before(input.owner()) &&
             !input.owner().owner_before(owner);
    }
  };
  void Remove(const Tensor& input) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    entries_.remove_if([&](const Entry& entry) {
      const bool is = entry.Is(input);
      if (is) bytes_ -= entry.bytes;
      return is;
    });
  }

  const int64_t most_bytes_;
  mutable Mutex mu_;
  std::list<Entry> entries_ ABSL_GUARDED_BY(mu_);
  int64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_STAGED_INPUTS_H_
