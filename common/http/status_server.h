#ifndef CODISTILL_COMMON_HTTP_STATUS_SERVER_H_
#define CODISTILL_COMMON_HTTP_STATUS_SERVER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "proto/control.pb.h"

namespace codistill {

// A daemon's status port, for people, load balancers and Prometheus:
//
//   /statusz        page; with ?json the same as JSON
//   /healthz        200 while the process answers at all
//   /readyz         200 "ready" or 503 "not ready"
//   /metrics        Prometheus text format 0.0.4
//
// Reads only: nothing can be changed through it. Two threads of its own and a bounded queue of
// connections, each served one request. Thread-safe.
class StatusServer {
 public:
  struct Options {
    std::string address = "127.0.0.1:0";  // port 0: the kernel's choice
    bool insecure_listen = false;         // allow addresses other than loopback's
    // Called on the server's threads.
    std::function<DaemonStatus()> status;
    std::function<bool()> ready;
    std::function<std::string()> metrics;
  };

  // FAILED_PRECONDITION, naming the address, if somebody listens there; PERMISSION_DENIED and
  // INVALID_ARGUMENT as CheckListenAddress (common/rpc/address.h).
  static absl::StatusOr<std::unique_ptr<StatusServer>> Start(Options options);
  // Stop().
  virtual ~StatusServer() = default;

  // With the port really bound.
  virtual const std::string& address() const = 0;
  // Ends requests in progress (at most a few seconds) and joins the threads. Idempotent.
  virtual void Stop() = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_HTTP_STATUS_SERVER_H_
