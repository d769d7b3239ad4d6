#ifndef CODISTILL_SERVER_PULL_SOURCE_H_
#define CODISTILL_SERVER_PULL_SOURCE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/parameter_server.pb.h"
#include "server/shard_store.h"

namespace codistill {

// What one Pull sends, chunk by chunk in shard-map order. Chunks of a cut are the cut's own memory,
// kept alive by `owner`; chunks of live weights are copied when they are asked for, each into
// memory of its own. Used by one call.
class PullSource {
 public:
  struct Block {
    TensorChunk chunk;
    const void* data = nullptr;
    size_t bytes = 0;
    std::shared_ptr<const void> owner;
  };

  // `cut` null: live weights, of exactly `exact_step` unless that is negative. Only the tensors
  // whose index is in `tensors`, all if that is empty.
  PullSource(std::shared_ptr<const ShardStore> store, std::shared_ptr<const ShardStore::Cut> cut,
             int64_t exact_step, Version version, const std::vector<uint32_t>& tensors,
             int64_t block_bytes);

  const Version& version() const { return version_; }
  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }
  // ABORTED if live weights have moved on in the meantime.
  absl::StatusOr<Block> Read(int64_t index) const;

 private:
  struct Range {
    int piece = 0;
    int64_t begin = 0;  // element of the tensor
    int64_t count = 0;
  };
  const std::shared_ptr<const ShardStore> store_;
  const std::shared_ptr<const ShardStore::Cut> cut_;
  const int64_t exact_step_;
  const Version version_;
  std::vector<Range> blocks_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_PULL_SOURCE_H_
