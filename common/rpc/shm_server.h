#ifndef CODISTILL_COMMON_RPC_SHM_SERVER_H_
#define CODISTILL_COMMON_RPC_SHM_SERVER_H_

#include <functional>
#include <list>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "common/base/mutex.h"
#include "common/rpc/bulk_call.h"
#include "common/rpc/rpc_metrics.h"
#include "common/rpc/shm_link.h"

namespace codistill {

// Serves bulk methods through shared memory: a connection carries one call after another and has a
// thread of its own, on which the callbacks of its calls run. Part of BulkServer. Thread-safe.
class ShmServer {
 public:
  struct Method {
    BulkHandlerFactory factory;
    size_t max_message_bytes = 0;
    MethodMetrics* metrics = nullptr;  // optional
  };
  struct Options {
    // Null: there is no such method. Thread-safe.
    std::function<const Method*(const std::string&)> find_method;
    // Further ones are refused, and stay with gRPC.
    int max_connections = 64;
    ShmLink::Geometry geometry;
  };
  static absl::StatusOr<std::unique_ptr<ShmServer>> Start(Options options);
  // Shutdown.
  ~ShmServer();

  // Where clients connect (LocalEndpoint.socket_name).
  const std::string& socket_name() const { return listener_->name(); }
  int connections() const;

  // Refuses connections, finishes open calls with UNAVAILABLE.
  void StopAccepting();
  // Also cuts the connections and waits for their threads.
  void Shutdown();

 private:
  class Call;
  class Connection;

  ShmServer(Options options, std::unique_ptr<ShmListener> listener);
  void AcceptAll();
  void JoinEnded();
  void CountCalls(int change);
  bool NoCalls() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return open_calls_ == 0; }

  const Options options_;
  const std::unique_ptr<ShmListener> listener_;
  std::thread accepting_;

  mutable Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  int open_calls_ ABSL_GUARDED_BY(mu_) = 0;
  std::list<std::unique_ptr<Connection>> connections_ ABSL_GUARDED_BY(mu_);
  Mutex shutdown_mu_;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_SHM_SERVER_H_
