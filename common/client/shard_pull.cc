#include "common/client/shard_pull.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/base/trace.h"
#include "common/rpc/bulk_stream.h"
#include "common/rpc/frame.h"
#include "common/tensor/bfloat16.h"

namespace codistill {
namespace {

constexpr char kPullMethod[] = "/codistill.TensorTransfer/Pull";

// What has come of one shard's stream.
class PullReader {
 public:
  PullReader(const ShardLayout& layout, int shard, absl::Span<const TensorView> tensors,
             DataType transfer_dtype)
      : layout_(layout),
        shard_(shard),
        tensors_(tensors),
        transfer_dtype_(transfer_dtype),
        received_(layout.of_shard(shard).size(), 0) {}

  absl::Status Take(grpc::ByteBuffer* message) {
    bytes_ += message->Length();
    TensorFrame frame;
    DecodedPayload payload;
    if (absl::Status status =
            DecodedPayload::Decode(message, TensorFrame::kPayloadFieldNumber, &frame, &payload);
        !status.ok()) {
      return absl::DataLossError(absl::StrCat("bad frame: ", status.message()));
    }
    if (ended_) return absl::DataLossError("a frame after the end of the pull");
    const FrameHeader& header = frame.header();
    if (!begun_) {
      if (!header.has_pull_begin()) return absl::DataLossError("the first frame is no PullBegin");
      begun_ = true;
      begin_ = header.pull_begin();
      return absl::OkStatus();
    }
    if (header.has_chunk()) return TakeChunks(header, payload);
    if (!header.has_pull_end()) return absl::DataLossError("neither a chunk nor a PullEnd");
    ended_ = true;
    return CheckEnd(header.pull_end());
  }

  absl::Status CheckComplete() const {
    if (ended_) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat("the stream ended after ", chunks_, " chunks, without a PullEnd"));
  }

  const Version& version() const { return begin_.version(); }
  uint64_t bytes() const { return bytes_; }

 private:
  absl::Status TakeChunks(const FrameHeader& header, const DecodedPayload& payload) {
    size_t at = 0;
    CODISTILL_RETURN_IF_ERROR(TakeChunk(header.chunk(), payload, &at));
    for (const TensorChunk& chunk : header.more()) {
      CODISTILL_RETURN_IF_ERROR(TakeChunk(chunk, payload, &at));
    }
    if (payload.count() == 1 && at == payload.size(0)) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat("frame with ", payload.size(0), " bytes of payload for chunks of ", at));
  }

  // Takes the elements of one chunk, which begin at byte `*at` of the payload.
  absl::Status TakeChunk(const TensorChunk& chunk, const DecodedPayload& payload, size_t* at) {
    ++chunks_;
    const int index = layout_.FindPiece(shard_, chunk.tensor(), chunk.begin());
    if (index < 0) {
      return absl::DataLossError(absl::StrCat("chunk of tensor ", chunk.tensor(), " at ",
                                              chunk.begin(), ", which this shard does not hold"));
    }
    const Piece& piece = layout_.of_shard(shard_)[index];
    const TensorSpec& spec = layout_.tensor(piece.tensor());
    const int64_t due = piece.begin() + received_[index];
    if (chunk.begin() != due || chunk.count() < 1 ||
        chunk.count() > piece.begin() + piece.count() - due) {
      return absl::DataLossError(absl::StrCat(
          "chunk [", chunk.begin(), ", +", chunk.count(), ") of tensor ", spec.name(),
          "; it must begin at ", due, " and end within ", piece.begin() + piece.count()));
    }
    // What was asked for in half the bytes is widened here.
    const bool narrow = transfer_dtype_ == DT_BFLOAT16 && spec.dtype() == DT_FLOAT &&
                        spec.role() == TensorSpec::PARAMETER;
    const DataType dtype = narrow ? DT_BFLOAT16 : spec.dtype();
    const size_t size = ElementSize(dtype);
    if (chunk.dtype() != dtype || chunk.content() != TensorChunk::VALUE ||
        chunk.encoding() != TensorChunk::DENSE || payload.count() != 1 ||
        payload.size(0) - *at < chunk.count() * size) {
      return absl::DataLossError(absl::StrCat(
          "chunk of tensor ", spec.name(), " is ", DataTypeName(chunk.dtype()), " with ",
          payload.count() == 1 ? payload.size(0) - *at : 0, " bytes; it must be the values, ",
          DataTypeName(dtype), " with ", chunk.count() * size, " bytes"));
    }
    const size_t bytes = static_cast<size_t>(chunk.count()) * size;
    if (narrow) {
      // The bytes may have arrived in parts that end within a number.
      narrow_.resize(std::max(narrow_.size(), static_cast<size_t>(chunk.count())));
      payload.CopyRangeTo(0, *at, bytes, narrow_.data());
      FromBfloat16(narrow_.data(), static_cast<size_t>(chunk.count()),
                   static_cast<float*>(tensors_[piece.tensor()].data) + chunk.begin());
    } else {
      payload.CopyRangeTo(0, *at, bytes,
                          static_cast<char*>(tensors_[piece.tensor()].data) + chunk.begin() * size);
    }
    *at += bytes;
    payload_bytes_ += static_cast<int64_t>(bytes);
    received_[index] += chunk.count();
    return absl::OkStatus();
  }

