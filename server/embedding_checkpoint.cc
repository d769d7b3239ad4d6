#include "server/embedding_checkpoint.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/checkpoint/table_file.h"
#include "common/embedding/row_placement.h"
#include "glog/logging.h"

namespace codistill {
namespace {

// Of the bytes of a base, those of its deltas together before a new base is written.
constexpr double kMostDeltas = 0.5;
// Keys of removed rows in one record.
constexpr size_t kRemovedARecord = 1 << 17;

template <typename T>
std::string Packed(const T* values, size_t n) {
  return std::string(reinterpret_cast<const char*>(values), n * sizeof(T));
}
template <typename T>
std::string Packed(const std::vector<T>& values) {
  return Packed(values.data(), values.size());
}

template <typename T>
std::vector<T> Unpacked(const std::string& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

// The rows of a record as the table takes them, but for keys of other shards and those that a newer
// file has told of.
absl::Status Take(const TableRows& record, int64_t row_floats, int shard, int num_shards,
                  const absl::flat_hash_set<uint64_t>& told, EmbeddingTable::Rows* rows) {
  const auto keys = Unpacked<uint64_t>(record.keys());
  const auto touched = Unpacked<uint32_t>(record.touched());
  const auto data = Unpacked<float>(record.data());
  const auto waiting = Unpacked<uint64_t>(record.waiting());
  const auto waiting_touched = Unpacked<uint32_t>(record.waiting_touched());
  const auto waiting_count = Unpacked<uint32_t>(record.waiting_count());
  if (record.keys().size() % 8 != 0 || touched.size() != keys.size() ||
      data.size() != keys.size() * row_floats || record.waiting().size() % 8 != 0 ||
      waiting_touched.size() != waiting.size() || waiting_count.size() != waiting.size()) {
    return absl::DataLossError("a record whose parts do not fit together");
  }
  rows->clear();
  const auto wanted = [&](uint64_t key) {
    return ShardOfKey(key, num_shards) == shard && !told.contains(key);
  };
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!wanted(keys[i])) continue;
    rows->keys.push_back(keys[i]);
    rows->touched.push_back(touched[i]);
    rows->data.insert(rows->data.end(), data.begin() + i * row_floats,
                      data.begin() + (i + 1) * row_floats);
  }
  for (size_t i = 0; i < waiting.size(); ++i) {
    if (!wanted(waiting[i])) continue;
    rows->waiting.push_back(waiting[i]);
    rows->waiting_touched.push_back(waiting_touched[i]);
    rows->waiting_count.push_back(waiting_count[i]);
  }
  return absl::OkStatus();
}

}  // namespace

void EmbeddingCheckpoint::Snapshot(int64_t label) {
  if (tables_.empty()) return;
  std::vector<int64_t> since, evicted;
  auto kept = std::make_unique<Kept>();
  kept->label = label;
  {
    MutexLock lock(&mu_);
    if (kept_ != nullptr && kept_->label == label) return;
    kept_.reset();
    uint64_t deltas = 0;
    for (size_t i = 1; i < chain_.size(); ++i) deltas += chain_[i].bytes();
    kept->base = chain_.empty() ||
                 static_cast<double>(deltas) > kMostDeltas * static_cast<double>(chain_[0].bytes());
    since = steps_;
    evicted = evicted_;
  }
  std::vector<ChangeLog::Changes> changes(tables_.size());
  for (size_t t = 0; t < tables_.size() && !kept->base; ++t) {
    changes[t] = tables_[t]->ChangesSince(since[t]);
    // A bound on memory evicts rows long before they are cleaned up and logged.
    const bool bounded =
        tables_[t]->options().max_bytes > 0 && tables_[t]->stats().total.evicted != evicted[t];
    kept->base = changes[t].everything || bounded;
  }
  for (size_t t = 0; t < tables_.size(); ++t) {
    EmbeddingTable* const table = tables_[t];
    Kept::Table of;
    of.step = table->step();
    of.evicted = table->stats().total.evicted;
    absl::StatusOr<std::unique_ptr<EmbeddingTable::Snapshot>> rows =
        table->TakeSnapshot(kept->base ? -1 : since[t]);
    if (!rows.ok()) {
      LOG(ERROR) << "embedding table " << table->options().name << ": " << rows.status();
      return;
    }
    of.rows = *std::move(rows);
    if (!kept->base && !changes[t].keys.empty()) {
      const std::vector<uint64_t>& keys = changes[t].keys;
      std::vector<uint8_t> present(keys.size());
      std::vector<float> values(keys.size() * table->dim());
      table->Read(keys, absl::MakeSpan(values), absl::MakeSpan(present));
      for (size_t i = 0; i < keys.size(); ++i) {
        if (present[i] == 0) of.removed.push_back(keys[i]);
      }
    }
    table->Mark();
    kept->tables.push_back(std::move(of));
  }
  MutexLock lock(&mu_);
  kept_ = std::move(kept);
}

