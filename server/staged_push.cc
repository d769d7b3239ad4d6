#include "server/staged_push.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/tensor/float16.h"

namespace codistill {
namespace {

constexpr size_t kWidenedAtATime = 2048;

}  // namespace

bool ArrivedRanges::Add(int64_t begin, int64_t end) {
  if (begin >= end) return true;
  auto next = std::lower_bound(intervals_.begin(), intervals_.end(), std::make_pair(begin, begin));
  if (next != intervals_.end() && next->first < end) return false;
  const bool joins_next = next != intervals_.end() && next->first == end;
  if (next != intervals_.begin()) {
    const auto previous = next - 1;
    if (previous->second > begin) return false;
    if (previous->second == begin) {
      previous->second = joins_next ? next->second : end;
      if (joins_next) intervals_.erase(next);
      return true;
    }
  }
  if (joins_next) {
    next->first = begin;
  } else {
    intervals_.insert(next, {begin, end});
  }
  return true;
}

int64_t ArrivedRanges::FirstMissing(int64_t count) const {
  if (intervals_.empty() || intervals_.front().first > 0) return 0;
  return std::min(intervals_.front().second, count);
}

absl::StatusOr<StagedPush::Range> StagedPush::Check(const TensorChunk& chunk,
                                                    size_t payload_bytes) {
  CODISTILL_ASSIGN_OR_RETURN(const int index,
                             layout_->Find(chunk.tensor(), chunk.begin(), chunk.count()));
  const ShardPiece& piece = layout_->pieces()[index];
  const auto wrong = [&](const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", piece.name, ": ", what));
  };
  if (piece.role == TensorSpec::PARAMETER ? chunk.content() != TensorChunk::GRADIENT
                                          : chunk.content() != TensorChunk::VALUE) {
    return wrong(absl::StrCat("is a ", TensorSpec::Role_Name(piece.role), " and takes no ",
                              TensorChunk::Content_Name(chunk.content())));
  }
  if (piece.role != TensorSpec::PARAMETER && piece.role != TensorSpec::BUFFER) {
    return wrong(absl::StrCat("is ", TensorSpec::Role_Name(piece.role), " and takes no pushes"));
  }
  if (chunk.encoding() != TensorChunk::DENSE) {
    return wrong(
        absl::StrCat("encoding ", static_cast<int>(chunk.encoding()), " is not known; DENSE is"));
  }
  const bool half = chunk.dtype() == DT_HALF && piece.role == TensorSpec::PARAMETER;
  if (chunk.dtype() != piece.dtype && !half) {
    return wrong(absl::StrCat("has dtype ", DataType_Name(piece.dtype), ", not ",
                              DataType_Name(chunk.dtype())));
  }
  const uint64_t expected =
      static_cast<uint64_t>(chunk.count()) * (half ? sizeof(uint16_t) : piece.element_size);
  if (payload_bytes != expected) {
    return wrong(absl::StrCat(chunk.count(), " elements came with ", payload_bytes, " bytes; ",
                              expected, " were expected"));
  }
  const int64_t first = chunk.begin() - piece.piece.begin();
  if (!arrived_[index].Add(first, first + chunk.count())) {
    return wrong(absl::StrCat("elements [", chunk.begin(), ", ", chunk.begin() + chunk.count(),
                              ") overlap what has arrived already"));
  }
  payload_bytes_ += payload_bytes;
  return Range{index, first};
}

absl::Status StagedPush::Superseded() const {
  return absl::AbortedError(
      absl::StrCat("a newer push of rank ", begin_.rank(), " has taken the place of this one"));
}

void* StagedPush::PlaceOf(const Range& range) const {
  const ShardPiece& piece = layout_->pieces()[range.piece];
  return buffer_->data() + piece.offset + static_cast<uint64_t>(range.first) * piece.element_size;
}

absl::StatusOr<void*> StagedPush::Place(const TensorChunk& chunk, size_t payload_bytes) {
  if (superseded()) return Superseded();
  if (chunk.content() == TensorChunk::WORKER_STATE) return PlaceWorkerState(chunk, payload_bytes);
  CODISTILL_ASSIGN_OR_RETURN(const Range range, Check(chunk, payload_bytes));
  return PlaceOf(range);
}

absl::Status StagedPush::Take(const TensorChunk& chunk, size_t payload_bytes, CopyOut copy,
                              ViewOut view) {
  if (chunk.content() == TensorChunk::WORKER_STATE) {
    CODISTILL_ASSIGN_OR_RETURN(void* const place, Place(chunk, payload_bytes));
    if (payload_bytes > 0) copy(0, payload_bytes, place);
    return absl::OkStatus();
  }
  if (superseded()) return Superseded();
  CODISTILL_ASSIGN_OR_RETURN(const Range range, Check(chunk, payload_bytes));
  if (chunk.dtype() != DT_HALF) {
    TakeElements(range, chunk.count(), payload_bytes, copy, view);
    return absl::OkStatus();
  }
  // Floats from here on.
  const auto widen = [copy](size_t begin, size_t size, void* to) {
    uint16_t halves[kWidenedAtATime];
    for (size_t at = 0; at < size / sizeof(float); at += kWidenedAtATime) {
      const size_t some = std::min(kWidenedAtATime, size / sizeof(float) - at);
      copy(begin / 2 + at * sizeof(uint16_t), some * sizeof(uint16_t), halves);
      FromFloat16(halves, some, static_cast<float*>(to) + at);
    }
  };
  TakeElements(range, chunk.count(), 2 * payload_bytes, widen,
               [](size_t, size_t) { return absl::Span<const uint8_t>(); });
  return absl::OkStatus();
}

void StagedPush::TakeElements(const Range& range, int64_t count, size_t bytes, CopyOut copy,
                              ViewOut view) {
  if (sink_ != nullptr) {
    sink_->Take(range.piece, range.first, count, copy, view);
  } else if (bytes > 0) {
    copy(0, bytes, PlaceOf(range));
  }
}

absl::StatusOr<void*> StagedPush::PlaceWorkerState(const TensorChunk& chunk, size_t payload_bytes) {
  if (layout_->shard() != 0) {
    return absl::InvalidArgumentError("worker state goes to shard 0 alone");
  }
  if (chunk.begin() != static_cast<int64_t>(worker_state_.size()) ||
      chunk.count() != static_cast<int64_t>(payload_bytes)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "worker state: ", chunk.count(), " bytes from ", chunk.begin(), " (payload of ",
        payload_bytes, ") after ", worker_state_.size(), " bytes; it must come in order"));
  }
  if (payload_bytes > kMaxWorkerStateBytes - worker_state_.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("worker state is larger than ", kMaxWorkerStateBytes, " bytes"));
  }
  worker_state_.resize(worker_state_.size() + payload_bytes);
  return &worker_state_[0] + chunk.begin();
}

absl::Status StagedPush::CheckComplete() const {
  for (size_t i = 0; i < arrived_.size(); ++i) {
    const ShardPiece& piece = layout_->pieces()[i];
    if (!piece.trained && piece.role != TensorSpec::BUFFER) continue;
    const int64_t missing = arrived_[i].FirstMissing(piece.piece.count());
    if (missing < piece.piece.count()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "END of rank ", begin_.rank(), ", step ", begin_.step(), ": tensor ", piece.name,
          " has not wholly arrived; element ", piece.piece.begin() + missing, " is missing"));
    }
  }
  return absl::OkStatus();
}

}  // namespace codistill
