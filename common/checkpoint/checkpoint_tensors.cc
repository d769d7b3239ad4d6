#include "common/checkpoint/checkpoint_tensors.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/checkpoint/manifest.h"
#include "common/config/shard_map.h"
#include "common/tensor/tensor.h"

namespace codistill {
namespace {

int64_t ElementsOf(const TensorSpec& spec) {
  int64_t count = 1;
  for (const int64_t size : spec.shape()) count *= size;
  return count;
}

absl::Status CopyFile(const std::string& from, const std::string& to, FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<ReadableFile> source,
                             file_system->OpenForRead(from));
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<FileWriter> target,
                             FileWriter::Create(to, file_system));
  std::string part;
  for (uint64_t at = 0; at < source->size(); at += part.size()) {
    part.resize(std::min<uint64_t>(source->size() - at, 4 << 20));
    CODISTILL_RETURN_IF_ERROR(source->ReadAt(at, part.size(), part.data()));
    CODISTILL_RETURN_IF_ERROR(target->Append(part));
  }
  return target->SyncAndClose();
}

}  // namespace

absl::StatusOr<std::unique_ptr<CheckpointTensors>> CheckpointTensors::Open(
    const std::string& directory, CheckpointManifest manifest, FileSystem* file_system) {
  std::unique_ptr<CheckpointTensors> tensors(new CheckpointTensors(directory, std::move(manifest)));
  for (int i = 0; i < tensors->manifest_.files_size(); ++i) {
    CODISTILL_ASSIGN_OR_RETURN(
        std::unique_ptr<ShardFileReader> reader,
        ShardFileReader::Open(JoinPath(directory, tensors->manifest_.files(i).name()),
                              file_system));
    CODISTILL_RETURN_IF_ERROR(Annotate(tensors->AddFile(i, std::move(reader)),
                                       JoinPath(directory, tensors->manifest_.files(i).name())));
  }
  for (auto& item : tensors->parts_) {
    std::sort(item.second.begin(), item.second.end(),
              [](const Part& a, const Part& b) { return a.begin < b.begin; });
  }
  CODISTILL_RETURN_IF_ERROR(tensors->CheckWhole());
  return tensors;
}

absl::Status CheckpointTensors::AddFile(int index, std::unique_ptr<ShardFileReader> reader) {
  const CheckpointShardHeader& header = reader->header();
  if (header.group() != manifest_.group() || header.shard() != index ||
      header.version().generation() != manifest_.version().generation() ||
      header.version().step() != manifest_.version().step()) {
    return absl::DataLossError(absl::StrCat(
        "is of group ", header.group(), ", shard ", header.shard(), ", version ",
        header.version().generation(), ".", header.version().step(), "; the manifest has group ",
        manifest_.group(), ", shard ", index, ", version ", manifest_.version().generation(), ".",
        manifest_.version().step()));
  }
  for (int i = 0; i < header.entries_size(); ++i) {
    const CheckpointEntry& entry = header.entries(i);
    const int tensor = static_cast<int>(entry.piece().tensor());
    if (tensor < 0 || tensor >= manifest_.shard_map().tensors_size()) {
      return absl::DataLossError(absl::StrCat("entry ", i, " is of tensor ", entry.piece().tensor(),
                                              "; the manifest has ",
                                              manifest_.shard_map().tensors_size()));
    }
    const TensorSpec& spec = manifest_.shard_map().tensors(tensor);
    const int64_t begin = entry.piece().begin(), count = entry.piece().count();
    if (entry.dtype() != spec.dtype() || begin < 0 || count < 0 ||
        count > ElementsOf(spec) - begin ||
        entry.bytes() != static_cast<uint64_t>(count) * ElementSize(spec.dtype())) {
      return absl::DataLossError(absl::StrCat("entry ", i, ", elements [", begin, ", +", count,
                                              ") of tensor ", spec.name(), " in ", entry.bytes(),
                                              " bytes, does not fit that tensor"));
    }
    parts_[{tensor, entry.slot()}].push_back({begin, count, index, i});
  }
  files_.push_back(std::move(reader));
  return absl::OkStatus();
}

absl::Status CheckpointTensors::CheckWhole() const {
  for (int t = 0; t < manifest_.shard_map().tensors_size(); ++t) {
    const TensorSpec& spec = manifest_.shard_map().tensors(t);
    if (spec.role() != TensorSpec::TIED && parts_.count({t, ""}) == 0) {
      return absl::DataLossError(
          absl::StrCat(ManifestName(manifest_.version()), ": no file has tensor ", spec.name()));
    }
  }
  for (const auto& item : parts_) {
    int64_t next = 0;
    for (const Part& part : item.second) {
      if (part.begin != next) break;
      next += part.count;
    }
    const TensorSpec& spec = manifest_.shard_map().tensors(item.first.first);
    if (next != ElementsOf(spec)) {
      return absl::DataLossError(absl::StrCat(
          ManifestName(manifest_.version()), ": its files leave out or repeat elements of ",
          item.first.second.empty() ? "tensor" : item.first.second + " of tensor", " ", spec.name(),
          " at ", next));
    }
  }
  return absl::OkStatus();
}

std::vector<std::string> CheckpointTensors::Slots(int tensor) const {
  std::vector<std::string> slots;
  for (auto it = parts_.lower_bound({tensor, ""}); it != parts_.end() && it->first.first == tensor;
       ++it) {
    slots.push_back(it->first.second);
  }
  return slots;
}

