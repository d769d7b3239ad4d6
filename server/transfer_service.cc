#include "server/transfer_service.h"

#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/rpc/frame.h"
#include "server/group_check.h"

namespace codistill {
namespace {

constexpr int kPayload = TensorFrame::kPayloadFieldNumber;

absl::Status Invalid(const std::string& what) { return absl::InvalidArgumentError(what); }

}  // namespace

// BEGIN, chunks, END; then the call waits for the decision, without this handler's doing.
class TransferService::PushHandler final : public BulkHandler {
 public:
  explicit PushHandler(TransferService* service) : service_(service) {}

  void OnStart(std::shared_ptr<BulkCall> call) override {
    call_ = std::move(call);
    call_->Read();
  }

  void OnMessage(grpc::ByteBuffer message) override {
    service_->push_bytes_.fetch_add(message.Length(), std::memory_order_relaxed);
    const absl::Status status = Take(&message);
    if (!status.ok()) {
      push_.reset();
      call_->Finish(status);
    } else if (!ended_) {
      call_->Read();
    }
  }

  void OnHalfClose() override {
    if (!ended_) call_->Finish(Invalid("the push was closed before its END"));
  }
  void OnWritten() override {}
  void OnDone(bool) override { push_.reset(); }  // what was staged without an END is forgotten

 private:
  absl::Status Take(grpc::ByteBuffer* message) {
    TensorFrame frame;
    DecodedPayload payload;
    if (absl::Status status = DecodedPayload::Decode(message, kPayload, &frame, &payload);
        !status.ok()) {
      return status;
    }
    const FrameHeader& header = frame.header();
    if (push_ == nullptr) {
      if (!header.has_begin()) return Invalid("the first frame of a push must be its BEGIN");
      if (absl::Status status = CheckGroup(header.begin().group(), service_->group_);
          !status.ok()) {
        return status;
      }
      absl::StatusOr<std::shared_ptr<StagedPush>> push =
          service_->shard_->BeginPush(header.begin());
      if (!push.ok()) return push.status();
      push_ = *std::move(push);
      return absl::OkStatus();
    }
    if (header.has_chunk()) {
      if (payload.count() > 1) return Invalid("a chunk with several payloads");
      const size_t bytes = payload.count() == 0 ? 0 : payload.size(0);
      const absl::StatusOr<void*> place = push_->Place(header.chunk(), bytes);
      if (!place.ok()) return place.status();
      if (bytes > 0) payload.CopyTo(0, *place);
      return absl::OkStatus();
    }
    if (!header.has_end()) return Invalid("a frame of a push must be a chunk or its END");
    ended_ = true;
    // Whoever decides finishes the call, if it is still there.
    service_->shard_->EndPush(std::move(push_), header.end(),
                              [call = call_](absl::StatusOr<PushReply> reply) {
                                if (reply.ok()) {
                                  call->FinishWith(EncodeWithPayload(*reply, kPayload, {}));
                                } else {
                                  call->Finish(reply.status());
                                }
                              });
    return absl::OkStatus();
  }

  TransferService* const service_;
  std::shared_ptr<BulkCall> call_;
  std::shared_ptr<StagedPush> push_;
  bool ended_ = false;
};

// One request; then PullBegin, the blocks, PullEnd.
class TransferService::PullHandler final : public BulkHandler {
 public:
  explicit PullHandler(TransferService* service) : service_(service) {}

  void OnStart(std::shared_ptr<BulkCall> call) override {
    call_ = std::move(call);
    call_->Read();
  }

  void OnMessage(grpc::ByteBuffer message) override {
    PullRequest request;
    DecodedPayload none;
    absl::Status status = DecodedPayload::Decode(&message, kPayload, &request, &none);
    if (status.ok()) status = CheckGroup(request.group(), service_->group_);
    if (!status.ok()) {
      call_->Finish(status);
      return;
    }
    asked_ = true;
    // Answered on any thread, perhaps long after: Post brings it back to this call's own, or drops
    // it where the call is over.
    service_->shard_->Pull(
        request, [this, call = call_](absl::StatusOr<std::unique_ptr<PullSource>> source) {
          if (!source.ok()) {
            call->Finish(source.status());
            return;
          }
          auto shared = std::make_shared<std::unique_ptr<PullSource>>(*std::move(source));
          call->Post([this, shared] {
            source_ = std::move(*shared);
            SendNext();
          });
        });
  }

  void OnHalfClose() override {
    if (!asked_) call_->Finish(Invalid("the pull was closed before its request"));
  }
  void OnWritten() override { SendNext(); }
  void OnDone(bool) override { source_.reset(); }

 private:
  void SendNext() {
    TensorFrame frame;
    FrameHeader* const header = frame.mutable_header();
    if (next_ < 0) {
      *header->mutable_pull_begin()->mutable_version() = source_->version();
      header->mutable_pull_begin()->set_chunks(source_->num_blocks());
      Send(frame, {});
    } else if (next_ < source_->num_blocks()) {
      absl::StatusOr<PullSource::Block> block = source_->Read(next_);
      if (!block.ok()) {
        call_->Finish(block.status());
        return;
      }
      *header->mutable_chunk() = block->chunk;
      payload_bytes_ += static_cast<int64_t>(block->bytes);
      const PayloadRef payload = {block->data, block->bytes, std::move(block->owner)};
      Send(frame, absl::MakeConstSpan(&payload, 1));
    } else if (next_ == source_->num_blocks()) {
      header->mutable_pull_end()->set_bytes(payload_bytes_);
      Send(frame, {});
    } else {
      call_->Finish(absl::OkStatus());
    }
  }

  void Send(const TensorFrame& frame, absl::Span<const PayloadRef> payloads) {
    ++next_;
    grpc::ByteBuffer message = EncodeWithPayload(frame, kPayload, payloads);
    service_->pull_bytes_.fetch_add(message.Length(), std::memory_order_relaxed);
    call_->Write(std::move(message));
  }

  TransferService* const service_;
  std::shared_ptr<BulkCall> call_;
  std::unique_ptr<PullSource> source_;
  bool asked_ = false;
  int64_t next_ = -1;  // block to send; -1 = PullBegin
  int64_t payload_bytes_ = 0;
};

std::unique_ptr<BulkHandler> TransferService::NewPushHandler() {
  return std::make_unique<PushHandler>(this);
}

std::unique_ptr<BulkHandler> TransferService::NewPullHandler() {
  return std::make_unique<PullHandler>(this);
}

void TransferService::RegisterMethods(BulkServer* server) {
  server->RegisterMethod("/codistill.TensorTransfer/Push", [this] { return NewPushHandler(); });
  server->RegisterMethod("/codistill.TensorTransfer/Pull", [this] { return NewPullHandler(); });
}

}  // namespace codistill