  absl::Status CheckEnd(const PullEnd& end) const {
    for (size_t i = 0; i < received_.size(); ++i) {
      const Piece& piece = layout_.of_shard(shard_)[i];
      if (received_[i] != piece.count()) {
        return absl::DataLossError(absl::StrCat("only ", received_[i], " of ", piece.count(),
                                                " elements of tensor ",
                                                layout_.tensor(piece.tensor()).name(), " came"));
      }
    }
    if (chunks_ != begin_.chunks() || payload_bytes_ != end.bytes()) {
      return absl::DataLossError(absl::StrCat(chunks_, " chunks with ", payload_bytes_,
                                              " bytes came of ", begin_.chunks(), " with ",
                                              end.bytes()));
    }
    return absl::OkStatus();
  }

  const ShardLayout& layout_;
  const int shard_;
  const absl::Span<const TensorView> tensors_;
  const DataType transfer_dtype_;  // of fp32 parameters
  std::vector<uint16_t> narrow_;   // a chunk that came as bfloat16
  std::vector<int64_t> received_;  // elements, by piece of the shard
  bool begun_ = false;
  bool ended_ = false;
  PullBegin begin_;
  int64_t chunks_ = 0;
  int64_t payload_bytes_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace

absl::StatusOr<ShardPullResult> PullShard(BulkChannel* channel, const PullRequest& request,
                                          const ShardLayout& layout, int shard,
                                          absl::Span<const TensorView> tensors, absl::Time deadline,
                                          CallGroup* group) {
  const std::unique_ptr<BulkStream> stream = channel->Open(kPullMethod, deadline);
  CallGroup::Member member(group, stream.get());
  stream->Write(EncodeWithPayload(request, TensorFrame::kPayloadFieldNumber, {}));
  stream->WritesDone();

  PullReader reader(layout, shard, tensors, request.transfer_dtype());
  grpc::ByteBuffer message;
  std::optional<TraceSpan> span;  // from when the version is there
  while (stream->Read(&message)) {
    if (!span.has_value()) {
      span.emplace("pull", "pull shard", "pull shards");
      span->Arg("step", request.step()).Arg("shard", shard);
    }
    if (absl::Status status = reader.Take(&message); !status.ok()) {
      stream->Cancel();
      return status;
    }
  }
  CODISTILL_RETURN_IF_ERROR(stream->Finish());
  CODISTILL_RETURN_IF_ERROR(reader.CheckComplete());
  if (span.has_value()) span->Arg("bytes", static_cast<int64_t>(reader.bytes()));
  return ShardPullResult{reader.version(), reader.bytes()};
}

}  // namespace codistill
