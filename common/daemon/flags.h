#ifndef CODISTILL_COMMON_DAEMON_FLAGS_H_
#define CODISTILL_COMMON_DAEMON_FLAGS_H_

#include <string>

#include "absl/flags/declare.h"
#include "absl/status/statusor.h"

// Flags of every daemon. Those of logging (--v, --logtostderr, --log_dir) are not declared here:
// glog has variables of the same names.
ABSL_DECLARE_FLAG(std::string, host);
ABSL_DECLARE_FLAG(int, port);
ABSL_DECLARE_FLAG(int, http_port);
ABSL_DECLARE_FLAG(std::string, ready_file);
ABSL_DECLARE_FLAG(bool, insecure_listen);
ABSL_DECLARE_FLAG(bool, shared_memory);
ABSL_DECLARE_FLAG(double, drain_timeout_s);
ABSL_DECLARE_FLAG(std::string, trace);
ABSL_DECLARE_FLAG(bool, allow_fault_injection);
ABSL_DECLARE_FLAG(std::string, fault_plan);

namespace codistill {
namespace internal {

struct LoggingFlags {
  int v = 0;
  bool logtostderr = true;
  std::string log_dir;
};
LoggingFlags GetLoggingFlags();

// Where to listen: `job_address` (host:port, may be empty), of which --host and `port_flag` (-1 =
// not given) replace their part; what nobody says is 127.0.0.1 and port 0.
absl::StatusOr<std::string> ChooseAddress(const std::string& job_address, int port_flag);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_COMMON_DAEMON_FLAGS_H_
