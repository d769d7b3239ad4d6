#include "server/shard_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace codistill {
namespace {

// Unused staging buffers kept: what one step frees the next one takes.
constexpr size_t kFreeBuffers = 4;

// Blocks as large as a frame, smaller where all the shard has is smaller.
uint64_t BlockBytes(uint64_t buffer_bytes) {
  return std::min<uint64_t>(BlockPool::kMaxBlockBytes, std::max<uint64_t>(buffer_bytes, 64));
}

}  // namespace

absl::StatusOr<std::unique_ptr<ShardStore>> ShardStore::Create(Options options) {
  CODISTILL_ASSIGN_OR_RETURN(PieceLayout layout, PieceLayout::Create(options.map, options.shard));
  for (const ShardPiece& piece : layout.pieces()) {
    if (piece.role == TensorSpec::PARAMETER && piece.dtype != DT_FLOAT) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", piece.name,
                                                     ": a parameter must be ", "DT_FLOAT, not ",
                                                     DataType_Name(piece.dtype)));
    }
  }
  CODISTILL_ASSIGN_OR_RETURN(std::vector<ParameterPolicy> policies,
                             ResolveParameterGroups(options.optimizer, options.map.tensors()));
  return std::unique_ptr<ShardStore>(
      new ShardStore(std::move(options), std::move(layout), std::move(policies)));
}

ShardStore::ShardStore(Options options, PieceLayout layout, std::vector<ParameterPolicy> policies)
    : options_(std::move(options)),
      layout_(std::move(layout)),
      policies_(std::move(policies)),
      optimizer_(options_.optimizer),
      slot_names_(optimizer_.SlotNames()),
      block_bytes_(BlockBytes(layout_.buffer_bytes())),
      pool_(layout_.buffer_bytes(), kFreeBuffers),
      blocks_(block_bytes_),
      values_(&blocks_, layout_.buffer_bytes()) {
  for (size_t i = 0; i < slot_names_.size(); ++i) {
    slots_.emplace_back(&blocks_, layout_.buffer_bytes());
  }
  block_layouts_.resize(values_.size());
  for (size_t i = 0; i < layout_.pieces().size(); ++i) {
    const ShardPiece& piece = layout_.pieces()[i];
    ForSegments(piece, 0, piece.piece.count(),
                [&](size_t block, uint64_t offset, int64_t first, int64_t count) {
                  BlockLayout& in_block = block_layouts_[block];
                  in_block.segments.push_back({static_cast<int>(i), first, count, offset});
                  in_block.trained |= Trains(piece);
                  in_block.changes |= Trains(piece) || piece.role == TensorSpec::BUFFER;
                });
  }
  Clear();
}

void ShardStore::MakeUnique(BlockArray* array) {
  for (size_t i = 0; i < array->size(); ++i) {
    if (!(*array)[i].unique()) (*array)[i] = blocks_.Get();
  }
}

void ShardStore::Clear() {
  {
    MutexLock lock(&mu_);
    step_ = 0;
    updating_ = true;  // until the load has ended well, nothing is readable as a step
  }
  DropCuts();
  const auto clear = [this](BlockArray* array, float value) {
    MakeUnique(array);
    for (size_t i = 0; i < array->size(); ++i) {
      float* const begin = reinterpret_cast<float*>((*array)[i].mutable_data());
      std::fill(begin, begin + block_bytes_ / sizeof(float), value);
    }
  };
  clear(&values_, 0);
  for (BlockArray& slot : slots_) clear(&slot, optimizer_.InitialSlotValue());
}

void ShardStore::ReserveCuts() {
  blocks_.Reserve(values_.size() * static_cast<size_t>(std::max(options_.held_cuts, 1)) +
                  values_.size() * slots_.size());
}

std::shared_ptr<StagedPush> ShardStore::NewPush(const PushBegin& begin) const {
  return std::make_shared<StagedPush>(&layout_, begin, pool_.Get());
}

int64_t ShardStore::step() const {
  MutexLock lock(&mu_);
  return step_;
}

// ---------------------------------------------------------------------------------------- reading

void ShardStore::Prune(Versions* versions) {
  versions->erase(std::remove_if(versions->begin(), versions->end(),
                                 [](const std::weak_ptr<const Cut>& version) {
                                   const std::shared_ptr<const Cut> held = version.lock();
                                   return held == nullptr || held->revoked();
                                 }),
                  versions->end());
}

void ShardStore::RevokeOldest(Versions* versions, size_t keep) {
  Prune(versions);
  while (versions->size() > keep) {
    if (const std::shared_ptr<const Cut> oldest = versions->front().lock()) {
      oldest->Revoke();
      ++revoked_;
    }
    versions->erase(versions->begin());
  }
}

void ShardStore::Publish(int64_t label) {
  std::vector<std::shared_ptr<const Cut>> dropped;  // their blocks return outside the lock
  MutexLock lock(&mu_);
  if (cuts_.count(label) > 0) return;
  cuts_[label] = std::make_shared<Cut>(label, step_, options_.clock->Now(), values_);
  while (cuts_.size() > static_cast<size_t>(std::max(options_.held_cuts, 1))) {
    dropped.push_back(std::move(cuts_.begin()->second));
    cuts_.erase(cuts_.begin());
    if (dropped.back().use_count() > 1) old_cuts_.push_back(dropped.back());  // it is being read
  }
  RevokeOldest(&old_cuts_, static_cast<size_t>(std::max(options_.max_old_cuts, 1)));
}

