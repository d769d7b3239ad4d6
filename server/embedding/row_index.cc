#include "server/embedding/row_index.h"

#include <algorithm>

#include "glog/logging.h"

namespace codistill {
namespace {

using Segment = RowIndex::Segment;
using Group = RowIndex::Group;
using Entry = RowIndex::Entry;

// A quarter of what a slab of rows wants, whose entries these are.
constexpr int kUnitsAhead = 4;

constexpr size_t kBlockBytes = RowIndex::kBlockGroups * sizeof(Group);

// Random keys fill all segments at one pace. So that they do not all grow in the same batch, each
// has limits of its own, by its place in the order of their making: it grows when it is 75 to 81 %
// full, and has one to four blocks modulo four.
uint32_t MaxEntries(uint32_t groups, uint32_t ordinal) {
  return groups * RowIndex::kGroupEntries / 256 * (192 + ordinal / 4 % 17);
}

uint32_t NextBlocks(uint32_t blocks) { return blocks < 4 ? 2 * blocks : blocks + 4; }

// Of a segment that splits rather than grow beyond. Two sizes, so that half as many split in the
// same batch.
uint32_t MaxBlocks(uint32_t ordinal) {
  return ordinal / 4 % 2 == 0 ? RowIndex::kMaxBlocks : RowIndex::kMaxBlocks - 4;
}

// For half a segment's entries after a split, mostly: 15 to 20 blocks.
uint32_t BlocksFor(size_t entries, uint32_t ordinal) {
  uint32_t blocks = 13 + ordinal % 4;
  while (blocks < RowIndex::kMaxBlocks &&
         entries >= MaxEntries(blocks * RowIndex::kBlockGroups, ordinal)) {
    blocks = std::min(NextBlocks(blocks), RowIndex::kMaxBlocks);
  }
  return blocks;
}

// Of 2^30 segments, filled evenly by a good hash, none is ever needed.
constexpr uint32_t kMaxDepth = 30;

void MakeEmpty(Group* groups, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    for (Entry& entry : groups[i].entries) entry = {0, 0, RowIndex::kEmpty};
  }
}

}  // namespace

RowIndex::RowIndex() : ahead_(HugeMemory::kUnit, kUnitsAhead) { Clear(); }

void RowIndex::Clear() {
  directory_.clear();
  segments_.clear();
  free_blocks_.clear();
  memory_.clear();
  ahead_.Clear();
  memory_used_ = 0;
  size_ = 0;
  mask_ = 0;
  ++moves_;
  segments_.push_back(std::make_unique<Segment>());
  SetBlocks(segments_.back().get(), 1);
  directory_.push_back(segments_.back().get());
}

uint64_t RowIndex::bytes() const {
  uint64_t bytes = directory_.capacity() * sizeof(Segment*) + segments_.size() * sizeof(Segment) +
                   scratch_.capacity() * sizeof(Entry) + ahead_.bytes();
  for (const HugeMemory& memory : memory_) bytes += memory.size();
  return bytes;
}

Group* RowIndex::NewBlock() {
  if (!free_blocks_.empty()) {
    Group* const block = free_blocks_.back();
    free_blocks_.pop_back();
    return block;
  }
  if (memory_.empty() || memory_used_ + kBlockBytes > memory_.back().size()) {
    // A small table shall not take a huge page.
    memory_.push_back(memory_.empty() ? HugeMemory(HugeMemory::kUnit, /*huge=*/false)
                                      : ahead_.Take());
    memory_used_ = 0;
  }
  auto* const block = reinterpret_cast<Group*>(memory_.back().data() + memory_used_);
  memory_used_ += kBlockBytes;
  return block;
}

void RowIndex::SetBlocks(Segment* segment, uint32_t blocks) {
  const uint32_t have = segment->groups / kBlockGroups;
  for (uint32_t i = have; i < blocks; ++i) segment->blocks[i] = NewBlock();
  for (uint32_t i = blocks; i < have; ++i) free_blocks_.push_back(segment->blocks[i]);
  segment->groups = blocks * kBlockGroups;
  segment->entries = 0;
  for (uint32_t i = 0; i < blocks; ++i) MakeEmpty(segment->blocks[i], kBlockGroups);
}

void RowIndex::TakeOut(Segment* segment) {
  scratch_.clear();
  for (uint32_t i = 0; i < segment->groups; ++i) {
    for (const Entry& entry : segment->group(i)->entries) {
      if (entry.value != kEmpty) scratch_.push_back(entry);
    }
  }
}

