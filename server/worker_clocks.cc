#include "server/worker_clocks.h"

#include <algorithm>

namespace codistill {

WorkerClocks::WorkerClocks(int num_workers, int num_shards) : clocks_(num_workers) {
  for (Clock& clock : clocks_) clock.decided.assign(num_shards, 0);
}

void WorkerClocks::Join(int32_t rank, int64_t step) {
  clocks_[rank].counts = true;
  Over(rank, step);
  Update();
}

void WorkerClocks::Leave(int32_t rank) {
  clocks_[rank].counts = false;
  Update();
}

void WorkerClocks::Decided(int32_t rank, int shard, int64_t step) {
  Clock& clock = clocks_[rank];
  clock.decided[shard] = std::max(clock.decided[shard], step);
  Over(rank, *std::min_element(clock.decided.begin(), clock.decided.end()));
}

void WorkerClocks::Over(int32_t rank, int64_t step) {
  Clock& clock = clocks_[rank];
  if (step <= clock.completed) return;
  const bool slowest = clock.completed == slowest_;
  clock.completed = step;
  if (slowest) Update();
}

int32_t WorkerClocks::SlowestRank() const {
  for (size_t rank = 0; rank < clocks_.size(); ++rank) {
    if (clocks_[rank].counts && clocks_[rank].completed == slowest_) {
      return static_cast<int32_t>(rank);
    }
  }
  return -1;
}

void WorkerClocks::Update() {
  bool any = false;
  int64_t smallest = 0, largest = 0;
  for (const Clock& clock : clocks_) {
    largest = std::max(largest, clock.completed);
    if (!clock.counts) continue;
    smallest = any ? std::min(smallest, clock.completed) : clock.completed;
    any = true;
  }
  slowest_ = any ? smallest : largest;
}

}  // namespace codistill
