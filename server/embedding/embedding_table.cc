#include "server/embedding/embedding_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/embedding/row_placement.h"
#include "glog/logging.h"
#include "server/embedding/table_snapshot.h"

namespace codistill {
namespace {

// Keys a lock is held for: a few tens of microseconds.
constexpr size_t kKeysALock = 2048;
// Keys that are in one stage of the pipeline together: as many cache misses as the processor keeps
// outstanding, and few enough that what was fetched is still in the first-level cache.
constexpr size_t kBlock = 32;

constexpr int kMaxDim = 4096;
constexpr uint64_t kMinBoundBytes = uint64_t{1} << 20;
// What a row takes of the index, at its emptiest.
constexpr uint64_t kIndexBytes = 24;
constexpr size_t kCacheLine = 64;

void PrefetchLines(const float* begin, size_t floats) {
  const auto* const bytes = reinterpret_cast<const char*>(begin);
  for (size_t at = 0; at < floats * sizeof(float); at += kCacheLine) __builtin_prefetch(bytes + at);
}

// Copies of a size known to the compiler, for the usual sizes.
void CopyRow(const float* from, size_t dim, float* to) {
  switch (dim) {
    case 8:
      std::memcpy(to, from, 8 * sizeof(float));
      return;
    case 16:
      std::memcpy(to, from, 16 * sizeof(float));
      return;
    case 32:
      std::memcpy(to, from, 32 * sizeof(float));
      return;
    default:
      std::memcpy(to, from, dim * sizeof(float));
  }
}

AgeLedger::Options LedgerOptions(const EmbeddingTable::Options& options, uint64_t row_bytes) {
  AgeLedger::Options ledger;
  ledger.max_bytes = options.max_bytes;
  ledger.row_bytes = row_bytes + kIndexBytes;
  ledger.waiting_bytes = kIndexBytes;
  ledger.max_age = options.max_age_steps;
  ledger.min_norm_age = options.min_norm > 0 ? options.min_norm_age_steps : -1;
  return ledger;
}

AgeLedger::Class ClassOf(uint32_t value) {
  if ((value & RowIndex::kWaiting) != 0) return AgeLedger::kWaiting;
  return (value & RowIndex::kSmall) != 0 ? AgeLedger::kSmallRow : AgeLedger::kRow;
}

// In double and in order: whether a row is small must not depend on how a loop was vectorised.
bool IsSmall(const float* row, int dim, float min_norm) {
  double squares = 0;
  for (int i = 0; i < dim; ++i) squares += static_cast<double>(row[i]) * row[i];
  return squares < static_cast<double>(min_norm) * min_norm;
}

void Add(const EmbeddingTable::Counts& from, EmbeddingTable::Counts* to) {
  to->applied += from.applied;
  to->created += from.created;
  to->not_admitted += from.not_admitted;
  to->refused += from.refused;
  to->evicted += from.evicted;
}

}  // namespace

void EmbeddingTable::Rows::clear() {
  keys.clear();
  touched.clear();
  data.clear();
  waiting.clear();
  waiting_touched.clear();
  waiting_count.clear();
}

absl::StatusOr<std::unique_ptr<EmbeddingTable>> EmbeddingTable::Create(Options options) {
  const auto wrong = [&](absl::string_view field, auto value, absl::string_view right) {
    return absl::InvalidArgumentError(
        absl::StrCat("embedding table ", options.name, ": ", field, ": ", value, "; ", right));
  };
  if (options.dim < 1 || options.dim > kMaxDim) {
    return wrong("dim", options.dim, absl::StrCat("1 to ", kMaxDim, " is right"));
  }
  if (!(options.init.scale >= 0) || !std::isfinite(options.init.scale)) {
    return wrong("init.scale", options.init.scale, "a finite value of 0 or more is right");
  }
  if (options.min_count < 1 || options.min_count > RowIndex::kNumber) {
    return wrong("min_count", options.min_count,
                 absl::StrCat("1 to ", RowIndex::kNumber, " is right"));
  }
  if (options.max_age_steps < 0) {
    return wrong("max_age_steps", options.max_age_steps, "0 or more is right");
  }
  if (!(options.min_norm >= 0) || !std::isfinite(options.min_norm)) {
    return wrong("min_norm", options.min_norm, "a finite value of 0 or more is right");
  }
  if (options.min_norm_age_steps < 0) {
    return wrong("min_norm_age_steps", options.min_norm_age_steps, "0 or more is right");
  }
  if (options.max_bytes > 0 && options.max_bytes < kMinBoundBytes) {
    return wrong("max_bytes", options.max_bytes,
                 absl::StrCat("0 (no bound) or at least ", kMinBoundBytes, " is right"));
  }
  if (options.max_log_keys < 0) {
    return wrong("max_log_keys", options.max_log_keys, "0 or more is right");
  }
  if (absl::Status status = RowOptimizer::Check(options.optimizer); !status.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("embedding table ", options.name, ": optimizer.", status.message()));
  }
  return std::unique_ptr<EmbeddingTable>(new EmbeddingTable(std::move(options)));
}

