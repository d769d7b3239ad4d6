#include "server/transfer_service.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/rpc/frame.h"
#include "common/tensor/tensor.h"
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
      Drop(/*refused=*/true);
      call_->Finish(status);
    } else if (!ended_) {
      call_->Read();
    }
  }

  void OnHalfClose() override {
    if (ended_) return;
    Drop(/*refused=*/false);
    call_->Finish(Invalid("the push was closed before its END"));
  }
  void OnWritten() override {}
  void OnDone(bool) override { Drop(/*refused=*/false); }

 private:
  // What was staged without an END is forgotten.
  void Drop(bool refused) {
    if (push_ != nullptr) service_->shard_->DropPush(*push_, refused);
    push_.reset();
  }

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
      if (payload.count() > 1) return Invalid("a frame with several payloads");
      size_t at = 0;
      absl::Status status = TakeChunk(header.chunk(), header.more_size() == 0, payload, &at);
      for (int i = 0; i < header.more_size() && status.ok(); ++i) {
        status = TakeChunk(header.more(i), i + 1 == header.more_size(), payload, &at);
      }
      return status;
    }
    if (header.has_rows()) {
      if (payload.count() > 1) return Invalid("rows with several payloads");
      if (push_->rows() == nullptr) return Invalid("rows pushed to a job without embedding tables");
      if (push_->superseded()) return absl::AbortedError("a newer push has taken this one's place");
      const RowChunk& rows = header.rows();
      return push_->rows()->Add(rows.table(), rows.dim(), rows.count(),
                                payload.count() == 0 ? 0 : payload.size(0),
                                [&payload](void* to) { payload.CopyTo(0, to); });
    }
    if (!header.has_end()) return Invalid("a frame of a push must be a chunk, rows or its END");
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

  // Takes the elements of one chunk, which begin at byte `*at` of the payload; the `last` chunk
  // takes all that is left.
  absl::Status TakeChunk(const TensorChunk& chunk, bool last, const DecodedPayload& payload,
                         size_t* at) {
    const size_t left = (payload.count() == 0 ? 0 : payload.size(0)) - *at;
    size_t bytes = left;
    if (!last) {
      const size_t element = ElementSize(chunk.dtype());
      if (element == 0 || chunk.count() < 0 ||
          static_cast<uint64_t>(chunk.count()) > left / element) {
        return Invalid(absl::StrCat("chunk of tensor ", chunk.tensor(), " at ", chunk.begin(), ": ",
                                    chunk.count(), " elements of ", DataType_Name(chunk.dtype()),
                                    " are not in the frame, which has ", left, " bytes left"));
      }
      bytes = static_cast<size_t>(chunk.count()) * element;
    }
    const size_t first = *at;
    *at += bytes;
    return push_->Take(
        chunk, bytes,
        [&](size_t begin, size_t size, void* to) {
          payload.CopyRangeTo(0, first + begin, size, to);
        },
        [&](size_t begin, size_t size) { return payload.View(0, first + begin, size); });
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
    if (next_ < 0) {
      TensorFrame frame;
      PullBegin* const begin = frame.mutable_header()->mutable_pull_begin();
      *begin->mutable_version() = source_->version();
      begin->set_chunks(source_->num_blocks());
      next_ = 0;
      Send(frame, {});
    } else if (next_ < source_->num_blocks()) {
      SendChunks();
    } else if (!ended_) {
      TensorFrame frame;
      frame.mutable_header()->mutable_pull_end()->set_bytes(payload_bytes_);
      ended_ = true;
      Send(frame, {});
    } else {
      call_->Finish(absl::OkStatus());
    }
  }

  // One frame: as many chunks as fit.
  void SendChunks() {
    TensorFrame frame;
    FrameHeader* const header = frame.mutable_header();
    std::vector<PayloadRef> parts;
    for (size_t bytes = 0; next_ < source_->num_blocks(); ++next_) {
      const size_t size = source_->block_size(next_);
      if (!parts.empty() && (bytes + size > kFramePayloadBytes || parts.size() >= kMaxChunks)) {
        break;
      }
      absl::StatusOr<PullSource::Block> block = source_->Read(next_);
      if (!block.ok()) {
        call_->Finish(block.status());
        return;
      }
      *(parts.empty() ? header->mutable_chunk() : header->add_more()) = block->chunk;
      bytes += block->bytes;
      parts.push_back({block->data, block->bytes, std::move(block->owner)});
    }
    for (const PayloadRef& part : parts) payload_bytes_ += static_cast<int64_t>(part.size);
    Send(frame, parts);
  }

  void Send(const TensorFrame& frame, absl::Span<const PayloadRef> parts) {
    grpc::ByteBuffer message = parts.empty() ? EncodeWithPayload(frame, kPayload, {})
                                             : EncodeWithParts(frame, kPayload, parts);
    service_->pull_bytes_.fetch_add(message.Length(), std::memory_order_relaxed);
    call_->Write(std::move(message));
  }

  TransferService* const service_;
  std::shared_ptr<BulkCall> call_;
  std::unique_ptr<PullSource> source_;
  bool asked_ = false;
  int64_t next_ = -1;   // block to send; -1 = PullBegin
  bool ended_ = false;  // PullEnd was sent
  int64_t payload_bytes_ = 0;
};

// One request; then PullBegin, the rows frame by frame, each gathered straight into what is sent,
// and PullEnd.
class TransferService::PullRowsHandler final : public BulkHandler {
 public:
  explicit PullRowsHandler(TransferService* service)
      : service_(service), store_(service->shard_->embeddings()) {}

