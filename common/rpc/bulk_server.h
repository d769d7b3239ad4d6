#ifndef CODISTILL_COMMON_RPC_BULK_SERVER_H_
#define CODISTILL_COMMON_RPC_BULK_SERVER_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/metrics/metrics.h"
#include "common/rpc/bulk_call.h"
#include "common/rpc/channel.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/server_builder.h"

namespace codistill {

// Serves streams of raw byte buffers by full method name ("/codistill.TensorTransfer/Push") through
// an AsyncGenericService with completion-queue threads of its own, beside the callback services of
// the same grpc::Server. Unknown methods get UNIMPLEMENTED. All calls respect their deadlines: at
// cancellation the handler gets OnDone(true).
//
// Use: Create; RegisterMethod for each; Attach(builder) before BuildAndStart; Start() after it;
// Shutdown() after grpc::Server::Shutdown (finishes parked calls with UNAVAILABLE and joins
// threads).
class BulkServer {
 public:
  using HandlerFactory = BulkHandlerFactory;

  explicit BulkServer(int threads);
  ~BulkServer();
  // A message longer than `max_message_bytes` ends its call with RESOURCE_EXHAUSTED.
  void RegisterMethod(std::string full_method, HandlerFactory factory,
                      int max_message_bytes = kMaxFrameBytes);
  // Serves the same methods through shared memory too, to processes of this host and user that ask
  // for it (common/rpc/README.md). Optional; before Start. Where the system refuses, a warning is
  // logged and gRPC serves alone.
  void ServeSharedMemory();
  // Connections through shared memory that are open.
  int shared_memory_connections() const;
  // Counts calls and bytes in `metrics`, which outlives this. Optional; before Start.
  void CountIn(Metrics* metrics);
  void Attach(grpc::ServerBuilder* builder);
  void Start();
  // Finishes every open call with UNAVAILABLE; new ones too. Before grpc::Server::Shutdown.
  void StopAccepting();
  void Shutdown();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_BULK_SERVER_H_