EmbeddingTable::EmbeddingTable(Options options)
    : options_(std::move(options)),
      optimizer_(options_.optimizer, options_.dim),
      slab_(optimizer_.row_floats()),
      ledger_(LedgerOptions(options_, optimizer_.row_floats() * sizeof(float))),
      log_(options_.max_log_keys) {}

EmbeddingTable::~EmbeddingTable() {
  CHECK(snapshots_.empty()) << "a snapshot of table " << options_.name << " outlives it";
}

int64_t EmbeddingTable::step() const {
  MutexLock lock(&mu_);
  return step_;
}

bool EmbeddingTable::Expired(const Entry& entry, uint32_t now) const {
  return entry.touched < floor_ || ExpiredByAge(entry, now);
}

bool EmbeddingTable::ExpiredByAge(const Entry& entry, uint32_t now) const {
  const int64_t age = static_cast<int64_t>(now) - entry.touched;
  if (options_.max_age_steps > 0 && age > options_.max_age_steps) return true;
  return (entry.value & (RowIndex::kSmall | RowIndex::kWaiting)) == RowIndex::kSmall &&
         age > options_.min_norm_age_steps;
}

// ---------------------------------------------------------------------------------------- reading

absl::Status EmbeddingTable::Gather(absl::Span<const uint64_t> keys, absl::Span<float> rows,
                                    int64_t exact_step) {
  CHECK_EQ(rows.size(), keys.size() * static_cast<size_t>(options_.dim));
  size_t at = 0;
  do {
    const absl::Span<const uint64_t> part = keys.subspan(at, kKeysALock);
    float* const to = rows.data() + at * static_cast<size_t>(options_.dim);
    if (options_.insert_on_gather) {
      MutexLock lock(&mu_);
      GatherLocked<true>(part, to, nullptr);
    } else {
      ReaderMutexLock lock(&mu_);
      if (exact_step >= 0 && (step_ != exact_step || applying_)) {
        return absl::AbortedError(absl::StrCat("rows of table ", options_.name, " of step ",
                                               exact_step, " are gone: the table has come to step ",
                                               step_, applying_ ? " and beyond" : ""));
      }
      GatherLocked<false>(part, to, nullptr);
    }
    at += part.size();
  } while (at < keys.size());
  return absl::OkStatus();
}

void EmbeddingTable::Read(absl::Span<const uint64_t> keys, absl::Span<float> rows,
                          absl::Span<uint8_t> present) const {
  CHECK_EQ(rows.size(), keys.size() * static_cast<size_t>(options_.dim));
  CHECK(present.empty() || present.size() == keys.size());
  for (size_t at = 0; at < keys.size(); at += kKeysALock) {
    ReaderMutexLock lock(&mu_);
    const_cast<EmbeddingTable*>(this)->GatherLocked<false>(
        keys.subspan(at, kKeysALock), rows.data() + at * static_cast<size_t>(options_.dim),
        present.empty() ? nullptr : present.data() + at);
  }
}

