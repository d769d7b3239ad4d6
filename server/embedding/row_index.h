#ifndef CODISTILL_SERVER_EMBEDDING_ROW_INDEX_H_
#define CODISTILL_SERVER_EMBEDDING_ROW_INDEX_H_

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/embedding/row_placement.h"
#include "server/embedding/huge_memory.h"
#include "server/embedding/memory_ahead.h"

namespace codistill {

// A hash table from 64-bit keys to 16-byte entries, for tables so large that a look-up is one cache
// miss and nothing else counts. Groups of four entries fill a cache line each. Groups belong to
// segments of at most 32,768 entries, found by the low bits of the hash through a directory
// (extendible hashing: Fagin et al. 1979); within a segment a key's home group is given by other
// bits and full groups overflow into the next. A segment that is 75 to 81 % full grows by a
// quarter or less, and splits in two when it is largest: no insertion waits for more than one
// segment's entries to move, and the index stays 60-81 % full at any size. Not thread-safe.
class RowIndex {
 public:
  struct Entry {
    uint64_t key;
    uint32_t touched;  // step of the last use
    uint32_t value;
  };
  // Of Entry::value: a row's number and a flag, or the count of a key that waits for admission.
  static constexpr uint32_t kEmpty = ~0u;
  static constexpr uint32_t kWaiting = 1u << 31;
  static constexpr uint32_t kSmall = 1u << 30;
  static constexpr uint32_t kNumber = kSmall - 1;

  static constexpr int kGroupEntries = 4;
  struct alignas(64) Group {
    Entry entries[kGroupEntries];
  };
  static constexpr uint32_t kBlockGroups = 256;
  static constexpr uint32_t kMaxBlocks = 32;

  struct Segment {
    std::array<Group*, kMaxBlocks> blocks = {};
    uint32_t groups = 0;
    uint32_t entries = 0;
    uint32_t depth = 0;    // low bits of the hash that its keys share
    uint32_t ordinal = 0;  // in the order of their making
    uint32_t passed = 0;   // one bit a snapshot: the segment is in it already

    Group* group(uint32_t i) const { return blocks[i / kBlockGroups] + i % kBlockGroups; }
    uint32_t HomeOf(uint64_t hash) const {
      // The multiplication brings every bit of the hash to the upper half: the lower bits choose
      // the segment and the upper ones, on a shard, lie in a range.
      const uint64_t spread = (hash * 0x9e3779b97f4a7c15u) >> 32;
      return static_cast<uint32_t>((spread * groups) >> 32);
    }
  };

  RowIndex();

  Segment* SegmentOf(uint64_t hash) const { return directory_[hash & mask_]; }
  // A look-up in two steps: where the key's group is, which is fetched meanwhile, and the key in
  // it. The first step holds as long as moves() does.
  struct Probe {
    uint64_t hash;
    const Segment* segment;
    Group* group;
    uint32_t home;
  };
  Probe Begin(uint64_t key) const {
    Probe probe;
    probe.hash = KeyHash(key);
    probe.segment = SegmentOf(probe.hash);
    probe.home = probe.segment->HomeOf(probe.hash);
    probe.group = probe.segment->group(probe.home);
    __builtin_prefetch(probe.group);
    return probe;
  }
  // Null if it is not there.
  static Entry* Find(const Probe& probe, uint64_t key) {
    const Segment& segment = *probe.segment;
    Group* group = probe.group;
    for (uint32_t at = probe.home;;) {
      Entry* const e = group->entries;
      // All four without a branch: where in its group a key lies cannot be predicted.
      const unsigned used = (e[0].value != kEmpty) | (e[1].value != kEmpty) << 1 |
                            (e[2].value != kEmpty) << 2 | (e[3].value != kEmpty) << 3;
      const unsigned equal = (e[0].key == key) | (e[1].key == key) << 1 | (e[2].key == key) << 2 |
                             (e[3].key == key) << 3;
      if ((used & equal) != 0) return e + __builtin_ctz(used & equal);
      if (used != 15) return nullptr;
      if (++at == segment.groups) at = 0;
      group = segment.group(at);
    }
  }
  Entry* Find(uint64_t hash, uint64_t key) const {
    Probe probe;
    probe.hash = hash;
    probe.segment = SegmentOf(hash);
    probe.home = probe.segment->HomeOf(hash);
    probe.group = probe.segment->group(probe.home);
    return Find(probe, key);
  }

  // Makes an entry for a key that has none, with the value given (not kEmpty). Entries may move.
  Entry* Insert(uint64_t hash, uint64_t key, uint32_t touched, uint32_t value);
  // Entries of its segment may move.
  void Erase(uint64_t hash, Entry* entry);
  // Changes whenever an entry may have moved.
  uint64_t moves() const { return moves_; }

  // All segments, in order of their making; Insert appends.
  const std::vector<std::unique_ptr<Segment>>& segments() const { return segments_; }
  uint64_t size() const { return size_; }
  uint64_t bytes() const;
  void Clear();

 private:
  Group* NewBlock();
  void Grow(Segment* segment);
  void Split(Segment* segment);
  // Takes all entries out of the segment into scratch_.
  void TakeOut(Segment* segment);
  void SetBlocks(Segment* segment, uint32_t blocks);
  static Entry* Place(Segment* segment, uint64_t hash, const Entry& entry);

  std::vector<Segment*> directory_;
  uint64_t mask_ = 0;
  std::vector<std::unique_ptr<Segment>> segments_;
  uint64_t size_ = 0;
  uint64_t moves_ = 0;

  MemoryAhead ahead_;
  std::vector<HugeMemory> memory_;
  size_t memory_used_ = 0;  // of the last
  std::vector<Group*> free_blocks_;
  std::vector<Entry> scratch_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_ROW_INDEX_H_
