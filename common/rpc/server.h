#ifndef CODISTILL_COMMON_RPC_SERVER_H_
#define CODISTILL_COMMON_RPC_SERVER_H_

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/metrics/metrics.h"
#include "common/rpc/bulk_server.h"
#include "common/rpc/call_registry.h"
#include "common/rpc/channel.h"
#include "grpcpp/impl/codegen/service_type.h"
#include "grpcpp/server.h"

namespace codistill {

// The one place where a grpc::Server is built: limits, keepalive, health checking, reflection; and
// the one order in which it is taken down. Thread-safe.
class RpcServer {
 public:
  struct Options {
    // host:port; port 0 is the kernel's choice.
    std::string address = "127.0.0.1:0";
    // Allow addresses other than loopback's (--insecure_listen).
    bool insecure_listen = false;

    // None of these is owned; all outlive the server.
    std::vector<grpc::Service*> services;
    BulkServer* bulk = nullptr;             // methods already registered; started and stopped here
    std::vector<CallRegistry*> registries;  // whose parked calls Shutdown finishes

    // Where the calls are counted (common/rpc/rpc_metrics.h); null: nowhere.
    Metrics* metrics = nullptr;

    // Largest message of `services`, both ways. Bulk methods have limits of their own below it.
    int max_message_bytes = kMaxControlBytes;
    // What connections may hold in unread and unsent bytes, all together: above it, gRPC reads more
    // slowly and refuses new calls.
    size_t buffer_bytes = size_t{1} << 30;
    // Calls open at a time on one connection; further ones wait on the client.
    int max_calls_per_connection = 1024;
  };

  // Listens and serves; the health service says SERVING (see SetServing). ALREADY_EXISTS, naming
  // the address, if somebody listens there; PERMISSION_DENIED and INVALID_ARGUMENT as
  // CheckListenAddress.
  static absl::StatusOr<std::unique_ptr<RpcServer>> Start(Options options);
  // Shutdown within a second.
  ~RpcServer();

  // With the port really bound.
  const std::string& address() const { return address_; }
  int port() const { return port_; }

  // What the health service says of every service.
  void SetServing(bool serving);

  // Health NOT_SERVING; finish parked and bulk calls with UNAVAILABLE; let the others end until
  // `deadline`, then cancel them; join all threads. Idempotent. Afterwards nothing calls the
  // services. Waits for handlers that neither finish nor heed cancellation, whatever the deadline.
  void Shutdown(absl::Time deadline);

 private:
  explicit RpcServer(Options options) : options_(std::move(options)) {}
  absl::Status Listen();

  const Options options_;
  std::string address_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  Mutex shutdown_mu_;
  bool shut_down_ ABSL_GUARDED_BY(shutdown_mu_) = false;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_SERVER_H_
