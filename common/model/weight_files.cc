#include "common/model/weight_files.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/checkpoint/checkpoint_catalog.h"
#include "common/checkpoint/checkpoint_tensors.h"
#include "common/checkpoint/manifest.h"
#include "common/checkpoint/safetensors.h"
#include "common/checkpoint/table_file.h"
#include "common/config/shard_map.h"

namespace codistill {
namespace {

std::string ShapeOf(const TensorSpec& spec) {
  return ShapeString(std::vector<int64_t>(spec.shape().begin(), spec.shape().end()));
}

// Packed little-endian integers or floats of a record.
template <typename T>
bool Unpack(const std::string& bytes, std::vector<T>* values) {
  if (bytes.size() % sizeof(T) != 0) return false;
  values->resize(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(values->data(), bytes.data(), bytes.size());
  return true;
}

}  // namespace

absl::Status ReadSafetensors(const std::string& path, Model* model, FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsReader> reader,
                             SafetensorsReader::Open(path, file_system));
  ErrorList errors;
  size_t known = 0;
  for (const TensorSpec& spec : model->tensors().tensors()) {
    const SafetensorsReader::Entry* const entry = reader->Find(spec.name());
    if (entry != nullptr) ++known;
    if (spec.role() == TensorSpec::TIED) continue;  // may be there under both names
    if (entry == nullptr) {
      errors.Add(spec.name(), "is missing");
    } else if (entry->dtype != spec.dtype() ||
               entry->shape != std::vector<int64_t>(spec.shape().begin(), spec.shape().end())) {
      errors.Add(spec.name(),
                 absl::StrCat("is ", DataTypeName(entry->dtype), " ", ShapeString(entry->shape),
                              "; the model has ", DataTypeName(spec.dtype()), " ", ShapeOf(spec)));
    }
  }
  if (known < reader->entries().size()) {
    for (const auto& [name, entry] : reader->entries()) {
      bool found = false;
      for (const TensorSpec& spec : model->tensors().tensors()) found |= spec.name() == name;
      if (!found) errors.Add(name, "is no tensor of the model");
    }
  }
  if (!errors.empty()) {
    return absl::FailedPreconditionError(
        errors.ToStatus(absl::StrCat(path, " does not have the model's tensors:")).message());
  }
  for (int i = 0; i < model->tensors().tensors_size(); ++i) {
    const TensorSpec& spec = model->tensors().tensors(i);
    if (spec.role() == TensorSpec::TIED) continue;
    const TensorView& view = model->storage()[i];
    CODISTILL_RETURN_IF_ERROR(reader->Read(spec.name(), 0, view.bytes(), view.data));
  }
  return absl::OkStatus();
}

absl::Status ReadCheckpoint(const std::string& directory, const CheckpointManifest& manifest,
                            Model* model, FileSystem* file_system) {
  TensorList theirs;
  *theirs.mutable_tensors() = manifest.shard_map().tensors();
  const std::string difference = FirstDifference(model->tensors(), theirs);
  if (!difference.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the checkpoint's tensors are not those of our archive: ", difference));
  }
  CODISTILL_RETURN_IF_ERROR(VerifyCheckpoint(directory, manifest, file_system));
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointTensors> tensors,
                             CheckpointTensors::Open(directory, manifest, file_system));
  for (int i = 0; i < theirs.tensors_size(); ++i) {
    if (theirs.tensors(i).role() == TensorSpec::TIED) continue;
    const TensorView& view = model->storage()[i];
    CODISTILL_RETURN_IF_ERROR(tensors->Read(i, "", 0, view.elements(), view.data));
  }
  return absl::OkStatus();
}

CheckpointTables::CheckpointTables(const ModelConfig& model, FileSystem* file_system)
    : model_(model), file_system_(file_system) {
  for (const EmbeddingTableConfig& table : model.embedding_tables()) {
    empty_.push_back(FollowedRows::Empty(table.dim(), RowInit{}));
    ages_ |= table.evict_age_steps() > 0;
  }
}

