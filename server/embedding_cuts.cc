#include "server/embedding_cuts.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace codistill {
namespace {

// Bytes of rows in one chunk, about a frame.
constexpr size_t kChunkBytes = 1 << 20;

}  // namespace

// Goes through the changes of a chain of cuts in their order: what comes later replaces what came
// before.
class EmbeddingCuts::LogReader final : public FollowReader {
 public:
  LogReader(std::vector<DeltaPtr> deltas, std::vector<int64_t> dims, bool whole)
      : deltas_(std::move(deltas)), dims_(std::move(dims)), whole_(whole) {}

  bool whole() const override { return whole_; }
  bool exact() const override { return true; }

  bool Next(FollowedChunk* chunk) override {
    for (; delta_ < deltas_.size(); ++delta_, table_ = 0) {
      const Delta& delta = *deltas_[delta_];
      for (; table_ < delta.tables.size(); ++table_, key_ = 0, evicted_ = 0) {
        if (Take(delta.tables[table_], chunk)) return true;
      }
    }
    return false;
  }

 private:
  bool Take(const TableDelta& table, FollowedChunk* chunk) {
    const size_t dim = static_cast<size_t>(dims_[table_]);
    const size_t most = std::max<size_t>(1, kChunkBytes / (sizeof(uint64_t) + dim * sizeof(float)));
    const size_t keys = std::min(most, table.keys.size() - key_);
    const size_t evicted = std::min(most, table.evicted.size() - evicted_);
    if (keys == 0 && evicted == 0) return false;
    chunk->table = static_cast<int>(table_);
    chunk->keys.assign(table.keys.begin() + key_, table.keys.begin() + key_ + keys);
    chunk->rows.assign(table.rows.begin() + key_ * dim, table.rows.begin() + (key_ + keys) * dim);
    chunk->evicted.assign(table.evicted.begin() + evicted_,
                          table.evicted.begin() + evicted_ + evicted);
    key_ += keys;
    evicted_ += evicted;
    return true;
  }

  const std::vector<DeltaPtr> deltas_;
  const std::vector<int64_t> dims_;
  const bool whole_;
  size_t delta_ = 0, table_ = 0, key_ = 0, evicted_ = 0;
};

// Reads the tables themselves, while they go on changing behind it.
class EmbeddingCuts::WholeReader final : public FollowReader {
 public:
  struct Table {
    int64_t dim = 0;
    int64_t row_floats = 0;  // slots included
    std::unique_ptr<EmbeddingTable::Snapshot> snapshot;
  };
  WholeReader(std::vector<Table> tables, bool exact) : tables_(std::move(tables)), exact_(exact) {}

  bool whole() const override { return true; }
  bool exact() const override { return exact_; }

  bool Next(FollowedChunk* chunk) override {
    for (; table_ < tables_.size(); ++table_) {
      Table& table = tables_[table_];
      while (table.snapshot->Next(&rows_)) {
        if (rows_.keys.empty()) continue;
        chunk->table = static_cast<int>(table_);
        chunk->keys = rows_.keys;
        chunk->evicted.clear();
        chunk->rows.resize(rows_.keys.size() * table.dim);
        for (size_t i = 0; i < rows_.keys.size(); ++i) {
          std::copy_n(rows_.data.begin() + i * table.row_floats, table.dim,
                      chunk->rows.begin() + i * table.dim);
        }
        return true;
      }
      table.snapshot.reset();  // what it had set aside is free again
    }
    return false;
  }

 private:
  std::vector<Table> tables_;
  const bool exact_;
  size_t table_ = 0;
  EmbeddingTable::Rows rows_;
};

EmbeddingCuts::EmbeddingCuts(std::vector<EmbeddingTable*> tables, Options options)
    : tables_(std::move(tables)), options_(options) {}

void EmbeddingCuts::Start(int64_t label) {
  bool empty = true;
  std::vector<int64_t> steps;
  for (EmbeddingTable* table : tables_) {
    const EmbeddingTable::Stats stats = table->stats();
    empty = empty && stats.rows == 0;
    table->Mark();
    steps.push_back(table->step());
  }
  MutexLock lock(&mu_);
  base_ = label;
  base_empty_ = empty;
  deltas_.clear();
  bytes_ = 0;
  steps_ = std::move(steps);
}

void EmbeddingCuts::Publish(int64_t label) {
  std::vector<int64_t> since;
  {
    MutexLock lock(&mu_);
    const int64_t newest = deltas_.empty() ? base_ : deltas_.back()->label;
    if (label <= newest) return;
    since = steps_;
  }
  auto delta = std::make_shared<Delta>();
  delta->label = label;
  delta->tables.resize(tables_.size());
  bool everything = false;
  std::vector<int64_t> steps;
  for (size_t t = 0; t < tables_.size(); ++t) {
    EmbeddingTable* const table = tables_[t];
    const int64_t dim = table->dim();
    const ChangeLog::Changes changes = table->ChangesSince(since[t]);
    everything = everything || changes.everything;
    TableDelta& to = delta->tables[t];
    if (!everything && !changes.keys.empty()) {
      std::vector<uint8_t> present(changes.keys.size());
      std::vector<float> rows(changes.keys.size() * dim);
      table->Read(changes.keys, absl::MakeSpan(rows), absl::MakeSpan(present));
      for (size_t i = 0; i < changes.keys.size(); ++i) {
        if (present[i] == 0) {
          to.evicted.push_back(changes.keys[i]);
          continue;
        }
        // Moved to the front, over those of keys without rows.
        std::copy_n(rows.begin() + i * dim, dim, rows.begin() + to.keys.size() * dim);
        to.keys.push_back(changes.keys[i]);
      }
      rows.resize(to.keys.size() * dim);
      to.rows = std::move(rows);
    }
    delta->bytes +=
        (to.keys.size() + to.evicted.size()) * sizeof(uint64_t) + to.rows.size() * sizeof(float);
    table->Mark();
    steps.push_back(table->step());
  }
  if (everything) {
    Start(label);
    return;
  }
  MutexLock lock(&mu_);
  bytes_ += delta->bytes;
  deltas_.push_back(std::move(delta));
  steps_ = std::move(steps);
  Trim();
}

