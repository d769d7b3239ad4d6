#include "common/daemon/flags.h"

#include "absl/flags/flag.h"
#include "common/base/status.h"
#include "common/rpc/address.h"

ABSL_FLAG(std::string, host, "",
          "Host or address to listen on. Default: the job's for this daemon, else 127.0.0.1.");
ABSL_FLAG(int, port, -1,
          "gRPC port; 0 is the kernel's choice. Default (-1): the job's for this daemon, else 0.");
ABSL_FLAG(
    int, http_port, -1,
    "Port of the status pages; 0 is the kernel's choice. Default (-1): the job's for this daemon, "
    "else 0.");
ABSL_FLAG(
    std::string, ready_file, "",
    "Written when the daemon is ready: JSON with kind, group, index, address, http_address, pid.");
ABSL_FLAG(bool, insecure_listen, false,
          "Allow listening on addresses other than loopback's. Whoever reaches them can use this "
          "daemon: there is neither encryption nor authentication.");
ABSL_FLAG(bool, shared_memory, true,
          "Move tensors through shared memory to and from processes of this host and user that "
          "allow it; --noshared_memory: always through gRPC.");
ABSL_FLAG(double, drain_timeout_s, 20,
          "Seconds a drain may take before the daemon gives up and exits with an error.");

ABSL_FLAG(std::string, trace, "",
          "Keep a record of what this daemon does when, and write it to this file when it ends: "
          "Chrome trace format, for chrome://tracing, ui.perfetto.dev or deploy/trace_summary.py.");

ABSL_FLAG(bool, allow_fault_injection, false,
          "For tests: let whoever reaches this daemon make its calls fail and kill it.");
ABSL_FLAG(std::string, fault_plan, "",
          "With --allow_fault_injection: faults from the start (text format of "
          "InjectFaultsRequest).");

ABSL_FLAG(int, v, 0, "Verbosity: log VLOG messages up to this level.");
ABSL_FLAG(bool, logtostderr, true, "Log to stderr rather than to files in --log_dir.");
ABSL_FLAG(std::string, log_dir, "", "Directory for log files, with --nologtostderr.");

namespace codistill {
namespace internal {

LoggingFlags GetLoggingFlags() {
  LoggingFlags flags;
  flags.v = absl::GetFlag(FLAGS_v);
  flags.logtostderr = absl::GetFlag(FLAGS_logtostderr);
  flags.log_dir = absl::GetFlag(FLAGS_log_dir);
  return flags;
}

absl::StatusOr<std::string> ChooseAddress(const std::string& job_address, int port_flag) {
  HostPort address{"127.0.0.1", 0};
  if (!job_address.empty()) {
    CODISTILL_ASSIGN_OR_RETURN(address, ParseHostPort(job_address));
  }
  const std::string host = absl::GetFlag(FLAGS_host);
  if (!host.empty()) address.host = host;
  if (port_flag >= 0) address.port = port_flag;
  return address.ToString();
}

}  // namespace internal
}  // namespace codistill
