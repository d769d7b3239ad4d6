#ifndef CODISTILL_SERVER_SHARD_LINK_H_
#define CODISTILL_SERVER_SHARD_LINK_H_

#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// A leader's way to one of its shards: service Shard, without its transport. Calls return at once;
// each calls `done` exactly once, on any thread, possibly before it returns, with DEADLINE_EXCEEDED
// after `timeout` at the latest. Thread-safe.
class ShardLink {
 public:
  template <typename T>
  using Done = std::function<void(absl::StatusOr<T>)>;

  virtual ~ShardLink() = default;
  virtual void Probe(const ProbeRequest& request, absl::Duration timeout,
                     Done<ProbeReply> done) = 0;
  virtual void Restore(const RestoreRequest& request, absl::Duration timeout,
                       Done<RestoreReply> done) = 0;
  virtual void Prepare(const PrepareRequest& request, absl::Duration timeout,
                       Done<PrepareReply> done) = 0;
  virtual void Commit(const CommitRequest& request, absl::Duration timeout,
                      Done<CommitReply> done) = 0;
  virtual void WriteCheckpoint(const WriteCheckpointRequest& request, absl::Duration timeout,
                               Done<WriteCheckpointReply> done) = 0;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_SHARD_LINK_H_
