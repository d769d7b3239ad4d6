#ifndef CODISTILL_SERVER_FOLLOW_SERVICE_H_
#define CODISTILL_SERVER_FOLLOW_SERVICE_H_

#include <atomic>
#include <cstdint>
#include <utility>

#include "common/rpc/bulk_server.h"
#include "proto/parameter_server.pb.h"
#include "server/shard.h"

namespace codistill {

// TensorTransfer.Follow: embedding tables at published cuts, as raw frames on the bulk server's
// threads; a frame is put together when the one before it has left. The shard outlives the server.
class FollowService {
 public:
  FollowService(ModelShard* shard, GroupRef group) : shard_(shard), group_(std::move(group)) {}

  // Before the server starts; this object outlives it.
  void RegisterMethods(BulkServer* server);

  // Bytes of messages sent.
  uint64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }

 private:
  class Handler;

  ModelShard* const shard_;
  const GroupRef group_;
  std::atomic<uint64_t> bytes_{0};
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_FOLLOW_SERVICE_H_
