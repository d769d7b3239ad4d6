#ifndef CODISTILL_CONTROL_DAEMON_CLIENT_H_
#define CODISTILL_CONTROL_DAEMON_CLIENT_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/control.pb.h"

namespace codistill {

// One-shot calls to a daemon's Control service and a leader's history. Each opens its own
// connection; errors name the address.
absl::StatusOr<DaemonStatus> GetDaemonStatus(const std::string& address, absl::Duration timeout);
absl::Status DrainDaemon(const std::string& address, const std::string& reason,
                         absl::Duration timeout);
absl::Status PauseDaemon(const std::string& address, absl::Duration timeout);
absl::Status ResumeDaemon(const std::string& address, absl::Duration timeout);
absl::StatusOr<CheckpointReply> CheckpointGroup(const std::string& leader_address,
                                                absl::Duration timeout);
absl::StatusOr<std::string> SetOnDaemon(const std::string& address, const std::string& name,
                                        const std::string& value, absl::Duration timeout);

}  // namespace codistill

#endif  // CODISTILL_CONTROL_DAEMON_CLIENT_H_
