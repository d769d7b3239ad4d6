#include "predserver/inference_stream.h"

#include <algorithm>
#include <utility>

#include "common/rpc/grpc_status.h"
#include "grpcpp/server_context.h"

namespace codistill {

class InferenceStream::Reactor final
    : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  explicit Reactor(std::shared_ptr<InferenceStream> stream) : stream_(std::move(stream)) {}
  void OnReadDone(bool ok) override { stream_->ReadDone(ok); }
  void OnWriteDone(bool ok) override { stream_->Written(ok); }
  void OnCancel() override {
    stream_->End(absl::CancelledError("the client cancelled the stream, or its deadline passed"));
  }
  void OnDone() override {
    stream_->registry_->Remove(stream_.get());
    delete this;
  }

 private:
  const std::shared_ptr<InferenceStream> stream_;
};

InferenceStream::InferenceStream(absl::Time deadline, Limits limits, Handler handler,
                                 CallRegistry* registry)
    : deadline_(deadline), limits_(limits), handler_(std::move(handler)), registry_(registry) {}

std::shared_ptr<InferenceStream> InferenceStream::Start(grpc::CallbackServerContext* context,
                                                        Limits limits, Handler handler,
                                                        CallRegistry* registry) {
  std::shared_ptr<InferenceStream> stream(new InferenceStream(
      absl::FromChrono(context->deadline()), limits, std::move(handler), registry));
  stream->reactor_ = new Reactor(stream);
  const absl::Status open = registry->Add(stream);
  if (!open.ok()) stream->End(open);
  stream->Proceed();
  return stream;
}

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* InferenceStream::reactor() const {
  return reactor_;
}

bool InferenceStream::ended() const {
  MutexLock lock(&mu_);
  return ended_;
}

int InferenceStream::under_way() const {
  MutexLock lock(&mu_);
  return unanswered_ + static_cast<int>(waiting_.size()) + (writing_ ? 1 : 0);
}

void InferenceStream::ReadDone(bool ok) {
  if (!ok) {
    {
      MutexLock lock(&mu_);
      reading_ = false;
      half_closed_ = true;
    }
    Proceed();
    return;
  }
  grpc::ByteBuffer request;
  request.Swap(&incoming_);
  const size_t bytes = request.Length();
  bool refused = false;
  {
    MutexLock lock(&mu_);
    refused = closing_ || ended_;
    if (refused) {
      reading_ = false;
    } else {
      ++unanswered_;
      request_bytes_ += bytes;
    }
  }
  // The status tells the client.
  if (refused) return Proceed();
  const std::shared_ptr<InferenceStream> self = shared_from_this();
  handler_(self, std::move(request),
           [self, bytes](grpc::ByteBuffer response) { self->Answer(bytes, std::move(response)); });
  {
    MutexLock lock(&mu_);
    reading_ = false;
  }
  Proceed();
}

void InferenceStream::Answer(size_t request_bytes, grpc::ByteBuffer response) {
  {
    MutexLock lock(&mu_);
    --unanswered_;
    request_bytes_ -= request_bytes;
    if (!ended_) {
      const size_t bytes = response.Length();
      response_bytes_ += bytes;
      largest_response_ = std::max(largest_response_, bytes);
      waiting_.push_back(std::move(response));
    }
  }
  Proceed();
}

void InferenceStream::Written(bool ok) {
  {
    MutexLock lock(&mu_);
    writing_ = false;
    response_bytes_ -= outgoing_.Length();
    outgoing_.Clear();
  }
  if (ok) {
    Proceed();
  } else {
    End(absl::CancelledError("the connection to the client broke"));
  }
}

void InferenceStream::End(const absl::Status& status) {
  std::deque<grpc::ByteBuffer> dropped;  // destroyed outside the lock
  {
    MutexLock lock(&mu_);
    if (!ended_) {
      ended_ = true;
      end_ = status;
      dropped.swap(waiting_);
      for (const grpc::ByteBuffer& response : dropped) response_bytes_ -= response.Length();
    }
  }
  Proceed();
}

void InferenceStream::EndForShutdown(const absl::Status& status) {
  {
    MutexLock lock(&mu_);
    if (!ended_ && !closing_) {
      closing_ = true;
      end_ = status;
    }
  }
  Proceed();
}

bool InferenceStream::HasRoom() const {
  const int under_way = unanswered_ + static_cast<int>(waiting_.size()) + (writing_ ? 1 : 0);
  if (under_way == 0) return true;
  return under_way < limits_.requests &&
         request_bytes_ + response_bytes_ +
                 static_cast<size_t>(unanswered_ + 1) * largest_response_ <=
             limits_.bytes;
}

// Starts what can be started. gRPC is called outside the lock; `reading_`, `writing_` and
// `finished_` see to it that only one thread does. The reactor lives until it was finished, so
// nobody finishes it while somebody is about to read.
void InferenceStream::Proceed() {
  bool started_read = false;
  while (true) {
    bool read = false, write = false, finish = false;
    grpc::Status status;
    {
      MutexLock lock(&mu_);
      if (started_read) starting_read_ = false;
      if (finished_) return;
      if (!ended_ && !closing_ && !reading_ && !half_closed_ && HasRoom()) {
        read = reading_ = starting_read_ = true;
      }
      if (!writing_ && !waiting_.empty()) {
        write = writing_ = true;
        outgoing_.Swap(&waiting_.front());
        waiting_.pop_front();
      }
      const bool complete =
          (closing_ || (half_closed_ && !reading_)) && unanswered_ == 0 && waiting_.empty();
      if (!writing_ && !starting_read_ && (ended_ || complete)) {
        finish = finished_ = true;
        ended_ = true;
        status = ToGrpcStatus(end_);
      }
    }
    if (read) reactor_->StartRead(&incoming_);
    if (write) reactor_->StartWrite(&outgoing_);
    if (finish) reactor_->Finish(status);
    if (!read) return;
    started_read = true;
  }
}

}  // namespace codistill
