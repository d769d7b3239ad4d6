#include "server/embedding/table_snapshot.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace codistill {

EmbeddingTable::SnapshotImpl::~SnapshotImpl() {
  MutexLock lock(&table_->mu_);
  auto& all = table_->snapshots_;
  all.erase(std::remove(all.begin(), all.end(), this), all.end());
}

// Whether the row was there at the snapshot's step, by the rules of then.
bool EmbeddingTable::SnapshotImpl::Wanted(const Entry& entry) const {
  return entry.value != RowIndex::kEmpty && entry.touched <= step_ && entry.touched > since_ &&
         entry.touched >= floor_ && !table_->ExpiredByAge(entry, static_cast<uint32_t>(step_ + 1));
}

void EmbeddingTable::SnapshotImpl::Append(const Entry& entry, Rows* rows) const {
  if ((entry.value & RowIndex::kWaiting) != 0) {
    rows->waiting.push_back(entry.key);
    rows->waiting_touched.push_back(entry.touched);
    rows->waiting_count.push_back(entry.value & RowIndex::kNumber);
    return;
  }
  const float* const row = table_->slab_.At(entry.value & RowIndex::kNumber);
  rows->keys.push_back(entry.key);
  rows->touched.push_back(entry.touched);
  rows->data.insert(rows->data.end(), row, row + table_->optimizer_.row_floats());
}

void EmbeddingTable::SnapshotImpl::SetAside(const Entry& entry, const RowIndex::Segment& segment,
                                            uint32_t use) {
  if (use <= step_ || (segment.passed & bit_) != 0 || !Wanted(entry)) return;
  Append(entry, &aside_);
}

bool EmbeddingTable::SnapshotImpl::Next(Rows* rows) {
  rows->clear();
  while (true) {
    MutexLock lock(&table_->mu_);
    if (abandoned_) return false;
    if (!aside_.empty()) {
      std::swap(*rows, aside_);
      return true;
    }
    const auto& segments = table_->index_.segments();
    // What a split made of a segment already passed is passed too.
    while (next_segment_ < segments.size() && (segments[next_segment_]->passed & bit_) != 0) {
      ++next_segment_;
    }
    if (next_segment_ == segments.size()) return false;
    RowIndex::Segment& segment = *segments[next_segment_++];
    segment.passed |= bit_;
    // The rows lie anywhere: ask for those of the groups ahead.
    constexpr uint32_t kAhead = 8;
    const size_t row_bytes = table_->optimizer_.row_floats() * sizeof(float);
    for (uint32_t g = 0; g < segment.groups + kAhead; ++g) {
      if (g < segment.groups) {
        for (const Entry& entry : segment.group(g)->entries) {
          if ((entry.value & RowIndex::kWaiting) != 0 || !Wanted(entry)) continue;
          const auto* const row =
              reinterpret_cast<const char*>(table_->slab_.At(entry.value & RowIndex::kNumber));
          for (size_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(row + at);
        }
      }
      if (g < kAhead) continue;
      for (const Entry& entry : segment.group(g - kAhead)->entries) {
        if (Wanted(entry)) Append(entry, rows);
      }
    }
    if (!rows->empty()) return true;
  }
}

absl::StatusOr<std::unique_ptr<EmbeddingTable::Snapshot>> EmbeddingTable::TakeSnapshot(
    int64_t since) {
  MutexLock lock(&mu_);
  uint32_t taken = 0;
  for (const SnapshotImpl* snapshot : snapshots_) taken |= snapshot->bit();
  uint32_t bit = 1;
  while ((taken & bit) != 0) bit <<= 1;
  if (bit >> kMaxSnapshots != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("embedding table ", options_.name, ": ",
                                                     kMaxSnapshots, " snapshots are read already"));
  }
  for (const auto& segment : index_.segments()) segment->passed &= ~bit;
  auto snapshot = std::make_unique<SnapshotImpl>(this, step_, since, floor_, bit);
  snapshots_.push_back(snapshot.get());
  return std::unique_ptr<Snapshot>(std::move(snapshot));
}

}  // namespace codistill
