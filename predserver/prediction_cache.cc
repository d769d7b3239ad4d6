#include "predserver/prediction_cache.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace codistill {
namespace {

// What an allocation takes beside its bytes, rounding included.
constexpr int64_t kHeapBytes = 24;

}  // namespace

int64_t PredictionCache::SlotBytes() const {
  return row_floats() * static_cast<int64_t>(sizeof(float)) + kHeapBytes +
         static_cast<int64_t>(sizeof(Slot));
}

bool PredictionCache::Prepare(int64_t floats) {
  if (row_floats() == 0) {
    MutexLock lock(&prepare_mu_);
    if (row_floats() == 0) {
      // A flat_hash_map that is never more than 25/32 full does not grow, however often entries
      // come and go; one of n entries reserved so has at most 18/7 n places, each with a byte of
      // its own.
      constexpr int64_t kPlaceBytes = sizeof(std::pair<const Key, uint32_t>) + 1;
      const int64_t each = floats * static_cast<int64_t>(sizeof(float)) + kHeapBytes +
                           static_cast<int64_t>(sizeof(Slot)) + kPlaceBytes * 18 / 7 + 1;
      slots_each_ = static_cast<size_t>(
          std::max<int64_t>(0, limit_ / static_cast<int64_t>(kShards) - 4 * kPlaceBytes) / each);
      for (Shard& shard : shards_) {
        MutexLock shard_lock(&shard.mu);
        // For good: growing would need the old and the new table at once.
        shard.slots.reserve(slots_each_);
        shard.index.reserve(slots_each_ * 9 / 8 + (slots_each_ > 0 ? 1 : 0));
      }
      row_floats_.store(floats, std::memory_order_release);
    }
  }
  return row_floats() == floats && slots_each_ > 0;
}

bool PredictionCache::Find(const Key& key, int64_t least_step, float* to, Origin* origin) {
  Shard& shard = ShardOf(key);
  MutexLock lock(&shard.mu);
  const auto found = shard.index.find(key);
  if (found == shard.index.end()) return false;
  Slot& slot = shard.slots[found->second];
  if (slot.origin.step < least_step) return false;
  slot.wanted = true;
  *origin = slot.origin;
  std::memcpy(to, slot.row.get(), static_cast<size_t>(row_floats()) * sizeof(float));
  return true;
}

PredictionCache::Slot* PredictionCache::FreeSlot(Shard* shard) {
  if (shard->slots.size() < slots_each_) {
    Slot& slot = shard->slots.emplace_back();
    slot.row.reset(new float[row_floats()]);
    return &slot;
  }
  // Ends within two rounds: the first takes every mark away.
  while (true) {
    Slot& slot = shard->slots[shard->hand];
    shard->hand = (shard->hand + 1) % shard->slots.size();
    if (std::exchange(slot.wanted, false)) continue;
    shard->index.erase(slot.key);
    return &slot;
  }
}

void PredictionCache::Insert(const Key& key, const Origin& origin, const float* row,
                             int64_t floats) {
  if (!Prepare(floats)) return;
  Shard& shard = ShardOf(key);
  MutexLock lock(&shard.mu);
  Slot* slot = nullptr;
  const auto found = shard.index.find(key);
  if (found != shard.index.end()) {
    slot = &shard.slots[found->second];
    if (slot->origin.step >= origin.step) return;
  } else {
    slot = FreeSlot(&shard);
    slot->key = key;
    shard.index[key] = static_cast<uint32_t>(slot - shard.slots.data());
  }
  slot->origin = origin;
  std::memcpy(slot->row.get(), row, static_cast<size_t>(floats) * sizeof(float));
}

bool PredictionCache::Claim(const Key& key, const void* owner) {
  Shard& shard = ShardOf(key);
  MutexLock lock(&shard.mu);
  Flight& flight = shard.flights[key];
  if (flight.owner == nullptr) flight.owner = owner;
  return flight.owner == owner;
}

bool PredictionCache::Wait(const Key& key, const std::shared_ptr<Waiter>& waiter) {
  Shard& shard = ShardOf(key);
  MutexLock lock(&shard.mu);
  const auto flight = shard.flights.find(key);
  if (flight == shard.flights.end()) return false;
  waiter->left_.fetch_add(1);
  flight->second.waiters.push_back(waiter);
  return true;
}

void PredictionCache::Release(const std::vector<Key>& keys, const void* owner) {
  std::vector<std::shared_ptr<Waiter>> waiters;
  for (const Key& key : keys) {
    Shard& shard = ShardOf(key);
    MutexLock lock(&shard.mu);
    const auto flight = shard.flights.find(key);
    if (flight == shard.flights.end() || flight->second.owner != owner) continue;
    for (auto& waiter : flight->second.waiters) waiters.push_back(std::move(waiter));
    shard.flights.erase(flight);
  }
  for (const auto& waiter : waiters) waiter->Released();
}

int64_t PredictionCache::bytes() const {
  int64_t bytes = 0;
  for (const Shard& shard : shards_) {
    MutexLock lock(&shard.mu);
    bytes +=
        static_cast<int64_t>(shard.slots.size()) * SlotBytes() +
        static_cast<int64_t>(shard.index.capacity() * (sizeof(std::pair<const Key, uint32_t>) + 1));
  }
  return bytes;
}

}  // namespace codistill
