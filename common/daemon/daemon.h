#ifndef CODISTILL_COMMON_DAEMON_DAEMON_H_
#define CODISTILL_COMMON_DAEMON_DAEMON_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/metrics/metrics.h"
#include "common/rpc/bulk_server.h"
#include "common/rpc/call_registry.h"
#include "common/rpc/channel.h"
#include "grpcpp/impl/codegen/service_type.h"
#include "proto/control.pb.h"

namespace codistill {

// What every daemon has in common: command-line start-up, logging, the gRPC server with health
// checking, reflection and the Control service, the HTTP status port, the ready line, draining at
// SIGTERM, SIGINT or the Drain call. A main() makes its domain objects, then a Daemon around them,
// then calls Run().
class Daemon {
 public:
  struct Options {
    std::string kind;  // "parameter_server", ...
    std::string job;
    std::string run_id;
    std::string group;
    int index = 0;
    // Where to listen: host:port from the job, or empty for 127.0.0.1 and --port (0 = any).
    std::string address;
    std::string http_address;

    std::vector<grpc::Service*> services;   // not owned; outlive the daemon
    BulkServer* bulk = nullptr;             // not owned; methods already registered
    std::vector<CallRegistry*> registries;  // not owned; whose parked calls shutting down finishes
    int max_message_bytes = kMaxControlBytes;  // of `services`, both ways

    // Fills in state, detail, step, rate and the parts for this kind; the rest is filled in here.
    std::function<void(DaemonStatus*)> fill_status;
    // Whether /readyz and the health service say ready. Default: always.
    std::function<bool()> ready;
    // Optional; null = the call answers FAILED_PRECONDITION, except `set`, which then knows one
    // setting: v, the verbosity of the log.
    std::function<absl::Status()> pause, resume;
    std::function<absl::StatusOr<CheckpointReply>()> checkpoint;
    std::function<absl::StatusOr<std::string>(const std::string& name, const std::string& value)>
        set;
    Metrics* metrics = nullptr;  // not owned; what /metrics shows

    // Called once, on its own thread, when a drain begins: stop taking work, finish what is in
    // hand, return when done (bounded by --drain_timeout_s, after which Run returns
    // DEADLINE_EXCEEDED).
    std::function<absl::Status()> drain;
  };

  // Starts listening. An address in use gives an error that names it.
  static absl::StatusOr<std::unique_ptr<Daemon>> Start(Options options);
  // Takes everything down if Run did not. What the hooks use may be destroyed afterwards: where a
  // drain hook or a call does not let go in time, the process is ended here, with code 1.
  virtual ~Daemon() = default;

  virtual std::string address() const = 0;  // host:port really bound
  virtual std::string http_address() const = 0;

  // Logs the ready line and writes --ready_file, then blocks until drained (or Stop). OK = clean
  // end: the drain hook, or Stop, said so, and all servers are down. Call once.
  virtual absl::Status Run() = 0;
  // Ends Run from within: `status` OK as after a drain, or the error this process must exit with.
  virtual void Stop(absl::Status status) = 0;
  // Same as SIGTERM. Thread-safe.
  virtual void RequestDrain(const std::string& reason) = 0;
};

// Parses flags, starts glog, catches the drain signals and ignores SIGPIPE. Returns the arguments
// that are no flags, without the program's name. `usage` is printed by --help.
std::vector<std::string> InitDaemon(int argc, char** argv, const std::string& usage);

// Logs an error status, prints "kind: message" to stderr and gives the process's exit code (0 for
// OK).
int ExitCode(const std::string& kind, const absl::Status& status);

}  // namespace codistill

#endif  // CODISTILL_COMMON_DAEMON_DAEMON_H_
