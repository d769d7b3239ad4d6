#include "common/rpc/bulk_stream.h"

#include <atomic>
#include <utility>

#include "common/rpc/channel.h"
#include "common/rpc/fault_stream.h"
#include "common/rpc/grpc_status.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"

namespace codistill {
namespace {

// One operation is in flight at a time, so one completion queue and one tag do: whoever starts an
// operation waits for its end, and drives the connection's polling meanwhile.
class GrpcBulkStream final : public BulkStream {
 public:
  GrpcBulkStream(const std::shared_ptr<grpc::Channel>& channel, const std::string& full_method,
                 absl::Time deadline)
      : channel_(channel), context_(MakeContext(deadline)) {
    grpc::GenericStub stub(channel_);
    stream_ = stub.PrepareCall(context_.get(), full_method, &queue_);
    stream_->StartCall(this);
    writes_done_ = !Wait();
  }

  ~GrpcBulkStream() override {
    if (!finished_) {
      context_->TryCancel();
      End().IgnoreError();  // CANCELLED, as wanted
    }
    queue_.Shutdown();
    void* tag;
    bool ok;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  bool Write(grpc::ByteBuffer message) override {
    if (writes_done_ || finished_) return false;
    stream_->Write(message, this);
    if (Wait()) return true;
    writes_done_ = true;
    return false;
  }

  void WritesDone() override { HalfClose(); }

  bool Read(grpc::ByteBuffer* message) override { return Receive(message); }

  absl::Status Finish() override { return End(); }

  void Cancel() override {
    cancelled_ = true;
    context_->TryCancel();
  }

 private:
  void HalfClose() {
    if (writes_done_ || finished_) return;
    writes_done_ = true;
    stream_->WritesDone(this);
    Wait();
  }

  bool Receive(grpc::ByteBuffer* message) {
    if (reads_done_ || finished_) return false;
    stream_->Read(message, this);
    if (Wait()) return true;
    reads_done_ = true;
    return false;
  }

  absl::Status End() {
    if (finished_) return status_;
    // The call's status comes after its last message: what nobody read is dropped here.
    HalfClose();
    grpc::ByteBuffer dropped;
    while (Receive(&dropped)) {
    }
    grpc::Status status;
    stream_->Finish(&status, this);
    Wait();
    finished_ = true;
    status_ = cancelled_ ? FromGrpcStatus(status) : FromUncancelledCall(status);
    return status_;
  }

  bool Wait() {
    void* tag;
    bool ok = false;
    return queue_.Next(&tag, &ok) && ok;
  }

  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<grpc::ClientContext> context_;  // TryCancel is thread-safe
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
  bool writes_done_ = false;
  bool reads_done_ = false;
  bool finished_ = false;
  std::atomic<bool> cancelled_{false};
  absl::Status status_;
};

}  // namespace

std::unique_ptr<BulkStream> BulkStream::Open(const std::shared_ptr<grpc::Channel>& channel,
                                             const std::string& full_method, absl::Time deadline) {
  return OpenWithFaults(full_method, [=] {
    return std::make_unique<GrpcBulkStream>(channel, full_method, deadline);
  });
}

}  // namespace codistill
