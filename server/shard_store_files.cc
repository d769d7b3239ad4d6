// How a shard's store comes from files and goes to them.

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/checkpoint/safetensors.h"
#include "common/checkpoint/shard_file.h"
#include "common/tensor/tensor.h"
#include "server/shard_store.h"

namespace codistill {
namespace {

// A tensor of the file must be the model's tensor in all but its values.
absl::Status CheckFits(const SafetensorsReader& reader, const TensorSpec& spec,
                       const SafetensorsReader::Entry& entry) {
  const std::vector<int64_t> shape(spec.shape().begin(), spec.shape().end());
  if (entry.dtype == spec.dtype() && entry.shape == shape) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(reader.path(), ": tensor ", spec.name(), " is ",
                                                 DataTypeName(entry.dtype),
                                                 ShapeString(entry.shape), "; the model's is ",
                                                 DataTypeName(spec.dtype()), ShapeString(shape)));
}

template <typename T>
absl::StatusOr<T> Annotated(absl::StatusOr<T> value, absl::string_view context) {
  if (!value.ok()) return Annotate(value.status(), context);
  return value;
}

std::string EntryKey(const Piece& piece, const std::string& slot) {
  return absl::StrCat(piece.tensor(), "/", piece.begin(), "/", piece.count(), "/", slot);
}

}  // namespace

absl::Status ShardStore::LoadInitial(const std::string& weights, const std::string& warm_start,
                                     FileSystem* file_system) {
  Clear();
  CODISTILL_ASSIGN_OR_RETURN(
      const std::unique_ptr<SafetensorsReader> archive,
      Annotated(SafetensorsReader::Open(weights, file_system), "initial weights"));
  std::unique_ptr<SafetensorsReader> warm;
  if (!warm_start.empty()) {
    CODISTILL_ASSIGN_OR_RETURN(
        warm, Annotated(SafetensorsReader::Open(warm_start, file_system), "warm start"));
    bool any = false;
    for (const TensorSpec& spec : layout_.map().tensors()) {
      const SafetensorsReader::Entry* const entry = warm->Find(spec.name());
      if (entry == nullptr || spec.role() == TensorSpec::TIED) continue;
      CODISTILL_RETURN_IF_ERROR(Annotate(CheckFits(*warm, spec, *entry), "warm start"));
      any = true;
    }
    if (!any) {
      return absl::InvalidArgumentError(
          absl::StrCat("warm start: ", warm_start, " has no tensor of the model"));
    }
  }
  for (const ShardPiece& piece : layout_.pieces()) {
    const TensorSpec& spec = layout_.map().tensors(static_cast<int>(piece.piece.tensor()));
    const SafetensorsReader* source = archive.get();
    const SafetensorsReader::Entry* entry = archive->Find(piece.name);
    if (warm != nullptr && warm->Find(piece.name) != nullptr) {
      source = warm.get();
      entry = warm->Find(piece.name);
    } else if (entry == nullptr) {
      return absl::NotFoundError(
          absl::StrCat("initial weights: ", weights, ": has no tensor ", piece.name));
    } else {
      CODISTILL_RETURN_IF_ERROR(Annotate(CheckFits(*archive, spec, *entry), "initial weights"));
    }
    absl::Status status;
    ForSegments(piece, 0, piece.piece.count(),
                [&](size_t block, uint64_t offset, int64_t first, int64_t count) {
                  if (!status.ok()) return;
                  status = source->Read(
                      piece.name,
                      static_cast<uint64_t>(piece.piece.begin() + first) * piece.element_size,
                      static_cast<uint64_t>(count) * piece.element_size,
                      values_[block].mutable_data() + offset);
                });
    CODISTILL_RETURN_IF_ERROR(status);
  }
  ReserveCuts();
  MutexLock lock(&mu_);
  updating_ = false;
  return absl::OkStatus();
}