std::shared_ptr<const Cut> ShardStore::FindCut(int64_t label) const {
  MutexLock lock(&mu_);
  const auto it = cuts_.find(label);
  return it == cuts_.end() ? nullptr : it->second;
}

int64_t ShardStore::newest_cut() const {
  MutexLock lock(&mu_);
  return cuts_.empty() ? -1 : cuts_.rbegin()->first;
}

void ShardStore::DropCuts() {
  std::map<int64_t, std::shared_ptr<const Cut>> cuts;
  std::shared_ptr<const Snapshot> snapshot;
  MutexLock lock(&mu_);
  cuts.swap(cuts_);
  snapshot.swap(snapshot_);
  for (const auto& cut : cuts) {
    if (cut.second.use_count() > 1) old_cuts_.push_back(cut.second);
  }
  RevokeOldest(&old_cuts_, 0);
  RevokeOldest(&live_reads_, 0);
}

std::shared_ptr<const Cut> ShardStore::Live(int64_t step, bool exact) {
  std::shared_ptr<const Cut> doomed;
  MutexLock lock(&mu_);
  Prune(&live_reads_);
  const bool there = !updating_ && (exact ? step_ == step : step_ >= step);
  if (there) {
    // All readers of one step share one version.
    if (!cuts_.empty() && cuts_.rbegin()->second->step() == step_) return cuts_.rbegin()->second;
    if (!live_reads_.empty()) {
      std::shared_ptr<const Cut> newest = live_reads_.back().lock();
      if (newest != nullptr && newest->step() == step_) return newest;
    }
  } else if (exact) {
    return nullptr;
  }
  const size_t most = static_cast<size_t>(std::max(options_.max_live_reads, 1));
  if (!exact && live_reads_.size() >= most) {
    std::shared_ptr<const Cut> newest = live_reads_.back().lock();
    if (newest != nullptr && newest->step() >= step) return newest;
    doomed = live_reads_.front().lock();
    if (doomed != nullptr && options_.clock->Now() - doomed->made() < options_.max_read_age) {
      return nullptr;
    }
  }
  if (!there) return nullptr;
  RevokeOldest(&live_reads_, most - 1);
  auto live = std::make_shared<const Cut>(step_, step_, options_.clock->Now(), values_);
  live_reads_.push_back(live);
  return live;
}

absl::Status ShardStore::ReadElements(const Cut& cut, int piece_index, int64_t begin, int64_t count,
                                      void* to) const {
  const ShardPiece& piece = layout_.pieces()[piece_index];
  absl::Status status;
  uint8_t* next = static_cast<uint8_t*>(to);
  ForSegments(piece, begin - piece.piece.begin(), count,
              [&](size_t block, uint64_t offset, int64_t, int64_t n) {
                const BlockRef ref = cut.block(block);
                if (!ref) {
                  status = RevokedError(cut);
                  return;
                }
                const size_t bytes = static_cast<size_t>(n) * piece.element_size;
                std::memcpy(next, ref.data() + offset, bytes);
                next += bytes;
              });
  return status;
}

absl::Status ShardStore::RevokedError(const Cut& cut) {
  return absl::AbortedError(
      absl::StrCat("the weights of step ", cut.label(),
                   " were given up: too many newer ones were wanted while they were being read"));
}

ShardStore::Memory ShardStore::memory() const {
  Memory memory;
  const uint64_t live = values_.size() * (1 + slots_.size());
  memory.live_bytes = live * block_bytes_;
  memory.held_bytes = (std::max<uint64_t>(blocks_.in_use(), live) - live) * block_bytes_;
  memory.allocated_bytes = blocks_.allocated() * block_bytes_;
  const auto alive = [](const Versions& versions) {
    return std::count_if(versions.begin(), versions.end(),
                         [](const auto& version) { return !version.expired(); });
  };
  MutexLock lock(&mu_);
  memory.cuts = static_cast<int64_t>(cuts_.size());
  memory.old_cuts = alive(old_cuts_);
  memory.live_reads = alive(live_reads_);
  memory.revoked = revoked_;
  return memory;
}

// ------------------------------------------------------------------------------------ checkpoints

void ShardStore::TakeSnapshot(int64_t label) {
  std::shared_ptr<const Snapshot> older;
  MutexLock lock(&mu_);
  if (snapshot_ != nullptr && snapshot_->label == label) return;
  older = std::move(snapshot_);
  snapshot_ = std::make_shared<const Snapshot>(Snapshot{label, step_, values_, slots_});
}

std::shared_ptr<const ShardStore::Snapshot> ShardStore::snapshot(int64_t label) const {
  MutexLock lock(&mu_);
  return snapshot_ != nullptr && snapshot_->label == label ? snapshot_ : nullptr;
}

void ShardStore::DropSnapshot(int64_t label) {
  std::shared_ptr<const Snapshot> dropped;
  MutexLock lock(&mu_);
  if (snapshot_ != nullptr && snapshot_->label == label) dropped = std::move(snapshot_);
}

}  // namespace codistill
