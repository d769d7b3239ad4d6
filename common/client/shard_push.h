#ifndef CODISTILL_COMMON_CLIENT_SHARD_PUSH_H_
#define CODISTILL_COMMON_CLIENT_SHARD_PUSH_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/base/mutex.h"
#include "common/client/call_group.h"
#include "common/client/push_verdict.h"
#include "common/rpc/bulk_channel.h"
#include "common/rpc/frame.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// Bytes of payload that wait to be sent to one shard; whoever adds more waits.
inline constexpr size_t kMaxQueuedPushBytes = 16 << 20;

// The stream of one push to one shard, with a thread that sends. Add and SendEnd are called by one
// thread. The streams of a push share its `group` and `verdict`, which outlive them; END goes out
// once all have computed their sums.
class ShardPush {
 public:
  struct Part {
    TensorChunk chunk;
    RowChunk rows;     // with a count: rows of an embedding table, not a chunk
    std::string name;  // of the tensor, for not_finite_tensor
    // Elements of the chunk's dtype; of a chunk of DT_HALF, floats that are rounded when it is
    // sent.
    const void* data = nullptr;
    size_t size = 0;  // bytes on the wire
    std::shared_ptr<const void> owner;
  };

  ShardPush(std::shared_ptr<BulkChannel> channel, PushBegin begin, absl::Time deadline, int shard,
            std::string label, CallGroup* group, PushVerdict* verdict);
  // Cancels the stream if it has not ended.
  ~ShardPush();

  // Queues one chunk; small ones travel several in a frame. Waits while more than
  // kMaxQueuedPushBytes are queued; drops it once the push has failed or was answered early.
  void Add(Part part);
  // Queues END. `squared_norm` will be of this shard's frames, `finite` and `not_finite_tensor` of
  // the whole push.
  void SendEnd(PushEnd end);
  // After SendEnd: waits for the shard's answer. On failure the error is in the group.
  absl::StatusOr<PushReply> Wait();

  uint64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }

 private:
  void Run(std::shared_ptr<BulkChannel> channel, const PushBegin& begin);
  absl::Status Send(BulkStream* stream, const PushBegin& begin);
  absl::Status ReadReply(BulkStream* stream);
  void AddSum(const Part& part, double squares);
  PayloadRef Halve(const Part& part);
  bool Write(BulkStream* stream, const FrameHeader& header, absl::Span<const Part> parts);
  bool HasRoom() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return over_ || !full_; }
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return over_ || !parts_.empty() || end_queued_;
  }

  const absl::Time deadline_;
  const int shard_;
  const int64_t step_;
  const std::string label_;  // "shard 1 (host:port)"
  CallGroup* const group_;
  PushVerdict* const verdict_;

  Mutex mu_;
  std::deque<Part> parts_ ABSL_GUARDED_BY(mu_);
  size_t queued_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  // Who waits for room waits until half is free: waking for every frame costs more than it brings.
  bool full_ ABSL_GUARDED_BY(mu_) = false;
  bool end_queued_ ABSL_GUARDED_BY(mu_) = false;
  PushEnd end_ ABSL_GUARDED_BY(mu_);
  bool over_ ABSL_GUARDED_BY(mu_) = false;  // nothing more will be sent
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  PushReply reply_ ABSL_GUARDED_BY(mu_);

  std::atomic<uint64_t> bytes_{0};
  // Of what was sent; the sending thread's own.
  double squared_norm_ = 0;
  std::string not_finite_tensor_;

  std::thread thread_;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_SHARD_PUSH_H_
