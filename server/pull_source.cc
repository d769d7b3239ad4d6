#include "server/pull_source.h"

#include <algorithm>
#include <utility>

#include "common/base/status.h"
#include "common/tensor/bfloat16.h"

namespace codistill {

PullSource::PullSource(std::shared_ptr<const ShardStore> store, std::shared_ptr<const Cut> cut,
                       Version version, const std::vector<uint32_t>& tensors, int64_t chunk_bytes,
                       DataType transfer_dtype)
    : store_(std::move(store)),
      cut_(std::move(cut)),
      version_(std::move(version)),
      transfer_dtype_(transfer_dtype) {
  const std::vector<ShardPiece>& pieces = store_->layout().pieces();
  const uint64_t block_bytes = store_->block_bytes();
  for (size_t i = 0; i < pieces.size(); ++i) {
    const ShardPiece& piece = pieces[i];
    if (!tensors.empty() &&
        std::find(tensors.begin(), tensors.end(), piece.piece.tensor()) == tensors.end()) {
      continue;
    }
    // A chunk ends where its block ends.
    const uint64_t most =
        std::max<uint64_t>(piece.element_size, static_cast<uint64_t>(chunk_bytes));
    for (uint64_t at = piece.offset; at < piece.offset + piece.bytes;) {
      const uint64_t offset = at % block_bytes;
      const uint64_t left = std::min({most, block_bytes - offset, piece.offset + piece.bytes - at});
      const uint64_t count = left / piece.element_size;
      blocks_.push_back(
          {static_cast<int>(i),
           piece.piece.begin() + static_cast<int64_t>((at - piece.offset) / piece.element_size),
           static_cast<int64_t>(count), static_cast<size_t>(at / block_bytes), offset});
      at += count * piece.element_size;
    }
  }
  if (blocks_.empty()) cut_ = nullptr;
}

size_t PullSource::block_size(int64_t index) const {
  const Range& range = blocks_[index];
  return static_cast<size_t>(range.count) * store_->layout().pieces()[range.piece].element_size;
}

absl::StatusOr<PullSource::Block> PullSource::Read(int64_t index) {
  const Range& range = blocks_[index];
  const ShardPiece& piece = store_->layout().pieces()[range.piece];
  auto owner = std::make_shared<BlockRef>(cut_->block(range.block));
  if (!*owner) return ShardStore::RevokedError(*cut_);
  if (index + 1 == num_blocks()) cut_ = nullptr;
  Block block;
  block.chunk.set_tensor(piece.piece.tensor());
  block.chunk.set_begin(range.begin);
  block.chunk.set_count(range.count);
  block.chunk.set_dtype(piece.dtype);
  block.chunk.set_content(TensorChunk::VALUE);
  block.bytes = static_cast<size_t>(range.count) * piece.element_size;
  block.data = owner->data() + range.offset;
  if (transfer_dtype_ == DT_BFLOAT16 && piece.role == TensorSpec::PARAMETER &&
      piece.dtype == DT_FLOAT) {
    BlockRef narrow = store_->NewBlock();
    ToBfloat16(static_cast<const float*>(block.data), static_cast<size_t>(range.count),
               reinterpret_cast<uint16_t*>(narrow.mutable_data()));
    *owner = std::move(narrow);
    block.data = owner->data();
    block.bytes /= 2;
    block.chunk.set_dtype(DT_BFLOAT16);
  }
  block.owner = std::move(owner);
  return block;
}

}  // namespace codistill
