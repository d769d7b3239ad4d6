#ifndef CODISTILL_COMMON_RPC_BULK_STREAM_H_
#define CODISTILL_COMMON_RPC_BULK_STREAM_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "grpcpp/support/byte_buffer.h"

namespace codistill {

// One streaming call of raw messages, client side, blocking: the thread that calls waits. One
// thread at a time, but for Cancel. The deadline covers the whole call. What carries it is the
// business of whoever opens it: BulkChannel chooses.
class BulkStream {
 public:
  // Over gRPC; the thread that calls waits on a completion queue of this stream.
  static std::unique_ptr<BulkStream> Open(const std::shared_ptr<grpc::Channel>& channel,
                                          const std::string& full_method, absl::Time deadline);
  // Cancels the call if it is not finished.
  virtual ~BulkStream() = default;

  // False: the call has ended early; Finish() says why.
  virtual bool Write(grpc::ByteBuffer message) = 0;
  virtual void WritesDone() = 0;
  // False: no more messages; Finish() says whether all went well. `message` is to be let go of
  // before many others are read: its bytes may be in memory that the server needs for those.
  virtual bool Read(grpc::ByteBuffer* message) = 0;
  // Ends the call: messages that were not read are dropped, after which the status comes. CANCELLED
  // only after Cancel; a server that goes down gives UNAVAILABLE.
  virtual absl::Status Finish() = 0;
  // From any thread.
  virtual void Cancel() = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_BULK_STREAM_H_
