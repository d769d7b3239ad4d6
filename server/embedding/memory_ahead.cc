#include "server/embedding/memory_ahead.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "glog/logging.h"

namespace codistill {
namespace {

constexpr size_t kPage = 4096;
// One task a user at a time; a full queue only means that blocks are made where they are needed.
constexpr size_t kMaxUsers = 1024;

// Lives as long as the process, like what it is for.
Executor& Maker() {
  static Executor* const maker = [] {
    Executor::Options options;
    options.name = "memory";
    options.threads = 1;
    options.queue_capacity = kMaxUsers;
    auto executor = Executor::Create(options);
    CHECK(executor.ok()) << executor.status();
    return executor->release();
  }();
  return *maker;
}

}  // namespace

struct MemoryAhead::State {
  State(size_t block_bytes, int ahead)
      : block_bytes(block_bytes), ahead(static_cast<size_t>(ahead)) {}

  bool Wants() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    const size_t share = static_cast<size_t>(std::max(taken / kShare, 1));
    return !over && taken >= kSmall && ready.size() < std::min(ahead, share);
  }

  const size_t block_bytes;
  const size_t ahead;
  Mutex mu;
  std::vector<HugeMemory> ready ABSL_GUARDED_BY(mu);
  int taken ABSL_GUARDED_BY(mu) = 0;
  bool making ABSL_GUARDED_BY(mu) = false;
  bool over ABSL_GUARDED_BY(mu) = false;
  uint64_t cleared ABSL_GUARDED_BY(mu) = 0;  // times
};

MemoryAhead::MemoryAhead(size_t block_bytes, int ahead)
    : state_(std::make_shared<State>(block_bytes, ahead)) {}

MemoryAhead::~MemoryAhead() {
  MutexLock lock(&state_->mu);
  state_->over = true;
  state_->ready.clear();
}

HugeMemory MemoryAhead::Take() {
  HugeMemory block;
  bool make = false;
  {
    MutexLock lock(&state_->mu);
    if (!state_->ready.empty()) {
      block = std::move(state_->ready.back());
      state_->ready.pop_back();
    }
    ++state_->taken;
    make = !state_->making && state_->Wants();
    if (make) state_->making = true;
  }
  if (make && !Maker().Schedule([state = state_] { Make(state); }).ok()) {
    MutexLock lock(&state_->mu);
    state_->making = false;
  }
  if (block.data() == nullptr) return HugeMemory(state_->block_bytes, /*huge=*/true);
  return block;
}

void MemoryAhead::Make(const std::shared_ptr<State>& state) {
  while (true) {
    uint64_t cleared = 0;
    {
      MutexLock lock(&state->mu);
      if (!state->Wants()) {
        state->making = false;
        return;
      }
      cleared = state->cleared;
    }
    HugeMemory block(state->block_bytes, /*huge=*/true);
    for (size_t at = 0; at < block.size(); at += kPage) {
      *static_cast<volatile uint8_t*>(block.data() + at) = 0;
    }
    MutexLock lock(&state->mu);
    if (!state->over && state->cleared == cleared) state->ready.push_back(std::move(block));
  }
}

void MemoryAhead::Clear() {
  MutexLock lock(&state_->mu);
  state_->ready.clear();
  state_->taken = 0;
  ++state_->cleared;
}

size_t MemoryAhead::ready() const {
  MutexLock lock(&state_->mu);
  return state_->ready.size();
}

uint64_t MemoryAhead::bytes() const {
  MutexLock lock(&state_->mu);
  uint64_t bytes = 0;
  for (const HugeMemory& block : state_->ready) bytes += block.size();
  return bytes;
}

}  // namespace codistill
