#ifndef CODISTILL_COMMON_CLIENT_LEADER_CLIENT_H_
#define CODISTILL_COMMON_CLIENT_LEADER_CLIENT_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// The calls to a group's leader, without gRPC types. Thread-safe. Every call takes a deadline and
// makes one attempt; callers decide about retries (RetryUntil in common/rpc/channel.h).
class LeaderClient {
 public:
  virtual ~LeaderClient() = default;
  static std::unique_ptr<LeaderClient> Create(const std::string& address, GroupRef group);

  virtual absl::StatusOr<RegisterReply> Register(RegisterRequest request, absl::Time deadline) = 0;
  virtual absl::StatusOr<GetAssignmentsReply> GetAssignments(GetAssignmentsRequest request,
                                                             absl::Time deadline) = 0;
  virtual absl::StatusOr<HeartbeatReply> Heartbeat(HeartbeatRequest request,
                                                   absl::Time deadline) = 0;
  virtual absl::Status ReportEnd(ReportEndRequest request, absl::Time deadline) = 0;
  virtual absl::Status ReportEvaluation(EvaluationResult result, absl::Time deadline) = 0;
  virtual absl::StatusOr<GetHistoryReply> GetHistory(absl::Time deadline) = 0;
};

// Follows a group's state through Watch on a thread of its own: reconnects by itself when the
// stream breaks or falls silent for 5 s, until destroyed. `on_state` is called from that thread for
// every message (a copy in which shard_map is always filled once known).
class GroupWatcher {
 public:
  static std::unique_ptr<GroupWatcher> Start(const std::string& leader_address, GroupRef group,
                                             std::function<void(const GroupState&)> on_state);
  virtual ~GroupWatcher() = default;
  // Newest state; phase PHASE_INVALID before the first message.
  virtual GroupState state() const = 0;
  // Time since the last message; infinite before the first.
  virtual absl::Duration silence() const = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_LEADER_CLIENT_H_
