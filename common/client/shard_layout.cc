#include "common/client/shard_layout.h"

#include "absl/strings/str_cat.h"
#include "common/config/shard_map.h"
#include "common/tensor/tensor.h"

namespace codistill {

absl::StatusOr<ShardLayout> ShardLayout::Create(ShardMap map) {
  ShardLayout layout;
  if (map.num_shards() < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard map has num_shards ", map.num_shards(), "; it must be at least 1"));
  }
  layout.by_shard_.resize(map.num_shards());
  layout.begins_.resize(map.num_shards());
  layout.by_tensor_.resize(map.tensors_size());
  for (const TensorSpec& tensor : map.tensors()) {
    const int64_t elements =
        ElementCount(std::vector<int64_t>(tensor.shape().begin(), tensor.shape().end()));
    if (elements < 0 || ElementSize(tensor.dtype()) == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("shard map: tensor ", tensor.name(), " has a bad shape or dtype"));
    }
    layout.elements_.push_back(elements);
  }
  layout.frozen_.resize(map.tensors_size(), false);
  for (const uint32_t tensor : map.frozen()) {
    if (tensor >= layout.frozen_.size()) {
      return absl::InvalidArgumentError(absl::StrCat("shard map: freezes tensor ", tensor, " of ",
                                                     layout.frozen_.size(), " tensors"));
    }
    layout.frozen_[tensor] = true;
  }

  std::vector<int64_t> covered(map.tensors_size(), 0);
  for (const Piece& piece : map.pieces()) {
    if (piece.tensor() >= static_cast<uint32_t>(map.tensors_size()) || piece.shard() < 0 ||
        piece.shard() >= map.num_shards()) {
      return absl::InvalidArgumentError(
          absl::StrCat("shard map: piece of tensor ", piece.tensor(), " on shard ", piece.shard(),
                       " of ", map.tensors_size(), " tensors and ", map.num_shards(), " shards"));
    }
    const TensorSpec& tensor = map.tensors(piece.tensor());
    if (tensor.role() == TensorSpec::TIED) {
      return absl::InvalidArgumentError(
          absl::StrCat("shard map: tied tensor ", tensor.name(), " has a piece"));
    }
    if (piece.begin() != covered[piece.tensor()] || piece.count() < 0 ||
        piece.count() > layout.elements_[piece.tensor()] - piece.begin()) {
      return absl::InvalidArgumentError(
          absl::StrCat("shard map: piece [", piece.begin(), ", +", piece.count(), ") of tensor ",
                       tensor.name(), " must begin at ", covered[piece.tensor()],
                       " and end within ", layout.elements_[piece.tensor()]));
    }
    covered[piece.tensor()] += piece.count();
    auto& pieces = layout.by_shard_[piece.shard()];
    layout.begins_[piece.shard()][{piece.tensor(), piece.begin()}] =
        static_cast<int>(pieces.size());
    pieces.push_back(piece);
    layout.by_tensor_[piece.tensor()].push_back(piece);
  }
  for (int i = 0; i < map.tensors_size(); ++i) {
    if (map.tensors(i).role() != TensorSpec::TIED && covered[i] != layout.elements_[i]) {
      return absl::InvalidArgumentError(absl::StrCat("shard map: pieces of tensor ",
                                                     map.tensors(i).name(), " cover ", covered[i],
                                                     " of ", layout.elements_[i], " elements"));
    }
  }
  layout.digest_ = ShardMapDigest(map);
  layout.map_ = std::move(map);
  return layout;
}

int ShardLayout::FindPiece(int shard, uint32_t tensor, int64_t begin) const {
  const auto& begins = begins_[shard];
  auto next = begins.upper_bound({tensor, begin});
  if (next == begins.begin()) return -1;
  --next;
  const Piece& piece = by_shard_[shard][next->second];
  if (piece.tensor() != tensor || begin >= piece.begin() + piece.count()) return -1;
  return next->second;
}

}  // namespace codistill
