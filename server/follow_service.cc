#include "server/follow_service.h"

#include <cstring>
#include <memory>
#include <vector>

#include "common/rpc/frame.h"
#include "server/group_check.h"

namespace codistill {
namespace {

constexpr int kPayload = TensorFrame::kPayloadFieldNumber;

}  // namespace

// One request; then FollowBegin, chunks, PullEnd.
class FollowService::Handler final : public BulkHandler {
 public:
  explicit Handler(FollowService* service) : service_(service) {}

  void OnStart(std::shared_ptr<BulkCall> call) override {
    call_ = std::move(call);
    call_->Read();
  }

  void OnMessage(grpc::ByteBuffer message) override {
    FollowRequest request;
    DecodedPayload none;
    absl::Status status = DecodedPayload::Decode(&message, kPayload, &request, &none);
    if (status.ok()) status = CheckGroup(request.group(), service_->group_);
    if (!status.ok()) {
      call_->Finish(status);
      return;
    }
    asked_ = true;
    version_.set_generation(request.generation());
    version_.set_step(request.cut_step());
    // Answered on the shard's thread; Post brings it back to this call's own, or drops it where the
    // call is over.
    service_->shard_->Follow(
        request, [this, call = call_](absl::StatusOr<std::unique_ptr<FollowReader>> reader) {
          if (!reader.ok()) {
            call->Finish(reader.status());
            return;
          }
          auto shared = std::make_shared<std::unique_ptr<FollowReader>>(*std::move(reader));
          call->Post([this, shared] {
            reader_ = std::move(*shared);
            TensorFrame frame;
            FollowBegin* const begin = frame.mutable_header()->mutable_follow_begin();
            *begin->mutable_version() = version_;
            begin->set_whole(reader_->whole());
            begin->set_exact(reader_->exact());
            Send(frame, {});
          });
        });
  }

  void OnHalfClose() override {
    if (!asked_) call_->Finish(absl::InvalidArgumentError("closed before the request"));
  }
  void OnWritten() override { SendNext(); }
  void OnDone(bool) override { reader_.reset(); }

 private:
  void SendNext() {
    TensorFrame frame;
    if (ended_) {
      call_->Finish(absl::OkStatus());
      return;
    }
    auto chunk = std::make_shared<FollowedChunk>();
    if (!reader_->Next(chunk.get())) {
      ended_ = true;
      reader_.reset();
      frame.mutable_header()->mutable_pull_end()->set_bytes(payload_bytes_);
      Send(frame, {});
      return;
    }
    // One payload field: its parts are put side by side.
    auto bytes = std::make_shared<std::vector<uint64_t>>();
    const size_t float_words =
        (chunk->rows.size() * sizeof(float) + sizeof(uint64_t) - 1) / sizeof(uint64_t);
    const size_t size = (chunk->keys.size() + chunk->evicted.size()) * sizeof(uint64_t) +
                        chunk->rows.size() * sizeof(float);
    bytes->reserve(chunk->keys.size() + chunk->evicted.size() + float_words);
    bytes->insert(bytes->end(), chunk->keys.begin(), chunk->keys.end());
    bytes->insert(bytes->end(), chunk->evicted.begin(), chunk->evicted.end());
    const size_t floats_at = bytes->size();
    bytes->resize(floats_at + float_words);
    if (!chunk->rows.empty()) {
      std::memcpy(bytes->data() + floats_at, chunk->rows.data(),
                  chunk->rows.size() * sizeof(float));
    }
    FollowChunk* const header = frame.mutable_header()->mutable_follow_chunk();
    header->set_table(static_cast<uint32_t>(chunk->table));
    header->set_dim(static_cast<uint32_t>(service_->shard_->embeddings()->dim(chunk->table)));
    header->set_rows(static_cast<int64_t>(chunk->keys.size()));
    header->set_evicted(static_cast<int64_t>(chunk->evicted.size()));
    payload_bytes_ += static_cast<int64_t>(size);
    const PayloadRef payload = {bytes->data(), size, bytes};
    Send(frame, absl::MakeConstSpan(&payload, 1));
  }

  void Send(const TensorFrame& frame, absl::Span<const PayloadRef> payloads) {
    grpc::ByteBuffer message = EncodeWithPayload(frame, kPayload, payloads);
    service_->bytes_.fetch_add(message.Length(), std::memory_order_relaxed);
    call_->Write(std::move(message));
  }

  FollowService* const service_;
  std::shared_ptr<BulkCall> call_;
  std::unique_ptr<FollowReader> reader_;
  Version version_;
  bool asked_ = false;
  bool ended_ = false;
  int64_t payload_bytes_ = 0;
};

void FollowService::RegisterMethods(BulkServer* server) {
  server->RegisterMethod("/codistill.TensorTransfer/Follow",
                         [this] { return std::make_unique<Handler>(this); });
}

}  // namespace codistill
