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

// One streaming call of raw messages, client side, blocking: the thread that calls waits on a
// completion queue of this stream. One thread at a time. The deadline covers the whole call.
class BulkStream {
 public:
  static std::unique_ptr<BulkStream> Open(const std::shared_ptr<grpc::Channel>& channel,
                                          const std::string& full_method, absl::Time deadline);
  // Cancels the call if it is not finished.
  ~BulkStream();

  // False: the call has ended early; Finish() says why.
  bool Write(grpc::ByteBuffer message);
  void WritesDone();
  // False: no more messages; Finish() says whether all went well.
  bool Read(grpc::ByteBuffer* message);
  // Ends the call: messages that were not read are dropped, after which the status comes. CANCELLED
  // only after Cancel; a server that goes down gives UNAVAILABLE.
  absl::Status Finish();
  // From any thread.
  void Cancel();

 private:
  class Impl;
  explicit BulkStream(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_BULK_STREAM_H_