  void OnStart(std::shared_ptr<BulkCall> call) override {
    call_ = std::move(call);
    call_->Read();
  }

  void OnMessage(grpc::ByteBuffer message) override {
    PullRowsRequest request;
    const absl::Status status = Take(&message, &request);
    if (!status.ok()) {
      call_->Finish(status);
      return;
    }
    asked_ = true;
    service_->shard_->PullRows(request, [this, call = call_](absl::StatusOr<Version> version) {
      if (!version.ok()) {
        call->Finish(version.status());
        return;
      }
      call->Post([this, version = *std::move(version)] {
        version_ = version;
        SendNext();
      });
    });
  }

  void OnHalfClose() override {
    if (!asked_) call_->Finish(Invalid("the pull was closed before its request"));
  }
  void OnWritten() override { SendNext(); }
  void OnDone(bool) override {}

 private:
  absl::Status Take(grpc::ByteBuffer* message, PullRowsRequest* request) {
    DecodedPayload payload;
    CODISTILL_RETURN_IF_ERROR(
        DecodedPayload::Decode(message, PullRowsRequest::kKeysFieldNumber, request, &payload));
    CODISTILL_RETURN_IF_ERROR(CheckGroup(request->group(), service_->group_));
    const RowLayout& layout = store_->row_layout();
    CODISTILL_RETURN_IF_ERROR(layout.CheckTable(request->table(), request->dim()));
    table_ = static_cast<int>(request->table());
    dim_ = request->dim();
    exact_step_ = request->source_case() == PullRowsRequest::kStep ? request->step() : -1;
    if (payload.count() > 1) return Invalid("keys in several payloads");
    if (payload.count() == 0) return absl::OkStatus();
    if (payload.size(0) % sizeof(uint64_t) != 0) {
      return Invalid(absl::StrCat("embedding table ", layout.tables()[table_].name, ": ",
                                  payload.size(0), " bytes of keys; 8 a key are right"));
    }
    keys_.resize(payload.size(0) / sizeof(uint64_t));
    payload.CopyTo(0, keys_.data());
    return layout.CheckKeys(request->table(), keys_);
  }

  void SendNext() {
    TensorFrame frame;
    FrameHeader* const header = frame.mutable_header();
    if (!begun_) {
      begun_ = true;
      const size_t rows = RowsAFrame();
      *header->mutable_pull_begin()->mutable_version() = version_;
      header->mutable_pull_begin()->set_chunks((keys_.size() + rows - 1) / rows);
      Send(frame, {});
    } else if (sent_ < keys_.size()) {
      const auto keys = absl::MakeConstSpan(keys_).subspan(sent_, RowsAFrame());
      const size_t floats = keys.size() * dim_;
      const std::shared_ptr<AlignedBuffer> buffer =
          store_->row_layout().NewBuffer(floats * sizeof(float));
      const absl::Status status = store_->table(table_)->Gather(
          keys, absl::MakeSpan(reinterpret_cast<float*>(buffer->data()), floats), exact_step_);
      if (!status.ok()) {
        call_->Finish(status);
        return;
      }
      RowChunk* const chunk = header->mutable_rows();
      chunk->set_table(table_);
      chunk->set_dim(dim_);
      chunk->set_count(keys.size());
      chunk->set_first(sent_);
      sent_ += keys.size();
      const PayloadRef payload = {buffer->data(), floats * sizeof(float), buffer};
      Send(frame, absl::MakeConstSpan(&payload, 1));
    } else if (!ended_) {
      ended_ = true;
      header->mutable_pull_end()->set_bytes(static_cast<int64_t>(sent_ * dim_ * sizeof(float)));
      Send(frame, {});
    } else {
      call_->Finish(absl::OkStatus());
    }
  }

  size_t RowsAFrame() const {
    return std::max<size_t>(kFramePayloadBytes / (dim_ * sizeof(float)), 1);
  }

  void Send(const TensorFrame& frame, absl::Span<const PayloadRef> payloads) {
    grpc::ByteBuffer message = EncodeWithPayload(frame, kPayload, payloads);
    service_->pull_bytes_.fetch_add(message.Length(), std::memory_order_relaxed);
    call_->Write(std::move(message));
  }

  TransferService* const service_;
  EmbeddingStore* const store_;
  std::shared_ptr<BulkCall> call_;
  std::vector<uint64_t> keys_;
  int table_ = 0;
  size_t dim_ = 0;
  int64_t exact_step_ = -1;
  Version version_;
  bool asked_ = false;
  bool begun_ = false;
  bool ended_ = false;
  size_t sent_ = 0;  // rows
};

std::unique_ptr<BulkHandler> TransferService::NewPushHandler() {
  return std::make_unique<PushHandler>(this);
}

std::unique_ptr<BulkHandler> TransferService::NewPullHandler() {
  return std::make_unique<PullHandler>(this);
}

std::unique_ptr<BulkHandler> TransferService::NewPullRowsHandler() {
  return std::make_unique<PullRowsHandler>(this);
}

void TransferService::RegisterMethods(BulkServer* server) {
  server->RegisterMethod("/codistill.TensorTransfer/Push", [this] { return NewPushHandler(); });
  server->RegisterMethod("/codistill.TensorTransfer/Pull", [this] { return NewPullHandler(); });
  server->RegisterMethod("/codistill.TensorTransfer/PullRows",
                         [this] { return NewPullRowsHandler(); });
}

}  // namespace codistill