absl::Status ShardStore::LoadCheckpoint(const std::string& path, const CheckpointManifest& manifest,
                                        FileSystem* file_system) {
  Clear();
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<ShardFileReader> reader,
                             ShardFileReader::Open(path, file_system));
  const CheckpointShardHeader& header = reader->header();
  if (header.group() != manifest.group() || header.shard() != layout_.shard() ||
      header.version().generation() != manifest.version().generation() ||
      header.version().step() != manifest.version().step() ||
      header.shard_map_digest() != manifest.shard_map_digest()) {
    return absl::DataLossError(absl::StrCat(
        path, ": is of group ", header.group(), ", shard ", header.shard(), ", version ",
        header.version().generation(), ".", header.version().step(), "; the manifest has group ",
        manifest.group(), ", shard ", layout_.shard(), ", version ",
        manifest.version().generation(), ".", manifest.version().step()));
  }
  std::map<std::string, int> entries;
  for (int i = 0; i < header.entries_size(); ++i) {
    entries[EntryKey(header.entries(i).piece(), header.entries(i).slot())] = i;
  }
  const auto read = [&](const ShardPiece& piece, const std::string& slot, BlockArray* to) {
    const auto it = entries.find(EntryKey(piece.piece, slot));
    if (it == entries.end() || header.entries(it->second).bytes() != piece.bytes ||
        header.entries(it->second).dtype() != piece.dtype) {
      return absl::DataLossError(absl::StrCat(path, ": has no ", slot.empty() ? "values" : slot,
                                              " of tensor ", piece.name, " from element ",
                                              piece.piece.begin()));
    }
    std::vector<absl::Span<char>> parts;
    ForSegments(piece, 0, piece.piece.count(),
                [&](size_t block, uint64_t offset, int64_t, int64_t count) {
                  parts.emplace_back(reinterpret_cast<char*>((*to)[block].mutable_data()) + offset,
                                     static_cast<size_t>(count) * piece.element_size);
                });
    return reader->ReadParts(it->second, parts);
  };
  for (const ShardPiece& piece : layout_.pieces()) {
    CODISTILL_RETURN_IF_ERROR(read(piece, "", &values_));
    if (piece.role != TensorSpec::PARAMETER) continue;
    for (size_t s = 0; s < slots_.size(); ++s) {
      CODISTILL_RETURN_IF_ERROR(read(piece, slot_names_[s], &slots_[s]));
    }
  }
  ReserveCuts();
  MutexLock lock(&mu_);
  step_ = header.version().shard_steps_size() > 0 ? header.version().shard_steps(0)
                                                  : header.version().step();
  updating_ = false;
  return absl::OkStatus();
}

absl::Status ShardStore::LoadResharded(CheckpointTensors* tensors) {
  Clear();
  const auto read = [&](const ShardPiece& piece, const std::string& slot, BlockArray* to) {
    absl::Status status;
    ForSegments(piece, 0, piece.piece.count(),
                [&](size_t block, uint64_t offset, int64_t first, int64_t count) {
                  if (!status.ok()) return;
                  status = tensors->Read(static_cast<int>(piece.piece.tensor()), slot,
                                         piece.piece.begin() + first, count,
                                         (*to)[block].mutable_data() + offset);
                });
    return status;
  };
  for (const ShardPiece& piece : layout_.pieces()) {
    CODISTILL_RETURN_IF_ERROR(read(piece, "", &values_));
    if (piece.role != TensorSpec::PARAMETER) continue;
    for (size_t s = 0; s < slots_.size(); ++s) {
      CODISTILL_RETURN_IF_ERROR(read(piece, slot_names_[s], &slots_[s]));
    }
  }
  ReserveCuts();
  MutexLock lock(&mu_);
  step_ = tensors->manifest().version().step();
  updating_ = false;
  return absl::OkStatus();
}

absl::StatusOr<CheckpointFile> ShardStore::WriteSnapshot(const Snapshot& snapshot,
                                                         const std::string& directory,
                                                         const std::string& name,
                                                         CheckpointShardHeader identity,
                                                         FileSystem* file_system) const {
  std::vector<ShardFileData> data;
  const auto add = [&](const ShardPiece& piece, const std::string& slot, const BlockArray& from) {
    ShardFileData item;
    *item.entry.mutable_piece() = piece.piece;
    item.entry.set_dtype(piece.dtype);
    item.entry.set_slot(slot);
    ForSegments(
        piece, 0, piece.piece.count(), [&](size_t block, uint64_t offset, int64_t, int64_t count) {
          item.parts.emplace_back(reinterpret_cast<const char*>(from[block].data()) + offset,
                                  static_cast<size_t>(count) * piece.element_size);
        });
    item.bytes = piece.bytes;
    data.push_back(std::move(item));
  };
  for (const ShardPiece& piece : layout_.pieces()) {
    add(piece, "", snapshot.values);
    if (piece.role != TensorSpec::PARAMETER) continue;
    for (size_t s = 0; s < slot_names_.size(); ++s) {
      add(piece, slot_names_[s], snapshot.slots[s]);
    }
  }
  return WriteShardFile(directory, name, std::move(identity), data, file_system);
}

}  // namespace codistill
