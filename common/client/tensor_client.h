#ifndef CODISTILL_COMMON_CLIENT_TENSOR_CLIENT_H_
#define CODISTILL_COMMON_CLIENT_TENSOR_CLIENT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/tensor/tensor.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// One push, open towards all shards of a group. Frames leave while the caller goes on computing; a
// bounded number is in flight, after which Add* wait. Used by one thread, but for Cancel.
class PushStream {
 public:
  virtual ~PushStream() = default;  // cancels the push if it was not waited for
  // The mean gradient of tensor `index` (shard-map index), fp32, whole. `owner` keeps `data` alive
  // and unchanged until gRPC lets go of it. Errors surface in Wait.
  virtual void AddGradient(int index, const float* data, std::shared_ptr<const void> owner) = 0;
  // The value of a buffer after the step.
  virtual void AddBuffer(int index, const void* data, std::shared_ptr<const void> owner) = 0;
  virtual void AddWorkerState(std::string state) = 0;
  // The mean gradients of rows of embedding table `table` (index in the job; `name` is for
  // messages): `keys`, each once in a push, and keys.size() * dim floats in their order. Copied
  // before it returns.
  virtual void AddRows(int table, absl::string_view name, int dim, absl::Span<const uint64_t> keys,
                       const float* gradients) = 0;

  struct Result {
    PushOutcome outcome = PUSH_OUTCOME_INVALID;
    int64_t step = 0;     // as in PushReply, of shard 0
    std::string message;  // why REJECTED, ...
    uint64_t bytes = 0;   // sent, headers included
  };
  // Sends END after what was added (squared_norm, finite and not_finite_tensor are filled in here,
  // per shard), without waiting. Once.
  virtual void End(PushEnd end) = 0;
  // After End: waits for the decision. Fails with the first shard's error, prefixed by its index
  // and address. Once.
  virtual absl::StatusOr<Result> Wait() = 0;
  absl::StatusOr<Result> Finish(PushEnd end) {
    End(std::move(end));
    return Wait();
  }
  // Ends the push, so that Wait fails with CANCELLED if the decision is not here yet. From any
  // thread.
  virtual void Cancel() {}
};

// Tensors to and from all shards of a group, in parallel, one thread and one connection a shard.
// Thread-safe for one Pull and a few pushes at a time.
class TensorClient {
 public:
  struct Options {
    GroupRef group;
    ShardMap shard_map;
    std::vector<std::string> shard_addresses;  // by shard index
    // Through shared memory to shards on this host that allow it (common/rpc/bulk_channel.h).
    bool shared_memory = true;
    // How fp32 parameters travel in pulls: DT_FLOAT or DT_BFLOAT16 (PullRequest.transfer_dtype).
    // Views are fp32 either way.
    DataType transfer_dtype = DT_FLOAT;
    // How fp32 gradients travel in pushes: DT_FLOAT or DT_HALF (TransportConfig.push_dtype).
    DataType push_dtype = DT_FLOAT;
  };
  virtual ~TensorClient() = default;
  // INVALID_ARGUMENT if addresses and map disagree in number.
  static absl::StatusOr<std::unique_ptr<TensorClient>> Create(Options options);

  enum class Source { kStep, kAtLeastStep, kCut };
  struct PullResult {
    Version version;
    uint64_t bytes = 0;
  };
  // Reads the group's tensors of `step` straight into `tensors`, one view for every tensor of the
  // shard map (views of TIED tensors may be empty). Complete or an error: on failure the contents
  // are unspecified. FAILED_PRECONDITION if a view's dtype or size differs from the map.
  virtual absl::StatusOr<PullResult> Pull(Source source, uint64_t generation, int64_t step,
                                          absl::Span<const TensorView> tensors,
                                          absl::Time deadline) = 0;
  // Ends a Pull in progress, if there is one, with CANCELLED. From any thread.
  virtual void CancelPull() {}

  // Streams opened so far, by what carries them; one for each shard of a pull or push.
  struct StreamCounts {
    int64_t shared_memory = 0;
    int64_t grpc = 0;
  };
  virtual StreamCounts stream_counts() const { return {}; }

  struct PushHeader {
    uint64_t generation = 0;
    int64_t step = 0;
    int32_t rank = 0;
    uint64_t incarnation = 0;
    int64_t weights_step = 0;
    // ASYNC: of the weights, as their pull told; by shard. Empty: weights_step for all, not told.
    std::vector<int64_t> shard_steps;
    std::vector<uint64_t> shard_incarnations;
    uint64_t end_example = 0;  // ASYNC: one past the last example of the step
  };
  virtual std::unique_ptr<PushStream> StartPush(const PushHeader& header, absl::Time deadline) = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_TENSOR_CLIENT_H_