absl::StatusOr<std::vector<CheckpointFile>> EmbeddingCheckpoint::Write(int64_t label,
                                                                       const std::string& directory,
                                                                       const std::string& name,
                                                                       TableFileHeader identity,
                                                                       FileSystem* file_system) {
  if (tables_.empty()) return std::vector<CheckpointFile>();
  std::unique_ptr<Kept> kept;
  uint64_t epoch = 0;
  {
    MutexLock lock(&mu_);
    if (kept_ == nullptr || kept_->label != label) {
      return absl::NotFoundError(
          absl::StrCat("no snapshot of the embedding tables of step ", label));
    }
    kept = std::move(kept_);
    epoch = epoch_;
    if (!kept->base && chain_directory_ != directory) {
      chain_.clear();  // the next one is a base
      return absl::FailedPreconditionError(absl::StrCat(
          directory, ": the embedding tables' earlier files are in ", chain_directory_));
    }
  }
  CODISTILL_ASSIGN_OR_RETURN(CheckpointFile file, WriteFile(kept.get(), directory, name,
                                                            std::move(identity), file_system));
  MutexLock lock(&mu_);
  if (epoch != epoch_) return absl::AbortedError("the group was restored meanwhile");
  if (kept->base) chain_.clear();
  chain_directory_ = directory;
  chain_.push_back(std::move(file));
  steps_.clear();
  evicted_.clear();
  for (const Kept::Table& table : kept->tables) {
    steps_.push_back(table.step);
    evicted_.push_back(table.evicted);
  }
  return chain_;
}

absl::StatusOr<CheckpointFile> EmbeddingCheckpoint::WriteFile(Kept* kept,
                                                              const std::string& directory,
                                                              const std::string& name,
                                                              TableFileHeader identity,
                                                              FileSystem* file_system) const {
  identity.set_base(kept->base);
  for (size_t t = 0; t < tables_.size(); ++t) {
    TableFileHeader::Table* const table = identity.add_tables();
    table->set_name(tables_[t]->options().name);
    table->set_dim(tables_[t]->dim());
    table->set_optimizer(optimizers_[t]);
    table->set_row_floats(tables_[t]->optimizer().row_floats());
  }
  CODISTILL_ASSIGN_OR_RETURN(
      std::unique_ptr<TableFileWriter> writer,
      TableFileWriter::Create(directory, name, std::move(identity), file_system));
  EmbeddingTable::Rows rows;
  for (size_t t = 0; t < tables_.size(); ++t) {
    Kept::Table& table = kept->tables[t];
    while (table.rows->Next(&rows)) {
      if (rows.empty()) continue;
      TableRows record;
      record.set_table(static_cast<uint32_t>(t));
      record.set_keys(Packed(rows.keys));
      record.set_touched(Packed(rows.touched));
      record.set_data(Packed(rows.data));
      record.set_waiting(Packed(rows.waiting));
      record.set_waiting_touched(Packed(rows.waiting_touched));
      record.set_waiting_count(Packed(rows.waiting_count));
      CODISTILL_RETURN_IF_ERROR(writer->Append(record));
    }
    table.rows.reset();
    for (size_t i = 0; i < table.removed.size(); i += kRemovedARecord) {
      TableRows record;
      record.set_table(static_cast<uint32_t>(t));
      record.set_removed(
          Packed(table.removed.data() + i, std::min(kRemovedARecord, table.removed.size() - i)));
      CODISTILL_RETURN_IF_ERROR(writer->Append(record));
    }
  }
  return writer->Finish();
}

