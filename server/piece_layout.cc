#include "server/piece_layout.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/tensor/tensor.h"
#include "server/aligned_buffer.h"

namespace codistill {

absl::StatusOr<PieceLayout> PieceLayout::Create(const ShardMap& map, int shard) {
  if (shard < 0 || shard >= map.num_shards()) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard ", shard, " is none of the group's ", map.num_shards(), " shards"));
  }
  PieceLayout layout;
  layout.map_ = map;
  layout.shard_ = shard;
  layout.by_tensor_.resize(map.tensors_size());
  for (const Piece& piece : map.pieces()) {
    if (piece.shard() != shard) continue;
    const TensorSpec& spec = map.tensors(static_cast<int>(piece.tensor()));
    ShardPiece item;
    item.piece = piece;
    item.name = spec.name();
    item.dtype = spec.dtype();
    item.role = spec.role();
    item.trained =
        spec.role() == TensorSpec::PARAMETER &&
        std::find(map.frozen().begin(), map.frozen().end(), piece.tensor()) == map.frozen().end();
    item.element_size = ElementSize(spec.dtype());
    item.offset = layout.buffer_bytes_;
    item.bytes = static_cast<uint64_t>(piece.count()) * item.element_size;
    layout.by_tensor_[piece.tensor()].push_back(static_cast<int>(layout.pieces_.size()));
    const uint64_t end = item.offset + item.bytes;
    layout.buffer_bytes_ = (end + AlignedBuffer::kAlignment - 1) / AlignedBuffer::kAlignment *
                           AlignedBuffer::kAlignment;
    layout.pieces_.push_back(std::move(item));
  }
  return layout;
}

absl::StatusOr<int> PieceLayout::Find(uint32_t tensor, int64_t begin, int64_t count) const {
  if (tensor >= by_tensor_.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", tensor, " is not in the shard map, which has ", by_tensor_.size(), " tensors"));
  }
  std::string held;
  for (int index : by_tensor_[tensor]) {
    const Piece& piece = pieces_[index].piece;
    // Written so that no hostile range overflows.
    if (begin >= piece.begin() && count >= 0 && count <= piece.count() &&
        begin - piece.begin() <= piece.count() - count) {
      return index;
    }
    absl::StrAppend(&held, held.empty() ? "" : ", ", "[", piece.begin(), ", ",
                    piece.begin() + piece.count(), ")");
  }
  return absl::InvalidArgumentError(
      absl::StrCat("tensor ", map_.tensors(static_cast<int>(tensor)).name(), ": ", count,
                   " elements from ", begin, " are not within one piece of shard ", shard_,
                   ", which holds ", held.empty() ? "nothing of it" : held));
}

}  // namespace codistill
