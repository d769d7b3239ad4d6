#include "common/client/shard_push.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/executor.h"
#include "common/base/fault.h"
#include "common/base/status.h"
#include "common/base/trace.h"
#include "common/rpc/bulk_stream.h"
#include "common/rpc/frame.h"
#include "common/tensor/float16.h"
#include "common/tensor/sum_of_squares.h"

namespace codistill {
namespace {

// Elements rounded at a time: stays in the first-level cache.
constexpr size_t kHalvedAtATime = 2048;

constexpr char kPushMethod[] = "/codistill.TensorTransfer/Push";

}  // namespace

ShardPush::ShardPush(std::shared_ptr<BulkChannel> channel, PushBegin begin, absl::Time deadline,
                     int shard, std::string label, CallGroup* group, PushVerdict* verdict)
    : deadline_(deadline),
      shard_(shard),
      step_(begin.step()),
      label_(std::move(label)),
      group_(group),
      verdict_(verdict),
      thread_([this, channel = std::move(channel), begin = std::move(begin)] {
        SetThreadName("push");
        Run(channel, begin);
      }) {}

ShardPush::~ShardPush() {
  {
    MutexLock lock(&mu_);
    if (!over_ && !end_queued_) over_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

void ShardPush::Add(Part part) {
  MutexLock lock(&mu_);
  // The stream has the same deadline, so that `over_` comes by then.
  mu_.AwaitWithDeadline(absl::Condition(this, &ShardPush::HasRoom), deadline_);
  if (over_ || !HasRoom()) return;
  queued_bytes_ += part.size;
  parts_.push_back(std::move(part));
  if (queued_bytes_ >= kMaxQueuedPushBytes) full_ = true;
}

void ShardPush::SendEnd(PushEnd end) {
  MutexLock lock(&mu_);
  end_ = std::move(end);
  end_queued_ = true;
}

absl::StatusOr<PushReply> ShardPush::Wait() {
  if (thread_.joinable()) thread_.join();
  MutexLock lock(&mu_);
  if (!status_.ok()) return status_;
  return reply_;
}

void ShardPush::Run(std::shared_ptr<BulkChannel> channel, const PushBegin& begin) {
  absl::Status status;
  {
    const std::unique_ptr<BulkStream> stream = channel->Open(kPushMethod, deadline_);
    CallGroup::Member member(group_, stream.get());
    status = Send(stream.get(), begin);
  }
  status = Annotate(status, label_);
  {
    MutexLock lock(&mu_);
    over_ = true;
    status_ = status;
    // Lets go of gradients that nobody will send.
    parts_.clear();
    queued_bytes_ = 0;
  }
  // In this order: whoever waits for this stream finds its own cancelled when this one failed.
  group_->Fail(status);
  verdict_->Leave(shard_);
}

absl::Status ShardPush::Send(BulkStream* stream, const PushBegin& begin) {
  TraceSpan whole("push stream", "push shard", "push");
  whole.Arg("step", begin.step()).Arg("shard", shard_);
  FrameHeader header;
  *header.mutable_begin() = begin;
  if (!Write(stream, header, {})) return ReadReply(stream);
  while (true) {
    std::vector<Part> parts;
    {
      MutexLock lock(&mu_);
      if (!mu_.AwaitWithDeadline(absl::Condition(this, &ShardPush::HasWork), deadline_)) {
        stream->Cancel();
        return absl::DeadlineExceededError("the push was not completed by its deadline");
      }
      if (over_) {  // abandoned by the caller
        stream->Cancel();
        return absl::CancelledError("push abandoned");
      }
      if (parts_.empty()) break;  // END
      // Whatever is there and fits travels in one frame; nothing waits for more to come.
      for (size_t bytes = 0; !parts_.empty() && parts.size() < kMaxChunks;) {
        const bool rows = parts_.front().rows.count() > 0;  // in a frame of their own
        bytes += parts_.front().size;
        if (!parts.empty() && (rows || bytes > kFramePayloadBytes)) break;
        parts.push_back(std::move(parts_.front()));
        parts_.pop_front();
        queued_bytes_ -= parts.back().size;
        if (rows) break;
      }
      if (queued_bytes_ <= kMaxQueuedPushBytes / 2) full_ = false;
    }
    header.clear_more();
    if (parts[0].rows.count() > 0) {
      *header.mutable_rows() = parts[0].rows;
    } else {
      *header.mutable_chunk() = parts[0].chunk;
      for (size_t i = 1; i < parts.size(); ++i) *header.add_more() = parts[i].chunk;
    }
    if (!Write(stream, header, parts)) return ReadReply(stream);
  }
  {
    MutexLock lock(&mu_);
    header.clear_more();
    *header.mutable_end() = end_;
  }
  // A shard that applies pushes as they come must not take half of one that another refuses.
  verdict_->Add(shard_, not_finite_tensor_, squared_norm_);
  TraceSpan decision("decision", "decision", "push decision");
  decision.Arg("step", begin.step()).Arg("shard", shard_);
  const absl::StatusOr<std::string> not_finite = verdict_->Await(deadline_);
  if (!not_finite.ok()) {
    stream->Cancel();
    return not_finite.status();
  }
  header.mutable_end()->set_squared_norm(squared_norm_);
  header.mutable_end()->set_total_squared_norm(verdict_->total_squared_norm());
  header.mutable_end()->set_finite(not_finite->empty());
  header.mutable_end()->set_not_finite_tensor(*not_finite);
  Write(stream, header, {});
  if (FaultInjector::Global().enabled()) FaultPoint(absl::StrCat("push.ended.", shard_));
  return ReadReply(stream);
}

void ShardPush::AddSum(const Part& part, double squares) {
  if (!std::isfinite(squares) && not_finite_tensor_.empty()) not_finite_tensor_ = part.name;
  if (part.rows.count() > 0 || part.chunk.content() == TensorChunk::GRADIENT) {
    squared_norm_ += squares;
  }
}

// What is sent is what counts: a gradient may be finite as a float and not as a half.
PayloadRef ShardPush::Halve(const Part& part) {
  const size_t n = part.size / sizeof(uint16_t);
  const auto* const from = static_cast<const float*>(part.data);
  const std::shared_ptr<uint16_t> halves(new uint16_t[n], std::default_delete<uint16_t[]>());
  float rounded[kHalvedAtATime];
  double squares = 0;
  for (size_t at = 0; at < n; at += kHalvedAtATime) {
    const size_t some = std::min(kHalvedAtATime, n - at);
    ToFloat16(from + at, some, halves.get() + at);
    FromFloat16(halves.get() + at, some, rounded);
    squares += SumOfSquares(rounded, static_cast<int64_t>(some));
  }
  AddSum(part, squares);
  return {halves.get(), part.size, halves};
}

bool ShardPush::Write(BulkStream* stream, const FrameHeader& header, absl::Span<const Part> parts) {
  TraceSpan span("push", "push frame", "push frames");
  if (parts.empty()) {
    span.Drop();
  } else {
    span.Arg("step", step_).Arg("shard", shard_).Arg("tensors", static_cast<int64_t>(parts.size()));
    span.Text("tensor", parts[0].name);
  }
  TensorFrame frame;
  *frame.mutable_header() = header;
  std::vector<PayloadRef> payloads;
  for (const Part& part : parts) {
    if (part.rows.count() == 0 && part.chunk.dtype() == DT_HALF) {
      payloads.push_back(Halve(part));
      continue;
    }
    payloads.push_back({part.data, part.size, part.owner});
    const bool rows = part.rows.count() > 0;
    if (rows || part.chunk.dtype() == DT_FLOAT) {
      // Rows come after their keys.
      const size_t skip = rows ? part.rows.count() * sizeof(uint64_t) : 0;
      AddSum(part, SumOfSquares(reinterpret_cast<const float*>(
                                    static_cast<const uint8_t*>(part.data) + skip),
                                static_cast<int64_t>((part.size - skip) / sizeof(float))));
    }
  }
  constexpr int kPayload = TensorFrame::kPayloadFieldNumber;
  grpc::ByteBuffer message = payloads.empty() ? EncodeWithPayload(frame, kPayload, {})
                                              : EncodeWithParts(frame, kPayload, payloads);
  bytes_.fetch_add(message.Length(), std::memory_order_relaxed);
  span.Arg("bytes", static_cast<int64_t>(message.Length()));
  return stream->Write(std::move(message));
}

absl::Status ShardPush::ReadReply(BulkStream* stream) {
  // Half-closing only now: to a shard, a half-close before END may come from a worker that died.
  // After a write that failed the shard has answered already, perhaps before it read everything.
  stream->WritesDone();
  grpc::ByteBuffer message;
  const bool replied = stream->Read(&message);
  CODISTILL_RETURN_IF_ERROR(stream->Finish());
  PushReply reply;
  DecodedPayload none;
  if (!replied) return absl::DataLossError("the shard ended the push without a reply");
  if (absl::Status status =
          DecodedPayload::Decode(&message, TensorFrame::kPayloadFieldNumber, &reply, &none);
      !status.ok()) {
    return absl::DataLossError(absl::StrCat("bad PushReply: ", status.message()));
  }
  MutexLock lock(&mu_);
  reply_ = std::move(reply);
  return absl::OkStatus();
}

}  // namespace codistill
