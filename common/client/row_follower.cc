#include "common/client/row_follower.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/client/call_group.h"
#include "common/rpc/bulk_stream.h"
#include "common/rpc/channel.h"
#include "common/rpc/frame.h"

namespace codistill {
namespace {

constexpr char kFollowMethod[] = "/codistill.TensorTransfer/Follow";
constexpr int kPayload = TensorFrame::kPayloadFieldNumber;

// Checks and unpacks one shard's stream.
class FollowStream {
 public:
  FollowStream(const RowFollower::Options& options, int shard, const FollowRequest& request,
               RowFollower::Sink* sink)
      : options_(options), shard_(shard), request_(request), sink_(sink) {}

  absl::Status Take(grpc::ByteBuffer* message) {
    bytes_ += message->Length();
    TensorFrame frame;
    DecodedPayload payload;
    if (absl::Status status = DecodedPayload::Decode(message, kPayload, &frame, &payload);
        !status.ok()) {
      return absl::DataLossError(absl::StrCat("bad frame: ", status.message()));
    }
    if (ended_) return absl::DataLossError("a frame after the end");
    const FrameHeader& header = frame.header();
    if (!begun_) {
      if (!header.has_follow_begin())
        return absl::DataLossError("the first frame is no FollowBegin");
      begun_ = true;
      exact_ = header.follow_begin().exact();
      const Version& version = header.follow_begin().version();
      if (version.generation() != request_.generation() || version.step() != request_.cut_step()) {
        return absl::DataLossError(absl::StrCat("answered with cut ", version.generation(), ".",
                                                version.step(), ", asked for ",
                                                request_.generation(), ".", request_.cut_step()));
      }
      if (!header.follow_begin().whole() && !request_.has_since_cut_step()) {
        return absl::DataLossError("answered with changes where whole tables were asked for");
      }
      return sink_->Begin(shard_, header.follow_begin().whole());
    }
    if (header.has_follow_chunk()) return TakeChunk(header.follow_chunk(), payload);
    if (!header.has_pull_end()) return absl::DataLossError("neither a FollowChunk nor a PullEnd");
    ended_ = true;
    if (header.pull_end().bytes() != payload_bytes_) {
      return absl::DataLossError(
          absl::StrCat(payload_bytes_, " bytes of rows came of ", header.pull_end().bytes()));
    }
    return absl::OkStatus();
  }

  bool ended() const { return ended_; }
  bool exact() const { return exact_; }
  uint64_t bytes() const { return bytes_; }

 private:
  absl::Status TakeChunk(const FollowChunk& chunk, const DecodedPayload& payload) {
    if (chunk.table() >= options_.dims.size() ||
        options_.dims[chunk.table()] != static_cast<int64_t>(chunk.dim())) {
      return absl::DataLossError(absl::StrCat("rows of table ", chunk.table(), " with dim ",
                                              chunk.dim(), ", which is none of the job's"));
    }
    const size_t size = payload.count() == 0 ? 0 : payload.size(0);
    const auto rows = static_cast<uint64_t>(chunk.rows());
    const auto evicted = static_cast<uint64_t>(chunk.evicted());
    // A frame's size bounds both, so that nothing below overflows.
    if (payload.count() > 1 || rows > size || evicted > size ||
        size != (rows + evicted) * sizeof(uint64_t) + rows * chunk.dim() * sizeof(float)) {
      return absl::DataLossError(absl::StrCat("chunk of ", rows, " rows of dim ", chunk.dim(),
                                              " and ", evicted, " evicted keys with ", size,
                                              " bytes"));
    }
    if (size == 0) return absl::OkStatus();
    buffer_.resize((size + sizeof(uint64_t) - 1) / sizeof(uint64_t));
    payload.CopyTo(0, buffer_.data());
    payload_bytes_ += static_cast<int64_t>(size);
    const uint64_t* const keys = buffer_.data();
    const auto* const floats = reinterpret_cast<const float*>(keys + rows + evicted);
    const int table = static_cast<int>(chunk.table());
    if (evicted > 0) sink_->Erase(table, absl::MakeConstSpan(keys + rows, evicted));
    if (rows > 0) {
      sink_->Put(table, absl::MakeConstSpan(keys, rows),
                 absl::MakeConstSpan(floats, rows * chunk.dim()));
    }
    return absl::OkStatus();
  }

  const RowFollower::Options& options_;
  const int shard_;
  const FollowRequest& request_;
  RowFollower::Sink* const sink_;
  std::vector<uint64_t> buffer_;  // aligned
  bool begun_ = false;
  bool ended_ = false;
  bool exact_ = true;
  int64_t payload_bytes_ = 0;
  uint64_t bytes_ = 0;
};

class RowFollowerImpl final : public RowFollower {
 public:
  explicit RowFollowerImpl(Options options) : options_(std::move(options)) {
    for (const std::string& address : options_.shard_addresses) {
      channels_.push_back(MakeChannel(address, ChannelUse::kBulk));
    }
  }

  absl::StatusOr<Result> Read(uint64_t generation, int64_t cut_step, int64_t since,
                              absl::Time deadline, Sink* sink) override {
    FollowRequest request;
    *request.mutable_group() = options_.group;
    request.set_generation(generation);
    request.set_shard_map_digest(options_.shard_map_digest);
    request.set_cut_step(cut_step);
    if (since >= 0) request.set_since_cut_step(since);
    CallGroup group;
    {
      MutexLock lock(&mu_);
      reading_ = &group;
    }
    Result result;
    absl::Status status;
    for (size_t shard = 0; shard < channels_.size() && status.ok(); ++shard) {
      status =
          Annotate(ReadShard(static_cast<int>(shard), request, deadline, sink, &group, &result),
                   absl::StrCat("shard ", shard, " (", options_.shard_addresses[shard], ")"));
      if (status.ok()) status = group.status();
    }
    MutexLock lock(&mu_);
    reading_ = nullptr;
    if (!status.ok()) return status;
    return result;
  }

  void Cancel() override {
    MutexLock lock(&mu_);
    if (reading_ != nullptr) reading_->Fail(absl::CancelledError("reading rows cancelled"));
  }

 private:
  absl::Status ReadShard(int shard, const FollowRequest& request, absl::Time deadline, Sink* sink,
                         CallGroup* group, Result* result) {
    const std::unique_ptr<BulkStream> stream =
        BulkStream::Open(channels_[shard], kFollowMethod, deadline);
    CallGroup::Member member(group, stream.get());
    stream->Write(EncodeWithPayload(request, kPayload, {}));
    stream->WritesDone();
    FollowStream reader(options_, shard, request, sink);
    grpc::ByteBuffer message;
    while (stream->Read(&message)) {
      if (absl::Status status = reader.Take(&message); !status.ok()) {
        stream->Cancel();
        return status;
      }
    }
    CODISTILL_RETURN_IF_ERROR(stream->Finish());
    if (!reader.ended()) return absl::DataLossError("the stream ended without a PullEnd");
    result->exact = result->exact && reader.exact();
    result->bytes += reader.bytes();
    return absl::OkStatus();
  }

  const Options options_;
  std::vector<std::shared_ptr<grpc::Channel>> channels_;
  Mutex mu_;
  CallGroup* reading_ ABSL_GUARDED_BY(mu_) = nullptr;
};

}  // namespace

std::unique_ptr<RowFollower> RowFollower::Create(Options options) {
  return std::make_unique<RowFollowerImpl>(std::move(options));
}

}  // namespace codistill
