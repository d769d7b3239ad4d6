#include "server/early_update.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "server/buffer_average.h"

namespace codistill {
namespace {

// Gradient taken and used at a time: stays in the first-level cache.
constexpr int64_t kTakeBytes = 16384;

}  // namespace

EarlyUpdate::EarlyUpdate(const ShardStore* store, ShardStore::Update update,
                         std::vector<BlockRef> base, BlockPool* blocks)
    : store_(store),
      update_(std::move(update)),
      steps_(store->StepsOf(update_)),
      base_(std::move(base)),
      blocks_(blocks),
      next_(base_.size()) {}

void EarlyUpdate::Take(int piece_index, int64_t first, int64_t count, CopyOut copy, ViewOut view) {
  const ShardPiece& piece = store_->layout_.pieces()[piece_index];
  const bool trains = store_->Trains(piece);
  // A frozen parameter keeps its value, whatever is pushed: ShardStore::Adopt sees to it.
  if (!trains && piece.role != TensorSpec::BUFFER) return;
  alignas(64) uint8_t room[kTakeBytes];
  const int64_t at_a_time = kTakeBytes / static_cast<int64_t>(piece.element_size);
  const int64_t begin = first;
  store_->ForSegments(
      piece, first, count, [&](size_t block, uint64_t offset, int64_t element, int64_t n) {
        if (!next_[block]) next_[block] = blocks_->Get();
        for (int64_t done = 0; done < n; done += at_a_time) {
          const int64_t some = std::min(at_a_time, n - done);
          const size_t size = static_cast<size_t>(some) * piece.element_size;
          const uint64_t at = offset + static_cast<uint64_t>(done) * piece.element_size;
          const size_t from = static_cast<size_t>(element + done - begin) * piece.element_size;
          // Where it has arrived in one part it is used as it lies: this copy would cost more than
          // the update. Averages of buffers want their own alignment.
          const void* gradient = trains ? view(from, size) : nullptr;
          if (gradient == nullptr) {
            copy(from, size, room);
            gradient = room;
          }
          uint8_t* const to = next_[block].mutable_data() + at;
          if (!trains) {
            const uint8_t* const source = room;
            const double all = 1.0;
            CombineBuffers(piece.dtype, absl::MakeConstSpan(&source, 1),
                           absl::MakeConstSpan(&all, 1), some, to);
            continue;
          }
          const auto* const weights = reinterpret_cast<const float*>(base_[block].data() + at);
          store_->optimizer_.Apply(steps_[piece_index], absl::MakeConstSpan(weights, some),
                                   absl::MakeConstSpan(static_cast<const float*>(gradient), some),
                                   {}, reinterpret_cast<float*>(to), {});
        }
      });
}

bool EarlyUpdate::Fits(const ShardStore::Update& update) const {
  return update.step == update_.step && update.learning_rate == update_.learning_rate &&
         update.weight_decay == update_.weight_decay && update.clip_scale == update_.clip_scale &&
         update.norms.empty();
}

bool ShardStore::MayUpdateEarly() const {
  // With slots there would be two or three times as much to write before it is known to be wanted.
  return slots_.empty() && options_.optimizer.clip_norm() <= 0 && !optimizer_.NeedsTensorNorms();
}

std::shared_ptr<StagedPush> ShardStore::NewEarlyPush(const PushBegin& begin, const Update& update) {
  if (!MayUpdateEarly()) return nullptr;
  const std::shared_ptr<const Cut> live = Live(update.step - 1, /*exact=*/true);
  if (live == nullptr) return nullptr;
  std::vector<BlockRef> base(block_layouts_.size());
  for (size_t i = 0; i < base.size(); ++i) {
    base[i] = live->block(i);
    if (!base[i]) return nullptr;  // revoked meanwhile
  }
  return std::make_shared<StagedPush>(
      &layout_, begin, std::make_unique<EarlyUpdate>(this, update, std::move(base), &blocks_));
}

bool ShardStore::CanApply(const Update& update,
                          absl::Span<const Contribution> contributions) const {
  for (const Contribution& c : contributions) {
    const auto* const early = static_cast<const EarlyUpdate*>(c.push->sink());
    if (early != nullptr && (contributions.size() != 1 || !early->Fits(update))) return false;
  }
  return true;
}

void ShardStore::Adopt(const StagedPush& push) {
  auto* const early = static_cast<EarlyUpdate*>(push.sink());
  for (size_t i = 0; i < values_.size(); ++i) {
    BlockRef& next = early->next_[i];
    if (!next) continue;
    for (const Segment& segment : block_layouts_[i].segments) {
      const ShardPiece& piece = layout_.pieces()[segment.piece];
      if (Trains(piece) || piece.role == TensorSpec::BUFFER) continue;
      std::memcpy(next.mutable_data() + segment.offset, values_[i].data() + segment.offset,
                  static_cast<size_t>(segment.count) * piece.element_size);
    }
    values_[i] = std::move(next);
  }
}

}  // namespace codistill
