#ifndef CODISTILL_COMMON_CHECKPOINT_CHECKPOINT_TENSORS_H_
#define CODISTILL_COMMON_CHECKPOINT_CHECKPOINT_TENSORS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/checkpoint/shard_file.h"
#include "proto/checkpoint.pb.h"

namespace codistill {

// The tensors of a checkpoint as wholes, on however many shards it was written: how another number
// of shards loads it, and how it is exported. All damage is DATA_LOSS and names the file. Not
// thread-safe.
class CheckpointTensors {
 public:
  // Opens every file the manifest names.
  static absl::StatusOr<std::unique_ptr<CheckpointTensors>> Open(
      const std::string& directory, CheckpointManifest manifest,
      FileSystem* file_system = FileSystem::Real());

  const CheckpointManifest& manifest() const { return manifest_; }
  const std::string& directory() const { return directory_; }

  // What there is of a tensor (index in the manifest's shard map): "" for the values first, then
  // its optimizer slots by name. Empty for a TIED tensor.
  std::vector<std::string> Slots(int tensor) const;

  // `count` elements from element `begin` of a tensor, with room for as many at `to`. Fast when
  // what is asked for is in the files' order: an entry that was read is kept for the next call.
  absl::Status Read(int tensor, const std::string& slot, int64_t begin, int64_t count, void* to);

 private:
  struct Part {
    int64_t begin = 0;
    int64_t count = 0;
    int file = 0;
    int entry = 0;
  };

  CheckpointTensors(std::string directory, CheckpointManifest manifest)
      : directory_(std::move(directory)), manifest_(std::move(manifest)) {}
  absl::Status AddFile(int index, std::unique_ptr<ShardFileReader> reader);
  absl::Status CheckWhole() const;
  absl::StatusOr<const char*> Entry(const Part& part);
  std::string TensorName(int tensor) const;

  const std::string directory_;
  const CheckpointManifest manifest_;
  std::vector<std::unique_ptr<ShardFileReader>> files_;
  // By (tensor, slot), in order of begin.
  std::map<std::pair<int, std::string>, std::vector<Part>> parts_;
  std::pair<int, int> read_ = {-1, -1};  // file and entry in read_bytes_
  std::string read_bytes_;
};

// Writes a checkpoint again as `num_shards` shards would have written it, into a directory that has
// no checkpoint of that version. In ASYNC every shard goes on from the group's step. Files of
// embedding tables are copied: any number of shards reads them. Returns the new manifest.
// ALREADY_EXISTS if the version is there.
absl::StatusOr<CheckpointManifest> ReshardCheckpoint(CheckpointTensors* from, int num_shards,
                                                     const std::string& directory,
                                                     FileSystem* file_system = FileSystem::Real());

}  // namespace codistill

#endif  // CODISTILL_COMMON_CHECKPOINT_CHECKPOINT_TENSORS_H_