std::string CheckpointTensors::TensorName(int tensor) const {
  const bool known = tensor >= 0 && tensor < manifest_.shard_map().tensors_size();
  return known ? manifest_.shard_map().tensors(tensor).name() : absl::StrCat("#", tensor);
}

absl::StatusOr<const char*> CheckpointTensors::Entry(const Part& part) {
  const std::pair<int, int> wanted(part.file, part.entry);
  if (read_ != wanted) {
    read_ = {-1, -1};
    read_bytes_.resize(files_[part.file]->header().entries(part.entry).bytes());
    CODISTILL_RETURN_IF_ERROR(files_[part.file]->Read(part.entry, read_bytes_.data()));
    read_ = wanted;
  }
  return read_bytes_.data();
}

absl::Status CheckpointTensors::Read(int tensor, const std::string& slot, int64_t begin,
                                     int64_t count, void* to) {
  const auto it = parts_.find({tensor, slot});
  if (it == parts_.end()) {
    return absl::NotFoundError(absl::StrCat("checkpoint ", ManifestName(manifest_.version()),
                                            " has no ", slot.empty() ? "values" : slot,
                                            " of tensor ", TensorName(tensor)));
  }
  const size_t size = ElementSize(manifest_.shard_map().tensors(tensor).dtype());
  char* out = static_cast<char*>(to);
  for (const Part& part : it->second) {
    const int64_t first = std::max(begin, part.begin);
    const int64_t last = std::min(begin + count, part.begin + part.count);
    if (first >= last) continue;
    CODISTILL_ASSIGN_OR_RETURN(const char* const bytes, Entry(part));
    std::memcpy(out + static_cast<size_t>(first - begin) * size,
                bytes + static_cast<size_t>(first - part.begin) * size,
                static_cast<size_t>(last - first) * size);
  }
  return absl::OkStatus();
}

absl::StatusOr<CheckpointManifest> ReshardCheckpoint(CheckpointTensors* from, int num_shards,
                                                     const std::string& directory,
                                                     FileSystem* file_system) {
  CheckpointManifest manifest = from->manifest();
  const std::string path = JoinPath(directory, ManifestName(manifest.version()));
  if (file_system->Exists(path)) {
    return absl::AlreadyExistsError(
        absl::StrCat(path, " exists; give another directory, or remove it"));
  }
  TensorList list;
  *list.mutable_tensors() = manifest.shard_map().tensors();
  CODISTILL_ASSIGN_OR_RETURN(*manifest.mutable_shard_map(), BuildShardMap(list, num_shards));
  manifest.set_shard_map_digest(ShardMapDigest(manifest.shard_map()));
  manifest.clear_files();
  if (manifest.version().shard_steps_size() > 0) {
    manifest.mutable_version()->clear_shard_steps();
    for (int s = 0; s < num_shards; ++s) {
      manifest.mutable_version()->add_shard_steps(manifest.version().step());
    }
  }
  CODISTILL_RETURN_IF_ERROR(file_system->MakeDirs(directory));
  for (int shard = 0; shard < num_shards; ++shard) {
    // One shard's part at a time in memory, as the shards themselves have it.
    std::vector<std::string> bytes;
    std::vector<ShardFileData> data;
    for (const Piece& piece : manifest.shard_map().pieces()) {
      if (piece.shard() != shard) continue;
      const int tensor = static_cast<int>(piece.tensor());
      const DataType dtype = list.tensors(tensor).dtype();
      for (const std::string& slot : from->Slots(tensor)) {
        bytes.emplace_back(static_cast<size_t>(piece.count()) * ElementSize(dtype), '\0');
        CODISTILL_RETURN_IF_ERROR(
            from->Read(tensor, slot, piece.begin(), piece.count(), bytes.back().data()));
        ShardFileData item;
        *item.entry.mutable_piece() = piece;
        item.entry.set_dtype(dtype);
        item.entry.set_slot(slot);
        item.bytes = bytes.back().size();
        data.push_back(std::move(item));
      }
    }
    for (size_t i = 0; i < data.size(); ++i) data[i].data = bytes[i].data();
    CheckpointShardHeader identity;
    identity.set_group(manifest.group());
    identity.set_shard(shard);
    identity.set_shard_map_digest(manifest.shard_map_digest());
    *identity.mutable_version() = manifest.version();
    if (manifest.version().shard_steps_size() > 0) {
      identity.mutable_version()->clear_shard_steps();
      identity.mutable_version()->add_shard_steps(manifest.version().step());
    }
    CODISTILL_ASSIGN_OR_RETURN(
        *manifest.add_files(),
        WriteShardFile(directory, ShardFileName(shard, num_shards, manifest.version(), 0), identity,
                       data, file_system));
  }
  for (const ShardTables& tables : manifest.tables()) {
    for (const CheckpointFile& file : tables.files()) {
      CODISTILL_RETURN_IF_ERROR(CopyFile(JoinPath(from->directory(), file.name()),
                                         JoinPath(directory, file.name()), file_system));
    }
  }
  CODISTILL_RETURN_IF_ERROR(WriteManifest(directory, manifest, file_system));
  return manifest;
}

}  // namespace codistill
