#ifndef CODISTILL_COMMON_CLIENT_SHARD_PULL_H_
#define CODISTILL_COMMON_CLIENT_SHARD_PULL_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/client/call_group.h"
#include "common/client/shard_layout.h"
#include "common/rpc/bulk_channel.h"
#include "common/tensor/tensor.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

struct ShardPullResult {
  Version version;
  uint64_t bytes = 0;
};

// Reads one shard's pieces into `tensors` (one view for each tensor of the map, checked by the
// caller), each chunk copied once, from where it was received. DATA_LOSS if the stream is not
// exactly this shard's pieces, each whole and in order; the message says what came and what was
// due.
absl::StatusOr<ShardPullResult> PullShard(BulkChannel* channel, const PullRequest& request,
                                          const ShardLayout& layout, int shard,
                                          absl::Span<const TensorView> tensors, absl::Time deadline,
                                          CallGroup* group);

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_SHARD_PULL_H_
