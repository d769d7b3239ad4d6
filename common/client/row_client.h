#ifndef CODISTILL_COMMON_CLIENT_ROW_CLIENT_H_
#define CODISTILL_COMMON_CLIENT_ROW_CLIENT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/client/tensor_client.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// Reads rows of embedding tables from all shards of a group, straight into the caller's array: one
// copy, from where gRPC received them. Keys are split by shard (common/embedding/row_placement.h);
// several reads may be under way, so that shards and network never wait for one another. Rows are
// pushed with the dense gradients of a step: PushStream::AddRows. Thread-safe.
class RowClient {
 public:
  struct Options {
    GroupRef group;
    uint64_t shard_map_digest = 0;
    std::vector<std::string> shard_addresses;  // by shard index
    // Calls under way at a time, each to one shard for at most kMaxKeysACall keys, on a thread
    // each.
    int max_calls = 8;
    bool shared_memory = true;  // where it is to be had; else gRPC
  };
  static constexpr size_t kMaxKeysACall = 1 << 17;

  // INVALID_ARGUMENT without a shard, or for max_calls < 1.
  static absl::StatusOr<std::unique_ptr<RowClient>> Create(Options options);
  // Reads have ended before.
  virtual ~RowClient() = default;

  struct Request {
    // kStep: rows of exactly this step, waiting until it exists (SYNC); kAtLeastStep: as they are.
    TensorClient::Source source = TensorClient::Source::kStep;
    uint64_t generation = 0;
    int64_t step = 0;
    int table = 0;  // index in the job's embedding tables
    int dim = 0;
    absl::Span<const uint64_t> keys;  // each once
    float* rows = nullptr;            // keys.size() * dim, in the order of the keys
  };
  struct Result {
    uint64_t bytes = 0;  // sent and received, headers included
  };

  // A read under way.
  class Pending {
   public:
    // Cancels the read, and waits until the rows are not written any more.
    virtual ~Pending() = default;
    // Waits for the rows: all, or an error, the first shard's, prefixed by its index and address;
    // then the contents are unspecified. Called once.
    virtual absl::StatusOr<Result> Wait() = 0;
  };
  // Begins to read. `keys` and `rows` stay valid until Wait has returned or the result is gone.
  // Reads beyond max_calls wait for their turn.
  virtual std::unique_ptr<Pending> Start(const Request& request, absl::Time deadline) = 0;

  absl::StatusOr<Result> Pull(const Request& request, absl::Time deadline) {
    return Start(request, deadline)->Wait();
  }
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_ROW_CLIENT_H_
