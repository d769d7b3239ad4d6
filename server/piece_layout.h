#ifndef CODISTILL_SERVER_PIECE_LAYOUT_H_
#define CODISTILL_SERVER_PIECE_LAYOUT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/model.pb.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// One piece as its shard keeps it: at the same place in every buffer of the shard, be it weights,
// an optimizer slot, a staged push or a cut.
struct ShardPiece {
  Piece piece;
  std::string name;  // of the tensor
  DataType dtype = DT_INVALID;
  TensorSpec::Role role = TensorSpec::ROLE_INVALID;
  bool trained = false;  // a parameter that the map does not freeze: every push has its gradient
  uint64_t offset = 0;   // bytes from the start of the buffer, a multiple of 64
  uint64_t bytes = 0;
  uint64_t element_size = 0;
};

// Where one shard's pieces lie. Immutable, thread-safe.
class PieceLayout {
 public:
  // INVALID_ARGUMENT if the shard is not one of the map's.
  static absl::StatusOr<PieceLayout> Create(const ShardMap& map, int shard);

  const std::vector<ShardPiece>& pieces() const { return pieces_; }  // in shard-map order
  uint64_t buffer_bytes() const { return buffer_bytes_; }
  const ShardMap& map() const { return map_; }
  int shard() const { return shard_; }

  // Index in pieces() of the piece that holds elements [begin, begin + count) of a tensor.
  // INVALID_ARGUMENT names the tensor and says what the shard holds of it.
  absl::StatusOr<int> Find(uint32_t tensor, int64_t begin, int64_t count) const;

 private:
  PieceLayout() = default;

  ShardMap map_;
  int shard_ = 0;
  std::vector<ShardPiece> pieces_;
  std::vector<std::vector<int>> by_tensor_;  // indices in pieces_
  uint64_t buffer_bytes_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_PIECE_LAYOUT_H_