// Three stages, each a block behind the one before: fetch the groups of the index, find the keys in
// them and fetch the rows, copy the rows. With kTouch the table is held exclusively.
template <bool kTouch>
void EmbeddingTable::GatherLocked(absl::Span<const uint64_t> keys, float* rows, uint8_t* present) {
  struct Slot {
    RowIndex::Probe probe;
    const float* row;
  };
  Slot slots[3][kBlock];
  uint64_t begun_at[3];  // index_.moves() when a block's probes began
  const size_t dim = options_.dim;
  const uint32_t use = static_cast<uint32_t>(step_);
  const size_t blocks = (keys.size() + kBlock - 1) / kBlock;
  const auto size_of = [&](size_t block) { return std::min(kBlock, keys.size() - block * kBlock); };
  RowOptimizer::Step step;
  if (kTouch) step = optimizer_.MakeStep(0, std::max<int64_t>(step_, 1));
  for (size_t b = 0; b < blocks + 2; ++b) {
    if (b < blocks) {
      Slot* const slot = slots[b % 3];
      begun_at[b % 3] = index_.moves();
      for (size_t i = 0, n = size_of(b); i < n; ++i) {
        slot[i].probe = index_.Begin(keys[b * kBlock + i]);
      }
    }
    if (b >= 1 && b - 1 < blocks) {
      Slot* const slot = slots[(b - 1) % 3];
      for (size_t i = 0, n = size_of(b - 1); i < n; ++i) {
        const uint64_t key = keys[(b - 1) * kBlock + i];
        Entry* const entry = index_.moves() == begun_at[(b - 1) % 3]
                                 ? RowIndex::Find(slot[i].probe, key)
                                 : index_.Find(slot[i].probe.hash, key);
        slot[i].row = nullptr;
        if (entry == nullptr || (entry->value & RowIndex::kWaiting) != 0) continue;
        if (Expired(*entry, now_)) continue;
        slot[i].row = slab_.At(entry->value & RowIndex::kNumber);
        PrefetchLines(slot[i].row, dim);
        if (kTouch) Touch(entry, slot[i].probe.hash, use);
      }
    }
    if (b >= 2) {
      const Slot* const slot = slots[(b - 2) % 3];
      for (size_t i = 0, n = size_of(b - 2); i < n; ++i) {
        const size_t at = (b - 2) * kBlock + i;
        const float* row = slot[i].row;
        if (kTouch && row == nullptr) {
          Counts counts;
          const int64_t made = Admit(keys[at], slot[i].probe.hash, use, step, &counts);
          Add(counts, &total_);
          if (made >= 0) row = slab_.At(static_cast<uint32_t>(made));
        }
        float* const to = rows + at * dim;
        if (row != nullptr) {
          CopyRow(row, dim, to);
        } else {
          DefaultRow(options_.init, keys[at], absl::MakeSpan(to, dim));
        }
        if (present != nullptr) present[at] = row != nullptr;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------- changes

EmbeddingTable::Counts EmbeddingTable::Apply(const Update& update,
                                             absl::Span<const Batch> batches) {
  const size_t dim = options_.dim;
  {
    MutexLock lock(&mu_);
    CHECK_GT(update.step, step_) << "steps of table " << options_.name;
    CHECK_LT(update.step, std::numeric_limits<uint32_t>::max());
    applying_ = true;
    now_ = static_cast<uint32_t>(update.step);
    ledger_.Advance(now_);
  }
  const RowOptimizer::Step step = optimizer_.MakeStep(update.learning_rate, update.step);
  Counts counts;
  for (const Batch& batch : batches) {
    CHECK_EQ(batch.gradients.size(), batch.keys.size() * dim);
    for (size_t at = 0; at < batch.keys.size(); at += kKeysALock) {
      MutexLock lock(&mu_);
      ApplyLocked(step, batch.keys.subspan(at, kKeysALock), batch.gradients.data() + at * dim,
                  &counts);
    }
  }
  MutexLock lock(&mu_);
  step_ = update.step;
  applying_ = false;
  ++now_;
  ledger_.Advance(now_);
  if (options_.max_age_steps > 0 || options_.min_norm > 0 || floor_ > 0) {
    // Round once in a few hundred steps; never for long.
    uint64_t groups = index_.bytes() / sizeof(RowIndex::Group) / 256;
    groups = std::min<uint64_t>(std::max<uint64_t>(groups, 64), 16384);
    counts.evicted += Sweep(static_cast<int64_t>(groups));
  }
  Add(counts, &total_);
  return counts;
}

void EmbeddingTable::ApplyLocked(const RowOptimizer::Step& step, absl::Span<const uint64_t> keys,
                                 const float* gradients, Counts* counts) {
  struct Slot {
    RowIndex::Probe probe;
    Entry* entry;
  };
  Slot slots[3][kBlock];
  uint64_t begun_at[3];  // index_.moves() when a block's probes began
  uint64_t found_at[3];  // index_.moves() when a block's entries were found
  float* rows[kBlock];
  const float* from[kBlock];
  const size_t dim = options_.dim;
  const size_t row_floats = optimizer_.row_floats();
  const bool norms = options_.min_norm > 0;
  const size_t blocks = (keys.size() + kBlock - 1) / kBlock;
  const auto size_of = [&](size_t block) { return std::min(kBlock, keys.size() - block * kBlock); };
  for (size_t b = 0; b < blocks + 2; ++b) {
    if (b < blocks) {
      Slot* const slot = slots[b % 3];
      begun_at[b % 3] = index_.moves();
      for (size_t i = 0, n = size_of(b); i < n; ++i) {
        slot[i].probe = index_.Begin(keys[b * kBlock + i]);
      }
    }
    if (b >= 1 && b - 1 < blocks) {
      Slot* const slot = slots[(b - 1) % 3];
      found_at[(b - 1) % 3] = index_.moves();
      for (size_t i = 0, n = size_of(b - 1); i < n; ++i) {
        const uint64_t key = keys[(b - 1) * kBlock + i];
        Entry* const entry = index_.moves() == begun_at[(b - 1) % 3]
                                 ? RowIndex::Find(slot[i].probe, key)
                                 : index_.Find(slot[i].probe.hash, key);
        slot[i].entry = entry;
        if (entry != nullptr && (entry->value & RowIndex::kWaiting) == 0) {
          PrefetchLines(slab_.At(entry->value & RowIndex::kNumber), row_floats);
        }
      }
    }
    if (b < 2) continue;
    const size_t first = (b - 2) * kBlock;
    const Slot* const slot = slots[(b - 2) % 3];
    size_t count = 0;
    uint64_t hashes[kBlock];
    uint64_t used[kBlock];
    for (size_t i = 0, n = size_of(b - 2); i < n; ++i) {
      const uint64_t key = keys[first + i];
      Entry* entry = slot[i].entry;
      if (entry != nullptr && index_.moves() != found_at[(b - 2) % 3]) {
        entry = index_.Find(slot[i].probe.hash, key);
      }
      int64_t row = -1;
      if (entry != nullptr && (entry->value & RowIndex::kWaiting) == 0 && !Expired(*entry, now_)) {
        row = entry->value & RowIndex::kNumber;
        Touch(entry, slot[i].probe.hash, now_);
      } else {
        row = Admit(key, slot[i].probe.hash, now_, step, counts);
        if (row < 0) continue;
      }
      rows[count] = slab_.At(static_cast<uint32_t>(row));
      from[count] = gradients + (first + i) * dim;
      hashes[count] = slot[i].probe.hash;
      used[count] = key;
      ++count;
    }
    optimizer_.Apply(step, absl::MakeConstSpan(rows, count), absl::MakeConstSpan(from, count));
    counts->applied += static_cast<int64_t>(count);
    for (size_t i = 0; norms && i < count; ++i) {
      Entry* const entry = index_.Find(hashes[i], used[i]);
      const uint32_t small =
          IsSmall(rows[i], options_.dim, options_.min_norm) ? RowIndex::kSmall : 0;
      if ((entry->value & RowIndex::kSmall) == small) continue;
      ledger_.Remove(entry->touched, ClassOf(entry->value));
      entry->value ^= RowIndex::kSmall;
      ledger_.Add(entry->touched, ClassOf(entry->value));
    }
  }
}

void EmbeddingTable::Touch(Entry* entry, uint64_t hash, uint32_t use) {
  if (entry->touched >= use) return;
  SetAside(*entry, hash, use);
  if (log_.enabled() && entry->touched <= log_.newest_mark()) log_.Add(entry->key);
  if (ledger_.bounded()) {
    ledger_.Remove(entry->touched, ClassOf(entry->value));
    ledger_.Add(use, ClassOf(entry->value));
  }
  entry->touched = use;
}

int64_t EmbeddingTable::Admit(uint64_t key, uint64_t hash, uint32_t use,
                              const RowOptimizer::Step& step, Counts* counts) {
  Entry* entry = index_.Find(hash, key);
  if (entry != nullptr && Expired(*entry, now_)) {
    ++counts->evicted;
    Remove(entry, hash);
    entry = nullptr;
  }
  uint32_t seen = 1;
  if (entry != nullptr) {
    if ((entry->value & RowIndex::kWaiting) == 0) return entry->value & RowIndex::kNumber;
    seen += entry->value & RowIndex::kNumber;
  }
  if (seen < options_.min_count) {
    ++counts->not_admitted;
    if (entry != nullptr) {
      SetAside(*entry, hash, use);
      ledger_.Remove(entry->touched, AgeLedger::kWaiting);
      entry->touched = use;
      entry->value = RowIndex::kWaiting | seen;
      ledger_.Add(use, AgeLedger::kWaiting);
    } else if (MakeRoom(kIndexBytes)) {
      index_.Insert(hash, key, use, RowIndex::kWaiting | seen);
      ledger_.Add(use, AgeLedger::kWaiting);
    }
    return -1;
  }
  if (!MakeRoom(optimizer_.row_floats() * sizeof(float) + kIndexBytes)) {
    ++counts->refused;
    return -1;
  }
  // Making room moves entries, and may condemn this one.
  if (ledger_.bounded()) entry = index_.Find(hash, key);
  const uint32_t number = slab_.Allocate();
  float* const row = slab_.At(number);
  DefaultRow(options_.init, key, absl::MakeSpan(row, options_.dim));
  optimizer_.InitSlots(step, row);
  uint32_t value = number;
  if (options_.min_norm > 0 && IsSmall(row, options_.dim, options_.min_norm)) {
    value |= RowIndex::kSmall;
  }
  if (entry != nullptr) {
    SetAside(*entry, hash, use);
    if (!Expired(*entry, now_)) ledger_.Remove(entry->touched, AgeLedger::kWaiting);
    entry->touched = use;
    entry->value = value;
  } else {
    index_.Insert(hash, key, use, value);
  }
  ledger_.Add(use, ClassOf(value));
  if (log_.enabled()) log_.Add(key);
  ++counts->created;
  return number;
}

bool EmbeddingTable::MakeRoom(uint64_t bytes) {
  if (!ledger_.bounded()) return true;
  if (!ledger_.HasRoomFor(bytes)) {
    // What readers use between updates has the stamp of the last one, and is kept as well.
    const uint32_t keep_from = options_.insert_on_gather ? static_cast<uint32_t>(step_) : now_;
    floor_ = std::max(floor_, ledger_.Forget(bytes, keep_from));
    if (!ledger_.HasRoomFor(bytes)) return false;
  }
  // There is room by the rules; take back memory of what they have condemned before taking more.
  const uint64_t row_bytes = optimizer_.row_floats() * sizeof(float);
  for (size_t looked = 0;
       slab_.rows() * row_bytes + index_.size() * kIndexBytes + bytes > options_.max_bytes &&
       looked < 2 * index_.bytes() / sizeof(RowIndex::Group);
       looked += 16) {
    total_.evicted += Sweep(16);
  }
  return true;
}

void EmbeddingTable::Remove(Entry* entry, uint64_t hash) {
  SetAside(*entry, hash, std::numeric_limits<uint32_t>::max());
  if ((entry->value & RowIndex::kWaiting) == 0) {
    slab_.Free(entry->value & RowIndex::kNumber);
    if (log_.enabled()) log_.Add(entry->key);
  }
  index_.Erase(hash, entry);
}

int64_t EmbeddingTable::Sweep(int64_t groups) {
  int64_t removed = 0;
  for (; groups > 0; --groups) {
    if (hand_group_ >= index_.segments()[hand_segment_]->groups) {
      hand_group_ = 0;
      if (++hand_segment_ >= index_.segments().size()) hand_segment_ = 0;
    }
    RowIndex::Group* const group = index_.segments()[hand_segment_]->group(hand_group_);
    for (int i = 0; i < RowIndex::kGroupEntries;) {
      Entry* const entry = &group->entries[i];
      if (entry->value == RowIndex::kEmpty || !Expired(*entry, now_)) {
        ++i;
        continue;
      }
      if ((entry->value & RowIndex::kWaiting) == 0) ++removed;
      Remove(entry, KeyHash(entry->key));  // another entry may have taken its place
    }
    ++hand_group_;
  }
  return removed;
}

int64_t EmbeddingTable::Evict(int64_t older_than, float norm_below) {
  int64_t removed = 0;
  size_t segment = 0;
  while (true) {
    MutexLock lock(&mu_);
    if (segment >= index_.segments().size()) {
      total_.evicted += removed;
      return removed;
    }
    const RowIndex::Segment& at = *index_.segments()[segment++];
    for (uint32_t g = 0; g < at.groups; ++g) {
      for (int i = 0; i < RowIndex::kGroupEntries;) {
        Entry* const entry = &at.group(g)->entries[i];
        if (entry->value == RowIndex::kEmpty) {
          ++i;
          continue;
        }
        const bool waiting = (entry->value & RowIndex::kWaiting) != 0;
        const bool expired = Expired(*entry, now_);
        const bool goes =
            expired ||
            (older_than >= 0 && static_cast<int64_t>(now_) - entry->touched > older_than) ||
            (norm_below > 0 && !waiting &&
             IsSmall(slab_.At(entry->value & RowIndex::kNumber), options_.dim, norm_below));
        if (!goes) {
          ++i;
          continue;
        }
        if (!expired) ledger_.Remove(entry->touched, ClassOf(entry->value));
        if (!waiting) ++removed;
        Remove(entry, KeyHash(entry->key));
      }
    }
  }
}

void EmbeddingTable::Clear(int64_t step) {
  MutexLock lock(&mu_);
  for (SnapshotImpl* snapshot : snapshots_) snapshot->Abandon();
  snapshots_.clear();
  index_.Clear();
  slab_.Clear();
  ledger_.Clear();
  log_.Clear();
  hand_segment_ = 0;
  hand_group_ = 0;
  floor_ = 0;
  total_ = {};
  step_ = step;
  now_ = static_cast<uint32_t>(step + 1);
  applying_ = false;
}

// --------------------------------------------------------------------------------------- contents

void EmbeddingTable::SetAside(const Entry& entry, uint64_t hash, uint32_t use) {
  for (SnapshotImpl* snapshot : snapshots_) {
    snapshot->SetAside(entry, *index_.SegmentOf(hash), use);
  }
}

absl::Status EmbeddingTable::Load(const Rows& rows) {
  const size_t row_floats = optimizer_.row_floats();
  if (rows.touched.size() != rows.keys.size() ||
      rows.data.size() != rows.keys.size() * row_floats ||
      rows.waiting_touched.size() != rows.waiting.size() ||
      rows.waiting_count.size() != rows.waiting.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "embedding table ", options_.name, ": ", rows.keys.size(), " rows came with ",
        rows.touched.size(), " steps and ", rows.data.size(), " floats, ", rows.waiting.size(),
        " waiting keys with ", rows.waiting_touched.size(), " steps and ",
        rows.waiting_count.size(), " counts; ", row_floats, " floats a row are right"));
  }
  for (size_t i = 0; i < rows.waiting_count.size(); ++i) {
    if (rows.waiting_count[i] > RowIndex::kNumber) {
      return absl::InvalidArgumentError(absl::StrCat("embedding table ", options_.name, ": key ",
                                                     rows.waiting[i], " with a count of ",
                                                     rows.waiting_count[i]));
    }
  }
  MutexLock lock(&mu_);
  const auto put = [&](uint64_t key, uint32_t touched, uint32_t count, const float* data) {
    mu_.AssertHeld();
    const uint64_t hash = KeyHash(key);
    if (Entry* const old = index_.Find(hash, key); old != nullptr) {
      ledger_.Remove(old->touched, ClassOf(old->value));
      Remove(old, hash);
    }
    uint32_t value = RowIndex::kWaiting | count;
    if (data != nullptr) {
      value = slab_.Allocate();
      std::memcpy(slab_.At(value), data, row_floats * sizeof(float));
      if (options_.min_norm > 0 && IsSmall(data, options_.dim, options_.min_norm)) {
        value |= RowIndex::kSmall;
      }
    }
    index_.Insert(hash, key, touched, value);
    ledger_.Add(touched, ClassOf(value));
  };
  for (size_t i = 0; i < rows.keys.size(); ++i) {
    put(rows.keys[i], rows.touched[i], 0, rows.data.data() + i * row_floats);
  }
  for (size_t i = 0; i < rows.waiting.size(); ++i) {
    put(rows.waiting[i], rows.waiting_touched[i], rows.waiting_count[i], nullptr);
  }
  return absl::OkStatus();
}

// -------------------------------------------------------------------------------------- followers

void EmbeddingTable::Mark() {
  MutexLock lock(&mu_);
  log_.Mark(step_);
}

ChangeLog::Changes EmbeddingTable::ChangesSince(int64_t since) const {
  MutexLock lock(&mu_);
  return log_.Since(since);
}

EmbeddingTable::Stats EmbeddingTable::stats() const {
  MutexLock lock(&mu_);
  Stats stats;
  stats.rows = static_cast<int64_t>(slab_.rows());
  stats.waiting = static_cast<int64_t>(index_.size()) - stats.rows;
  stats.bytes = slab_.bytes() + index_.bytes() + log_.bytes();
  stats.total = total_;
  return stats;
}

}  // namespace codistill
