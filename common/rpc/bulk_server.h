#ifndef CODISTILL_COMMON_RPC_BULK_SERVER_H_
#define CODISTILL_COMMON_RPC_BULK_SERVER_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/metrics/metrics.h"
#include "common/rpc/channel.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/server_builder.h"
#include "grpcpp/support/byte_buffer.h"

namespace codistill {

// One streaming call of raw messages, server side. All callbacks of a call run one at a time, on
// the bulk server's completion-queue threads: they parse, copy and enqueue; they never wait.
class BulkCall {
 public:
  virtual ~BulkCall() = default;

  // Asks for the next message; at most one outstanding. Answered by OnMessage or OnHalfClose. Read
  // and Write do nothing, and are not answered, once the call was finished or has ended.
  virtual void Read() = 0;
  // Sends one message; at most one outstanding (answered by OnWritten).
  virtual void Write(grpc::ByteBuffer message) = 0;
  // Ends the call, once, after a write in progress; later calls are ignored. May be called from any
  // thread (a parked call is finished by whoever frees it). With OK status and a `reply`, sends the
  // reply first.
  virtual void Finish(absl::Status status) = 0;
  virtual void FinishWith(grpc::ByteBuffer reply) = 0;
  // Queues `f` to run as a callback of this call, unless the call is over by then. Any thread.
  virtual void Post(std::function<void()> f) = 0;
  virtual std::string peer() const = 0;
};

// What a service does with one call. Created when the call arrives; destroyed after OnDone.
class BulkHandler {
 public:
  virtual ~BulkHandler() = default;
  virtual void OnStart(std::shared_ptr<BulkCall> call) = 0;
  virtual void OnMessage(grpc::ByteBuffer message) = 0;
  // The client sends no more. May also be the first sign of a cancelled call: what a client must
  // have said before its half-close is not to be guessed from it.
  virtual void OnHalfClose() = 0;
  virtual void OnWritten() = 0;
  // Last callback, always called, after which the call is gone for the peer. `cancelled`: by the
  // client, by the deadline, or because the connection broke.
  virtual void OnDone(bool cancelled) = 0;
};

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
  using HandlerFactory = std::function<std::unique_ptr<BulkHandler>()>;

  explicit BulkServer(int threads);
  ~BulkServer();
  // A message longer than `max_message_bytes` ends its call with RESOURCE_EXHAUSTED.
  void RegisterMethod(std::string full_method, HandlerFactory factory,
                      int max_message_bytes = kMaxFrameBytes);
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
