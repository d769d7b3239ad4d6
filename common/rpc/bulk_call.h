#ifndef CODISTILL_COMMON_RPC_BULK_CALL_H_
#define CODISTILL_COMMON_RPC_BULK_CALL_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "grpcpp/support/byte_buffer.h"

// Streams of raw messages as the services of a bulk server see them, whatever carries them.
namespace codistill {

// One streaming call of raw messages, server side. All callbacks of a call run one at a time, on
// a thread of the bulk server: they parse, copy and enqueue; they never wait.
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
  // A message is let go of before many others are read: its bytes may be in memory that the client
  // needs for those.
  virtual void OnMessage(grpc::ByteBuffer message) = 0;
  // The client sends no more. May also be the first sign of a cancelled call: what a client must
  // have said before its half-close is not to be guessed from it.
  virtual void OnHalfClose() = 0;
  virtual void OnWritten() = 0;
  // Last callback, always called, after which the call is gone for the peer. `cancelled`: by the
  // client, by the deadline, or because the connection broke.
  virtual void OnDone(bool cancelled) = 0;
};

// Asks for the server's shared memory: LocalTransport.GetEndpoint.
inline constexpr char kLocalEndpointMethod[] = "/codistill.LocalTransport/GetEndpoint";

using BulkHandlerFactory = std::function<std::unique_ptr<BulkHandler>()>;

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_BULK_CALL_H_
