#include "server/pull_source.h"

#include <algorithm>
#include <utility>

#include "common/base/status.h"
#include "server/aligned_buffer.h"

namespace codistill {

PullSource::PullSource(std::shared_ptr<const ShardStore> store,
                       std::shared_ptr<const ShardStore::Cut> cut, int64_t exact_step,
                       Version version, const std::vector<uint32_t>& tensors, int64_t block_bytes)
    : store_(std::move(store)),
      cut_(std::move(cut)),
      exact_step_(exact_step),
      version_(std::move(version)) {
  const std::vector<ShardPiece>& pieces = store_->layout().pieces();
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& piece = pieces[i].piece;
    if (!tensors.empty() &&
        std::find(tensors.begin(), tensors.end(), piece.tensor()) == tensors.end()) {
      continue;
    }
    const int64_t step =
        std::max<int64_t>(1, block_bytes / static_cast<int64_t>(pieces[i].element_size));
    for (int64_t done = 0; done < piece.count(); done += step) {
      blocks_.push_back(
          {static_cast<int>(i), piece.begin() + done, std::min(step, piece.count() - done)});
    }
  }
}

absl::StatusOr<PullSource::Block> PullSource::Read(int64_t index) const {
  const Range& range = blocks_[index];
  const ShardPiece& piece = store_->layout().pieces()[range.piece];
  Block block;
  block.chunk.set_tensor(piece.piece.tensor());
  block.chunk.set_begin(range.begin);
  block.chunk.set_count(range.count);
  block.chunk.set_dtype(piece.dtype);
  block.chunk.set_content(TensorChunk::VALUE);
  block.bytes = static_cast<size_t>(range.count) * piece.element_size;
  if (cut_ != nullptr) {
    block.data = cut_->values->data() + piece.offset +
                 static_cast<uint64_t>(range.begin - piece.piece.begin()) * piece.element_size;
    block.owner = cut_->values;
    return block;
  }
  auto copy = std::make_shared<AlignedBuffer>(block.bytes);
  CODISTILL_RETURN_IF_ERROR(
      store_->ReadLive(range.piece, range.begin, range.count, exact_step_, copy->data()));
  block.data = copy->data();
  block.owner = std::move(copy);
  return block;
}

}  // namespace codistill