EmbeddingCuts::DeltaPtr EmbeddingCuts::Merge(const Delta& older, const Delta& newer) const {
  auto merged = std::make_shared<Delta>();
  merged->label = newer.label;
  for (size_t t = 0; t < tables_.size(); ++t) {
    const int64_t dim = tables_[t]->dim();
    TableDelta to = newer.tables[t];
    absl::flat_hash_map<uint64_t, bool> replaced;
    for (const uint64_t key : to.keys) replaced.emplace(key, true);
    for (const uint64_t key : to.evicted) replaced.emplace(key, true);
    const TableDelta& from = older.tables[t];
    for (size_t i = 0; i < from.keys.size(); ++i) {
      if (replaced.contains(from.keys[i])) continue;
      to.keys.push_back(from.keys[i]);
      to.rows.insert(to.rows.end(), from.rows.begin() + i * dim, from.rows.begin() + (i + 1) * dim);
    }
    for (const uint64_t key : from.evicted) {
      if (!replaced.contains(key)) to.evicted.push_back(key);
    }
    merged->bytes +=
        (to.keys.size() + to.evicted.size()) * sizeof(uint64_t) + to.rows.size() * sizeof(float);
    merged->tables.push_back(std::move(to));
  }
  return merged;
}

void EmbeddingCuts::Trim() {
  const size_t most = static_cast<size_t>(std::max(options_.max_deltas, 2));
  while (deltas_.size() > most) {
    // The smallest neighbours of the older half, so that no change is copied again and again.
    size_t best = 0;
    for (size_t i = 1; i < most / 2; ++i) {
      if (deltas_[i]->bytes + deltas_[i + 1]->bytes <
          deltas_[best]->bytes + deltas_[best + 1]->bytes) {
        best = i;
      }
    }
    DeltaPtr merged = Merge(*deltas_[best], *deltas_[best + 1]);
    bytes_ -= deltas_[best]->bytes + deltas_[best + 1]->bytes;
    bytes_ += merged->bytes;
    deltas_[best] = std::move(merged);
    deltas_.erase(deltas_.begin() + best + 1);
  }
  while (bytes_ > options_.max_bytes && !deltas_.empty()) {
    base_ = deltas_.front()->label;
    base_empty_ = false;
    bytes_ -= deltas_.front()->bytes;
    deltas_.pop_front();
  }
}

absl::StatusOr<std::unique_ptr<FollowReader>> EmbeddingCuts::Read(int64_t label, int64_t since) {
  std::vector<int64_t> dims;
  for (const EmbeddingTable* table : tables_) dims.push_back(table->dim());
  bool exact = true;
  {
    MutexLock lock(&mu_);
    const int64_t newest = deltas_.empty() ? base_ : deltas_.back()->label;
    bool known = base_ == label;
    bool chained = since >= 0 && since <= label && since == base_;
    for (const DeltaPtr& delta : deltas_) {
      chained = chained || (since <= label && delta->label == since);
    }
    // From a table without rows all changes are the whole table.
    const bool from_nothing = !chained && base_empty_;
    std::vector<DeltaPtr> chain;
    for (const DeltaPtr& delta : deltas_) {
      if (delta->label > label) break;
      known = known || delta->label == label;
      if (from_nothing || (chained && delta->label > since)) chain.push_back(delta);
    }
    if (!known || base_ < 0) {
      return absl::AbortedError(absl::StrCat("the cut of step ", label,
                                             " of the embedding tables is not known; the newest is "
                                             "of step ",
                                             newest));
    }
    if (chained || from_nothing) {
      return std::make_unique<LogReader>(std::move(chain), std::move(dims), from_nothing);
    }
    for (size_t t = 0; t < tables_.size(); ++t) {
      exact = exact && label == newest && tables_[t]->step() == steps_[t];
    }
  }
  std::vector<WholeReader::Table> tables;
  for (EmbeddingTable* table : tables_) {
    WholeReader::Table whole;
    whole.dim = table->dim();
    whole.row_floats = table->optimizer().row_floats();
    CODISTILL_ASSIGN_OR_RETURN(whole.snapshot, table->TakeSnapshot());
    tables.push_back(std::move(whole));
  }
  return std::make_unique<WholeReader>(std::move(tables), exact);
}

uint64_t EmbeddingCuts::bytes() const {
  MutexLock lock(&mu_);
  return bytes_;
}

}  // namespace codistill