Entry* RowIndex::Place(Segment* segment, uint64_t hash, const Entry& entry) {
  for (uint32_t at = segment->HomeOf(hash);;) {
    for (Entry& place : segment->group(at)->entries) {
      if (place.value != kEmpty) continue;
      place = entry;
      ++segment->entries;
      return &place;
    }
    if (++at == segment->groups) at = 0;
  }
}

void RowIndex::Grow(Segment* segment) {
  TakeOut(segment);
  SetBlocks(segment, NextBlocks(segment->groups / kBlockGroups));
  for (const Entry& entry : scratch_) Place(segment, KeyHash(entry.key), entry);
}

void RowIndex::Split(Segment* segment) {
  if (uint64_t{1} << segment->depth == directory_.size()) {
    directory_.reserve(2 * directory_.size());
    for (size_t i = 0, n = directory_.size(); i < n; ++i) directory_.push_back(directory_[i]);
    mask_ = directory_.size() - 1;
  }
  TakeOut(segment);
  CHECK_LT(segment->depth, kMaxDepth) << "keys of an embedding table whose hashes are nearly equal";
  const uint64_t bit = uint64_t{1} << segment->depth++;
  const size_t to_other =
      std::count_if(scratch_.begin(), scratch_.end(),
                    [bit](const Entry& entry) { return (KeyHash(entry.key) & bit) != 0; });
  segments_.push_back(std::make_unique<Segment>());
  Segment* const other = segments_.back().get();
  other->depth = segment->depth;
  other->passed = segment->passed;
  other->ordinal = static_cast<uint32_t>(segments_.size() - 1);
  SetBlocks(segment, BlocksFor(scratch_.size() - to_other, segment->ordinal));
  SetBlocks(other, BlocksFor(to_other, other->ordinal));
  // Directory entries whose low bits are those of this segment and `bit`.
  const uint64_t low = KeyHash(scratch_.front().key) & (bit - 1);
  for (uint64_t i = low | bit; i < directory_.size(); i += 2 * bit) directory_[i] = other;
  for (const Entry& entry : scratch_) {
    const uint64_t hash = KeyHash(entry.key);
    Place((hash & bit) != 0 ? other : segment, hash, entry);
  }
}

Entry* RowIndex::Insert(uint64_t hash, uint64_t key, uint32_t touched, uint32_t value) {
  Segment* segment = SegmentOf(hash);
  // Should a split leave one half full, that one is split again.
  while (segment->entries >= MaxEntries(segment->groups, segment->ordinal)) {
    ++moves_;
    if (NextBlocks(segment->groups / kBlockGroups) <= MaxBlocks(segment->ordinal)) {
      Grow(segment);
    } else {
      Split(segment);
      segment = SegmentOf(hash);
    }
  }
  ++size_;
  return Place(segment, hash, {key, touched, value});
}

void RowIndex::Erase(uint64_t hash, Entry* entry) {
  Segment* const segment = SegmentOf(hash);
  const uint32_t n = segment->groups;
  // The group it is in: at or after its home.
  uint32_t at = segment->HomeOf(hash);
  while (entry < segment->group(at)->entries ||
         entry >= segment->group(at)->entries + kGroupEntries) {
    at = at + 1 == n ? 0 : at + 1;
  }
  const auto is_full = [](const Group& group) {
    return std::all_of(group.entries, group.entries + kGroupEntries,
                       [](const Entry& e) { return e.value != kEmpty; });
  };
  // A hole in a group that was full would hide what overflowed from it: fill it from the groups
  // behind, and so on, up to one that was not full.
  bool was_full = is_full(*segment->group(at));
  entry->value = kEmpty;
  for (uint32_t next = at; was_full;) {
    next = next + 1 == n ? 0 : next + 1;
    Group* const group = segment->group(next);
    was_full = is_full(*group);
    const uint32_t to_hole = (next + n - at) % n;
    for (Entry& candidate : group->entries) {
      if (candidate.value == kEmpty) continue;
      const uint32_t from_home = (next + n - segment->HomeOf(KeyHash(candidate.key))) % n;
      if (from_home < to_hole) continue;  // its home is behind the hole
      *entry = candidate;
      candidate.value = kEmpty;
      entry = &candidate;
      at = next;
      break;
    }
  }
  --segment->entries;
  --size_;
  ++moves_;
}

}  // namespace codistill
