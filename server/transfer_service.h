#ifndef CODISTILL_SERVER_TRANSFER_SERVICE_H_
#define CODISTILL_SERVER_TRANSFER_SERVICE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "common/rpc/bulk_server.h"
#include "proto/parameter_server.pb.h"
#include "server/shard.h"

namespace codistill {

// Service TensorTransfer: Push, Pull and PullRows as raw frames on the bulk server's threads. A
// pushed payload is copied once, from the received slices to where it is staged; a cut is sent from
// its own memory, live weights through one copy a frame. One frame of a call is under way at a
// time. The shard outlives the server.
class TransferService {
 public:
  TransferService(ModelShard* shard, GroupRef group) : shard_(shard), group_(std::move(group)) {}

  // The handlers of one call each; RegisterMethods gives them to a server.
  std::unique_ptr<BulkHandler> NewPushHandler();
  std::unique_ptr<BulkHandler> NewPullHandler();
  std::unique_ptr<BulkHandler> NewPullRowsHandler();

  // Before the server starts; this object outlives it.
  void RegisterMethods(BulkServer* server);

  // Bytes of messages received in pushes and sent in pulls.
  uint64_t push_bytes() const { return push_bytes_.load(std::memory_order_relaxed); }
  uint64_t pull_bytes() const { return pull_bytes_.load(std::memory_order_relaxed); }

 private:
  class PushHandler;
  class PullHandler;
  class PullRowsHandler;

  ModelShard* const shard_;
  const GroupRef group_;
  std::atomic<uint64_t> push_bytes_{0};
  std::atomic<uint64_t> pull_bytes_{0};
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_TRANSFER_SERVICE_H_