absl::Status EmbeddingCheckpoint::Load(int64_t step, const std::string& directory,
                                       const CheckpointManifest& manifest, int shard,
                                       int num_shards, FileSystem* file_system) {
  Forget();
  for (EmbeddingTable* table : tables_) table->Clear(step);
  if (tables_.empty()) return absl::OkStatus();
  if (manifest.tables_size() == 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        directory, ": the checkpoint has no embedding tables; the job has ", tables_.size()));
  }
  EmbeddingTable::Rows rows;
  for (int s = 0; s < manifest.tables_size(); ++s) {
    // With as many shards as wrote it, each finds all of its keys in its own files.
    if (manifest.tables_size() == num_shards && s != shard) continue;
    // Newest first: what it tells of a key holds, and the base, by far the largest, needs no memory
    // of what it told.
    std::vector<absl::flat_hash_set<uint64_t>> told(tables_.size());
    for (int f = manifest.tables(s).files_size() - 1; f >= 0; --f) {
      const std::string path = JoinPath(directory, manifest.tables(s).files(f).name());
      CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<TableFileReader> reader,
                                 TableFileReader::Open(path, file_system));
      const TableFileHeader& header = reader->header();
      bool fits = header.group() == manifest.group() &&
                  header.tables_size() == static_cast<int>(tables_.size()) && header.shard() == s &&
                  header.base() == (f == 0);
      for (size_t t = 0; fits && t < tables_.size(); ++t) {
        fits = header.tables(t).name() == tables_[t]->options().name &&
               header.tables(t).dim() == tables_[t]->dim() &&
               header.tables(t).optimizer() == optimizers_[t] &&
               header.tables(t).row_floats() == tables_[t]->optimizer().row_floats();
      }
      if (!fits) {
        return absl::FailedPreconditionError(
            absl::StrCat(path,
                         ": is not of the job's embedding tables (name, dim, optimizer), or "
                         "not the file that the manifest means"));
      }
      std::vector<std::vector<uint64_t>> tells(tables_.size());
      TableRows record;
      for (;;) {
        CODISTILL_ASSIGN_OR_RETURN(const bool more, reader->Next(&record));
        if (!more) break;
        const uint32_t t = record.table();
        if (t >= tables_.size()) {
          return absl::DataLossError(absl::StrCat(path, ": rows of table ", t));
        }
        CODISTILL_RETURN_IF_ERROR(Annotate(
            Take(record, header.tables(t).row_floats(), shard, num_shards, told[t], &rows), path));
        CODISTILL_RETURN_IF_ERROR(Annotate(tables_[t]->Load(rows), path));
        if (f == 0) continue;
        tells[t].insert(tells[t].end(), rows.keys.begin(), rows.keys.end());
        tells[t].insert(tells[t].end(), rows.waiting.begin(), rows.waiting.end());
        for (const uint64_t key : Unpacked<uint64_t>(record.removed())) tells[t].push_back(key);
      }
      for (size_t t = 0; t < tables_.size(); ++t) told[t].insert(tells[t].begin(), tells[t].end());
    }
  }
  return absl::OkStatus();
}

void EmbeddingCheckpoint::Forget() {
  std::unique_ptr<Kept> kept;  // let go of outside the lock
  MutexLock lock(&mu_);
  kept = std::move(kept_);
  chain_.clear();
  ++epoch_;
}

}  // namespace codistill
