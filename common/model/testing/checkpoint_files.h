#ifndef CODISTILL_COMMON_MODEL_TESTING_CHECKPOINT_FILES_H_
#define CODISTILL_COMMON_MODEL_TESTING_CHECKPOINT_FILES_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/checkpoint.pb.h"

namespace codistill {

// For tests: writes a checkpoint as the shards of a group of `map` and its leader would, into a
// directory that exists. `values`: bytes of every tensor of the map, by index, empty for TIED ones.
// `tables`: files of embedding tables that are there already, by shard. Values only, no slots.
absl::StatusOr<CheckpointManifest> WriteCheckpointFiles(
    const std::string& directory, const ShardMap& map, uint64_t generation, int64_t step,
    const std::vector<std::string>& values,
    const std::vector<std::vector<CheckpointFile>>& tables = {});

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_TESTING_CHECKPOINT_FILES_H_
