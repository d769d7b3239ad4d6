#ifndef CODISTILL_COMMON_RPC_CHANNEL_H_
#define CODISTILL_COMMON_RPC_CHANNEL_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"

// The one place where client channels and contexts are made: message limits, keepalive, reconnect
// back-off (docs/operations.md says why each has its value).
namespace codistill {

// Largest message on the data plane (frames) and of a prediction.
inline constexpr int kMaxFrameBytes = (4 << 20) + (64 << 10);
inline constexpr int kMaxPredictionBytes = 64 << 20;
// Largest message of everything else: tensor lists, shard maps, worker state, histories.
inline constexpr int kMaxControlBytes = 16 << 20;

// Pings on an otherwise silent connection, and how long their answer may take.
inline constexpr int kKeepaliveMs = 20000;
inline constexpr int kKeepaliveTimeoutMs = 10000;

enum class ChannelUse {
  kControl,     // small calls, heartbeats
  kBulk,        // tensor frames: a connection of its own
  kPrediction,  // prediction requests: a connection of its own
};

// Connects lazily; reconnects by itself, at most a second after an attempt was refused. `address`
// is host:port.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, ChannelUse use);

// A context with a deadline; there is no other way to get one.
std::unique_ptr<grpc::ClientContext> MakeContext(absl::Time deadline);

// Calls `attempt` until it returns something other than UNAVAILABLE or DEADLINE_EXCEEDED, or
// `deadline` has passed: capped exponential back-off with jitter. Only for calls that are
// idempotent. `stop` (optional) ends it early with CANCELLED.
absl::Status RetryUntil(absl::Time deadline, const std::function<absl::Status()>& attempt,
                        const std::function<bool()>& stop = nullptr);

namespace internal {

// Keeps gRPC's library initialised until the process ends. It would otherwise be taken down with
// the last channel or server, which now and then waits 10 s for a poller of its own
// (default-executor, run_poller). Called by whatever makes channels and servers.
void KeepGrpcRunning();

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_CHANNEL_H_
