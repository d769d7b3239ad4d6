#ifndef CODISTILL_SERVER_STAGED_PUSH_H_
#define CODISTILL_SERVER_STAGED_PUSH_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/parameter_server.pb.h"
#include "server/aligned_buffer.h"
#include "server/embedding/staged_rows.h"
#include "server/piece_layout.h"

namespace codistill {

// Which elements of a range have arrived. Chunks mostly arrive in order, so this is nearly always
// one interval.
class ArrivedRanges {
 public:
  // False if any of [begin, end) was there already.
  bool Add(int64_t begin, int64_t end);
  // First element of [0, count) that is missing; `count` if none is.
  int64_t FirstMissing(int64_t count) const;

 private:
  std::vector<std::pair<int64_t, int64_t>> intervals_;  // sorted, disjoint, not adjacent
};

// Writes bytes [begin, begin + size) of a chunk's payload to `to`.
using CopyOut = absl::FunctionRef<void(size_t begin, size_t size, void* to)>;
// Where the byte `begin` lies, on any boundary, with those of the next `size` that follow it there.
using ViewOut = absl::FunctionRef<absl::Span<const uint8_t>(size_t begin, size_t size)>;

// Takes pushed elements where they are not to be put aside.
class PushSink {
 public:
  virtual ~PushSink() = default;
  // `count` elements of a piece from its element `first`, each once.
  virtual void Take(int piece, int64_t first, int64_t count, CopyOut copy, ViewOut view) = 0;
};

// What one rank has sent to one shard for one step: gradients and buffers laid out as the shard's
// own pieces, staged until the step is decided. Written by one call at a time; read once complete.
class StagedPush {
 public:
  // It goes back to a worker in one RegisterReply, which is at most 16 MiB.
  static constexpr size_t kMaxWorkerStateBytes = size_t{12} << 20;

  StagedPush(const PieceLayout* layout, PushBegin begin, std::shared_ptr<AlignedBuffer> buffer)
      : layout_(layout),
        begin_(std::move(begin)),
        buffer_(std::move(buffer)),
        arrived_(layout->pieces().size()) {}

  // What arrives is given to `sink`, and data() is null.
  StagedPush(const PieceLayout* layout, PushBegin begin, std::unique_ptr<PushSink> sink)
      : layout_(layout),
        begin_(std::move(begin)),
        sink_(std::move(sink)),
        arrived_(layout->pieces().size()) {}

  const PushBegin& begin() const { return begin_; }

  // Takes the payload of a chunk, which counts as arrived from now on; `copy` and `view` get it
  // out. Gradients may be of DT_HALF. Errors as Place.
  absl::Status Take(const TensorChunk& chunk, size_t payload_bytes, CopyOut copy, ViewOut view);

  // Where to copy the payload of a chunk, which counts as arrived from now on. INVALID_ARGUMENT,
  // naming the tensor: not in the map, not on this shard, beyond a piece, sent twice, wrong dtype
  // or payload length, or content that does not fit its role. Without a sink only, and for chunks
  // of the tensor's own dtype.
  absl::StatusOr<void*> Place(const TensorChunk& chunk, size_t payload_bytes);

  // OK, or INVALID_ARGUMENT naming the first tensor that has not wholly arrived.
  absl::Status CheckComplete() const;

  // Where rows of embedding tables go; null while the push may bring none. Set before the first
  // chunk.
  void ExpectRows(const RowLayout* layout) { rows_ = std::make_unique<StagedRows>(layout); }
  StagedRows* rows() { return rows_.get(); }
  const StagedRows* rows() const { return rows_.get(); }
  // Of tensors, as far as placed.
  uint64_t payload_bytes() const { return payload_bytes_; }

  const uint8_t* data() const { return buffer_ == nullptr ? nullptr : buffer_->data(); }
  PushSink* sink() const { return sink_.get(); }
  const std::string& worker_state() const { return worker_state_; }

  // Another push has taken this one's place: whatever still arrives is refused.
  void Supersede() { superseded_.store(true, std::memory_order_relaxed); }
  bool superseded() const { return superseded_.load(std::memory_order_relaxed); }

 private:
  // Checks a chunk of a tensor and notes its arrival.
  struct Range {
    int piece = 0;
    int64_t first = 0;
  };
  absl::Status Superseded() const;
  void* PlaceOf(const Range& range) const;
  void TakeElements(const Range& range, int64_t count, size_t bytes, CopyOut copy, ViewOut view);
  absl::StatusOr<Range> Check(const TensorChunk& chunk, size_t payload_bytes);
  absl::StatusOr<void*> PlaceWorkerState(const TensorChunk& chunk, size_t payload_bytes);

  const PieceLayout* const layout_;
  const PushBegin begin_;
  const std::shared_ptr<AlignedBuffer> buffer_;  // null where there is a sink
  const std::unique_ptr<PushSink> sink_;
  std::vector<ArrivedRanges> arrived_;  // by piece, relative to its begin
  uint64_t payload_bytes_ = 0;
  std::string worker_state_;
  std::unique_ptr<StagedRows> rows_;
  std::atomic<bool> superseded_{false};
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_STAGED_PUSH_H_