absl::StatusOr<CheckpointTables::Tables> CheckpointTables::Read(
    const std::string& directory, const CheckpointManifest& manifest) {
  if (empty_.empty()) return Tables();
  if (manifest.tables_size() == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("the checkpoint has no embedding tables; the model has ",
                     model_.embedding_tables(0).name(), empty_.size() > 1 ? " and others" : ""));
  }
  Files files;
  for (const ShardTables& shard : manifest.tables()) {
    files.emplace_back();
    for (const CheckpointFile& file : shard.files()) files.back().push_back(file.name());
  }
  // Rows that have come of age since would have to be looked for in what is held.
  bool goes_on = !ages_ && directory == directory_ && files.size() == files_.size();
  for (size_t s = 0; goes_on && s < files.size(); ++s) {
    goes_on = files[s].size() >= files_[s].size() &&
              std::equal(files_[s].begin(), files_[s].end(), files[s].begin());
  }
  CODISTILL_ASSIGN_OR_RETURN(Tables tables,
                             ReadFiles(directory, manifest, goes_on ? files_ : Files(files.size()),
                                       goes_on ? tables_ : empty_));
  directory_ = directory;
  files_ = std::move(files);
  tables_ = tables;
  return tables;
}

absl::StatusOr<CheckpointTables::Tables> CheckpointTables::ReadFiles(
    const std::string& directory, const CheckpointManifest& manifest, const Files& done,
    const Tables& base) const {
  std::vector<FollowedRows::Builder> builders;
  for (const auto& table : base) builders.emplace_back(table);
  for (int s = 0; s < manifest.tables_size(); ++s) {
    const ShardTables& shard = manifest.tables(s);
    for (int f = static_cast<int>(done[s].size()); f < shard.files_size(); ++f) {
      CODISTILL_RETURN_IF_ERROR(ReadFile(JoinPath(directory, shard.files(f).name()), s,
                                         manifest.version().step(), &builders));
    }
  }
  Tables tables;
  for (FollowedRows::Builder& builder : builders) tables.push_back(builder.Build());
  return tables;
}

absl::Status CheckpointTables::ReadFile(const std::string& path, int shard, int64_t step,
                                        std::vector<FollowedRows::Builder>* builders) const {
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<TableFileReader> reader,
                             TableFileReader::Open(path, file_system_));
  const TableFileHeader& header = reader->header();
  if (header.shard() != shard) {
    return absl::DataLossError(absl::StrCat(path, ": is of shard ", header.shard(),
                                            "; the manifest has it as shard ", shard, "'s"));
  }
  for (int t = 0; t < model_.embedding_tables_size(); ++t) {
    const EmbeddingTableConfig& ours = model_.embedding_tables(t);
    if (header.tables_size() != model_.embedding_tables_size() ||
        header.tables(t).name() != ours.name() || header.tables(t).dim() != ours.dim() ||
        header.tables(t).row_floats() < ours.dim()) {
      return absl::FailedPreconditionError(absl::StrCat(
          path, ": has no embedding table ", ours.name(), " of dim ", ours.dim(), " in place ", t,
          " of ", model_.embedding_tables_size(), ", as the model has"));
    }
  }
  std::vector<uint64_t> keys, gone;
  std::vector<uint32_t> touched;
  std::vector<float> data;
  TableRows record;
  for (;;) {
    CODISTILL_ASSIGN_OR_RETURN(const bool more, reader->Next(&record));
    if (!more) return absl::OkStatus();
    const auto t = static_cast<int>(record.table());
    if (t < 0 || t >= model_.embedding_tables_size()) {
      return absl::DataLossError(absl::StrCat(path, ": rows of table ", record.table()));
    }
    const auto floats = static_cast<size_t>(header.tables(t).row_floats());
    if (!Unpack(record.keys(), &keys) || !Unpack(record.touched(), &touched) ||
        !Unpack(record.data(), &data) || touched.size() != keys.size() ||
        data.size() != keys.size() * floats) {
      return absl::DataLossError(absl::StrCat(path, ": rows of table ", header.tables(t).name(),
                                              " without all of their keys, steps or elements"));
    }
    FollowedRows::Builder& builder = (*builders)[t];
    const int64_t max_age = model_.embedding_tables(t).evict_age_steps();
    for (size_t i = 0; i < keys.size(); ++i) {
      if (max_age > 0 && step - static_cast<int64_t>(touched[i]) > max_age) {
        builder.Erase(keys[i]);
      } else {
        builder.Put(keys[i], data.data() + i * floats);
      }
    }
    // A key that waits for admission has no row, whatever an earlier file says.
    for (const std::string* bytes : {&record.removed(), &record.waiting()}) {
      if (!Unpack(*bytes, &gone)) {
        return absl::DataLossError(absl::StrCat(path, ": a key of ", bytes->size() % 8, " bytes"));
      }
      for (const uint64_t key : gone) builder.Erase(key);
    }
  }
}

}  // namespace codistill
