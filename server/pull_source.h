#ifndef CODISTILL_SERVER_PULL_SOURCE_H_
#define CODISTILL_SERVER_PULL_SOURCE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/parameter_server.pb.h"
#include "server/shard_store.h"

namespace codistill {

// What one Pull sends, chunk by chunk in shard-map order: the memory of the version's own blocks,
// kept alive and unchanged by `owner`. Nothing is copied, but for fp32 parameters that are to
// travel as bfloat16: these are converted into blocks of the shard's pool. Used by one call.
class PullSource {
 public:
  struct Block {
    TensorChunk chunk;
    const void* data = nullptr;
    size_t bytes = 0;
    std::shared_ptr<const void> owner;
  };

  // Of `cut` only the tensors whose index is in `tensors`, all if that is empty, in chunks of at
  // most `chunk_bytes`.
  PullSource(std::shared_ptr<const ShardStore> store, std::shared_ptr<const Cut> cut,
             Version version, const std::vector<uint32_t>& tensors, int64_t chunk_bytes,
             DataType transfer_dtype = DT_FLOAT);

  const Version& version() const { return version_; }
  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }
  // Bytes of a block, before it is read.
  size_t block_size(int64_t index) const;
  // Once each and in order: after the last the source lets go of the cut. ABORTED if the cut was
  // revoked.
  absl::StatusOr<Block> Read(int64_t index);

 private:
  struct Range {
    int piece = 0;
    int64_t begin = 0;  // element of the tensor
    int64_t count = 0;
    size_t block = 0;
    uint64_t offset = 0;  // in the block
  };
  const std::shared_ptr<const ShardStore> store_;
  std::shared_ptr<const Cut> cut_;
  const Version version_;
  const DataType transfer_dtype_;
  std::vector<Range> blocks_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_PULL_SOURCE_H_
