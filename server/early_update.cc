#include "server/early_update.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/container/inlined_vector.h"
#include "server/buffer_average.h"

namespace codistill {
namespace {

// What is copied at a time where it did not arrive together.
constexpr size_t kRoomBytes = 1024;
constexpr size_t kLine = 64;  // of a cache

// Elements to be taken at a time: as many as lie together, but up to the end of a line of the
// target, so that the next ones can be written past the caches; where that is none, a few lines are
// copied to `room`.
struct Part {
  const void* data;
  int64_t count;
};
Part NextPart(size_t from, int64_t count, size_t element_size, uint64_t target, CopyOut copy,
              ViewOut view, uint8_t* room) {
  const size_t size = static_cast<size_t>(count) * element_size;
  const absl::Span<const uint8_t> here = view(from, size);
  if (here.size() == size) return {here.data(), count};
  const auto to_line_end = [&](size_t bytes) { return bytes - (target + bytes) % kLine; };
  const size_t line_left = kLine - target % kLine;
  if (here.size() >= line_left) {
    return {here.data(), static_cast<int64_t>(to_line_end(here.size()) / element_size)};
  }
  const size_t some = std::min(size, to_line_end(kRoomBytes));
  copy(from, some, room);
  return {room, static_cast<int64_t>(some / element_size)};
}

}  // namespace

EarlyUpdate::EarlyUpdate(const ShardStore* store, ShardStore::Update update, State base,
                         BlockPool* blocks)
    : store_(store),
      update_(std::move(update)),
      steps_(store->StepsOf(update_)),
      blocks_(blocks),
      base_(std::move(base)) {
  next_.values.resize(base_.values.size());
  next_.slots.resize(base_.slots.size(), std::vector<BlockRef>(base_.values.size()));
}

void EarlyUpdate::Open(size_t block) {
  if (next_.values[block]) return;
  next_.values[block] = blocks_->Get();
  if (!store_->block_layouts_[block].trained) return;
  for (std::vector<BlockRef>& slot : next_.slots) slot[block] = blocks_->Get();
}

void EarlyUpdate::Take(int piece_index, int64_t first, int64_t count, CopyOut copy, ViewOut view) {
  const ShardPiece& piece = store_->layout_.pieces()[piece_index];
  const bool trains = store_->Trains(piece);
  // A frozen parameter keeps its value, whatever is pushed: ShardStore::Adopt sees to it.
  if (!trains && piece.role != TensorSpec::BUFFER) return;
  alignas(kLine) uint8_t room[kRoomBytes];
  const int64_t begin = first;
  store_->ForSegments(
      piece, first, count, [&](size_t block, uint64_t offset, int64_t element, int64_t n) {
        Open(block);
        for (int64_t done = 0; done < n;) {
          const size_t from = static_cast<size_t>(element + done - begin) * piece.element_size;
          const uint64_t to = offset + static_cast<uint64_t>(done) * piece.element_size;
          if (trains) {
            const Part part = NextPart(from, n - done, piece.element_size, to, copy, view, room);
            Train(piece_index, block, to, part.count, part.data);
            done += part.count;
            continue;
          }
          // Averages want their elements on a boundary of their own.
          const int64_t some = std::min<int64_t>(n - done, kRoomBytes / piece.element_size);
          copy(from, static_cast<size_t>(some) * piece.element_size, room);
          const uint8_t* const source = room;
          const double all = 1.0;
          CombineBuffers(piece.dtype, absl::MakeConstSpan(&source, 1), absl::MakeConstSpan(&all, 1),
                         some, next_.values[block].mutable_data() + to);
          done += some;
        }
      });
}

void EarlyUpdate::Train(int piece, size_t block, uint64_t offset, int64_t count,
                        const void* gradient) {
  const size_t n = static_cast<size_t>(count);
  const auto from = [&](const BlockRef& ref) {
    return reinterpret_cast<const float*>(ref.data() + offset);
  };
  const auto to = [&](BlockRef& ref) {
    return reinterpret_cast<float*>(ref.mutable_data() + offset);
  };
  absl::InlinedVector<const float*, 2> slots;
  absl::InlinedVector<float*, 2> new_slots;
  for (size_t s = 0; s < base_.slots.size(); ++s) {
    slots.push_back(from(base_.slots[s][block]));
    new_slots.push_back(to(next_.slots[s][block]));
  }
  store_->optimizer_.Apply(steps_[piece], absl::MakeConstSpan(from(base_.values[block]), n),
                           absl::MakeConstSpan(static_cast<const float*>(gradient), n), slots,
                           to(next_.values[block]), new_slots);
}

bool EarlyUpdate::Fits(const ShardStore::Update& update) const {
  return update.step == update_.step && update.learning_rate == update_.learning_rate &&
         update.weight_decay == update_.weight_decay && update.clip_scale == update_.clip_scale &&
         update.norms.empty();
}

bool ShardStore::MayUpdateEarly() const {
  return options_.optimizer.clip_norm() <= 0 && !optimizer_.NeedsTensorNorms();
}

std::shared_ptr<StagedPush> ShardStore::NewEarlyPush(const PushBegin& begin, const Update& update) {
  if (!MayUpdateEarly()) return nullptr;
  EarlyUpdate::State base;
  {
    MutexLock lock(&mu_);
    if (updating_ || step_ != update.step - 1) return nullptr;
    const auto refer = [](const BlockArray& array) {
      std::vector<BlockRef> blocks;
      for (size_t i = 0; i < array.size(); ++i) blocks.push_back(array[i]);
      return blocks;
    };
    base.values = refer(values_);
    for (const BlockArray& slot : slots_) base.slots.push_back(refer(slot));
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
  EarlyUpdate::State& next = early->next_;
  const auto keep = [](const Segment& segment, size_t bytes, const BlockRef& from, BlockRef* to) {
    std::memcpy(to->mutable_data() + segment.offset, from.data() + segment.offset, bytes);
  };
  for (size_t i = 0; i < values_.size(); ++i) {
    if (!next.values[i]) continue;
    for (const Segment& segment : block_layouts_[i].segments) {
      const ShardPiece& piece = layout_.pieces()[segment.piece];
      if (Trains(piece) || piece.role == TensorSpec::BUFFER) continue;
      const size_t bytes = static_cast<size_t>(segment.count) * piece.element_size;
      keep(segment, bytes, values_[i], &next.values[i]);
      for (size_t s = 0; s < slots_.size() && next.slots[s][i]; ++s) {
        keep(segment, bytes, slots_[s][i], &next.slots[s][i]);
      }
    }
    values_[i] = std::move(next.values[i]);
    for (size_t s = 0; s < slots_.size(); ++s) {
      if (next.slots[s][i]) slots_[s][i] = std::move(next.slots[s][i]);
    }
  }
  early->base_ = {};  // for the next push to write
}

}  // namespace codistill
