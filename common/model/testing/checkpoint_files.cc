#include "common/model/testing/checkpoint_files.h"

#include "common/base/status.h"
#include "common/checkpoint/manifest.h"
#include "common/checkpoint/shard_file.h"
#include "common/config/shard_map.h"
#include "common/tensor/tensor.h"

namespace codistill {

absl::StatusOr<CheckpointManifest> WriteCheckpointFiles(
    const std::string& directory, const ShardMap& map, uint64_t generation, int64_t step,
    const std::vector<std::string>& values,
    const std::vector<std::vector<CheckpointFile>>& tables) {
  CheckpointManifest manifest;
  manifest.set_format_version(1);
  manifest.set_job("test");
  manifest.set_group("alpha");
  manifest.mutable_version()->set_generation(generation);
  manifest.mutable_version()->set_step(step);
  *manifest.mutable_shard_map() = map;
  manifest.set_shard_map_digest(ShardMapDigest(map));
  for (int shard = 0; shard < map.num_shards(); ++shard) {
    std::vector<ShardFileData> data;
    for (const Piece& piece : map.pieces()) {
      if (piece.shard() != shard) continue;
      const DataType dtype = map.tensors(static_cast<int>(piece.tensor())).dtype();
      const size_t size = ElementSize(dtype);
      ShardFileData item;
      *item.entry.mutable_piece() = piece;
      item.entry.set_dtype(dtype);
      item.bytes = static_cast<uint64_t>(piece.count()) * size;
      item.data = values.at(piece.tensor()).data() + piece.begin() * size;
      data.push_back(item);
    }
    CheckpointShardHeader identity;
    identity.set_group(manifest.group());
    identity.set_shard(shard);
    identity.set_shard_map_digest(manifest.shard_map_digest());
    *identity.mutable_version() = manifest.version();
    CODISTILL_ASSIGN_OR_RETURN(
        *manifest.add_files(),
        WriteShardFile(directory, ShardFileName(shard, map.num_shards(), manifest.version(), 0),
                       identity, data));
  }
  for (const std::vector<CheckpointFile>& files : tables) {
    ShardTables* const shard = manifest.add_tables();
    for (const CheckpointFile& file : files) *shard->add_files() = file;
  }
  CODISTILL_RETURN_IF_ERROR(WriteManifest(directory, manifest));
  return manifest;
}

}  // namespace codistill
