#ifndef CODISTILL_COMMON_CLIENT_SHARD_LAYOUT_H_
#define CODISTILL_COMMON_CLIENT_SHARD_LAYOUT_H_

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// A shard map arranged for those who send and receive. Immutable, hence thread-safe.
class ShardLayout {
 public:
  // INVALID_ARGUMENT names a piece that is outside its tensor or overlaps another, or a tensor that
  // the pieces do not cover: a map from the network is not taken on trust.
  static absl::StatusOr<ShardLayout> Create(ShardMap map);

  const ShardMap& map() const { return map_; }
  uint64_t digest() const { return digest_; }
  int num_shards() const { return map_.num_shards(); }
  const TensorSpec& tensor(int index) const { return map_.tensors(index); }
  int64_t elements(int index) const { return elements_[index]; }
  // Whether the job does not train this parameter: its gradient is not pushed.
  bool frozen(int index) const { return frozen_[index]; }

  // Pieces by shard and by tensor, in map order.
  absl::Span<const Piece> of_shard(int shard) const { return by_shard_[shard]; }
  absl::Span<const Piece> of_tensor(int index) const { return by_tensor_[index]; }

  // Index in of_shard(shard) of the piece in which element `begin` of a tensor lies; -1 if it is
  // not there.
  int FindPiece(int shard, uint32_t tensor, int64_t begin) const;

 private:
  ShardMap map_;
  uint64_t digest_ = 0;
  std::vector<int64_t> elements_;
  std::vector<bool> frozen_;
  std::vector<std::vector<Piece>> by_shard_;
  std::vector<std::vector<Piece>> by_tensor_;
  // By shard: (tensor, first element) -> index in by_shard_.
  std::vector<std::map<std::pair<uint32_t, int64_t>, int>> begins_;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_SHARD_LAYOUT_H_
