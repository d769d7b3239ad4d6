#ifndef CODISTILL_COMMON_CONFIG_SHARD_MAP_H_
#define CODISTILL_COMMON_CONFIG_SHARD_MAP_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/model.pb.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// Places tensors on shards; a pure function of its arguments, so that every process computes the
// same map. Tensors of at least kSplitElements elements are cut into one near-equal contiguous
// piece a shard (cuts on multiples of 16 elements); smaller ones, and all buffers, go whole to the
// shard with the fewest bytes so far, in order of falling size, ties by name and lowest shard. TIED
// tensors have no pieces. INVALID_ARGUMENT names a tensor with a bad shape, dtype, role or a name
// used twice.
inline constexpr int64_t kSplitElements = 16384;
absl::StatusOr<ShardMap> BuildShardMap(const TensorList& tensors, int num_shards);

// Bytes of tensors on each shard, by index.
std::vector<uint64_t> BytesOfShards(const ShardMap& map);

// 64 bits over the canonical bytes of the map; never 0.
uint64_t ShardMapDigest(const ShardMap& map);

// First difference between two tensor lists, for people; empty if they are the same.
std::string FirstDifference(const TensorList& ours, const TensorList& theirs);

// Reads a tensor list written by models/export.py. Errors name the file.
absl::StatusOr<TensorList> LoadTensorList(const std::string& path);

}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_SHARD_MAP_H_
