#include "server/shard_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/buffer_average.h"

namespace codistill {
namespace {

// Elements averaged and updated at a time: small enough to stay in the first-level caches and to
// keep readers waiting for microseconds only.
constexpr int64_t kBlockElements = 16384;

// Unused shard-sized buffers kept: what one step frees the next one takes.
constexpr size_t kFreeBuffers = 4;

float* Floats(uint8_t* bytes) { return reinterpret_cast<float*>(bytes); }
const float* Floats(const uint8_t* bytes) { return reinterpret_cast<const float*>(bytes); }

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
  return std::unique_ptr<ShardStore>(new ShardStore(std::move(options), std::move(layout)));
}

ShardStore::ShardStore(Options options, PieceLayout layout)
    : options_(std::move(options)),
      layout_(std::move(layout)),
      optimizer_(options_.optimizer),
      slot_names_(optimizer_.SlotNames()),
      pool_(layout_.buffer_bytes(), kFreeBuffers),
      values_(layout_.buffer_bytes()) {
  for (size_t i = 0; i < slot_names_.size(); ++i) slots_.emplace_back(layout_.buffer_bytes());
  Clear();
}

void ShardStore::Clear() {
  {
    MutexLock lock(&values_mu_);
    step_ = 0;
    updating_ = true;  // until the load has ended well, nothing is readable as a step
    if (values_.size() > 0) std::memset(values_.data(), 0, values_.size());
  }
  for (AlignedBuffer& slot : slots_) {
    if (slot.size() > 0) std::memset(slot.data(), 0, slot.size());
  }
  DropCuts();
}

std::shared_ptr<StagedPush> ShardStore::NewPush(const PushBegin& begin) const {
  return std::make_shared<StagedPush>(&layout_, begin, pool_.Get());
}

void ShardStore::Apply(const Update& update, absl::Span<const Contribution> contributions) {
  int64_t examples = 0;
  for (const Contribution& c : contributions) examples += c.num_examples;
  std::vector<double> weights;
  if (examples > 0) {
    for (const Contribution& c : contributions) {
      weights.push_back(static_cast<double>(c.num_examples) / static_cast<double>(examples));
    }
    {
      MutexLock lock(&values_mu_);
      updating_ = true;
    }
    for (const ShardPiece& piece : layout_.pieces()) {
      if (piece.role == TensorSpec::PARAMETER) {
        ApplyPiece(piece, update, contributions, weights);
      } else if (piece.role == TensorSpec::BUFFER) {
        CombinePiece(piece, contributions, weights);
      }
    }
  }
  MutexLock lock(&values_mu_);
  updating_ = false;
  step_ = update.step;
}

void ShardStore::ApplyPiece(const ShardPiece& piece, const Update& update,
                            absl::Span<const Contribution> contributions,
                            absl::Span<const double> weights) {
  alignas(64) float average[kBlockElements];
  const Optimizer::Step step = {update.learning_rate, piece.decays ? update.weight_decay : 0.0,
                                update.step};
  std::vector<float*> slots(slots_.size());
  for (int64_t first = 0; first < piece.piece.count(); first += kBlockElements) {
    const size_t n = std::min(kBlockElements, piece.piece.count() - first);
    const uint64_t offset = piece.offset + static_cast<uint64_t>(first) * sizeof(float);
    absl::Span<const float> gradient;
    if (contributions.size() == 1 && update.clip_scale == 1) {
      gradient = absl::MakeConstSpan(Floats(contributions[0].push->data() + offset), n);
    } else {
      for (size_t c = 0; c < contributions.size(); ++c) {
        const float scale = static_cast<float>(weights[c] * update.clip_scale);
        const auto from = absl::MakeConstSpan(Floats(contributions[c].push->data() + offset), n);
        if (c == 0) {
          ScaleInto(scale, from, absl::MakeSpan(average, n));
        } else {
          AddScaled(scale, from, absl::MakeSpan(average, n));
        }
      }
      gradient = absl::MakeConstSpan(average, n);
    }
    for (size_t s = 0; s < slots_.size(); ++s) slots[s] = Floats(slots_[s].data() + offset);
    MutexLock lock(&values_mu_);
    optimizer_.Apply(step, absl::MakeSpan(Floats(values_.data() + offset), n), gradient, slots);
  }
}

void ShardStore::CombinePiece(const ShardPiece& piece, absl::Span<const Contribution> contributions,
                              absl::Span<const double> weights) {
  std::vector<const uint8_t*> sources;
  for (const Contribution& c : contributions) sources.push_back(c.push->data() + piece.offset);
  MutexLock lock(&values_mu_);
  CombineBuffers(piece.dtype, sources, weights, piece.piece.count(), values_.data() + piece.offset);
}

int64_t ShardStore::step() const {
  MutexLock lock(&values_mu_);
  return step_;
}

void ShardStore::Publish(int64_t label) {
  if (FindCut(label) != nullptr) return;
  auto cut = std::make_shared<Cut>();
  cut->label = label;
  cut->step = step();
  std::shared_ptr<AlignedBuffer> values = pool_.Get();
  if (values_.size() > 0) std::memcpy(values->data(), values_.data(), values_.size());
  cut->values = std::move(values);
  MutexLock lock(&cuts_mu_);
  cuts_[label] = std::move(cut);
  while (cuts_.size() > static_cast<size_t>(std::max(options_.held_cuts, 1))) {
    cuts_.erase(cuts_.begin());
  }
}

std::shared_ptr<const ShardStore::Cut> ShardStore::FindCut(int64_t label) const {
  MutexLock lock(&cuts_mu_);
  const auto it = cuts_.find(label);
  return it == cuts_.end() ? nullptr : it->second;
}

int64_t ShardStore::newest_cut() const {
  MutexLock lock(&cuts_mu_);
  return cuts_.empty() ? -1 : cuts_.rbegin()->first;
}

void ShardStore::DropCuts() {
  MutexLock lock(&cuts_mu_);
  cuts_.clear();
  snapshot_.reset();
}

absl::Status ShardStore::ReadLive(int piece_index, int64_t begin, int64_t count, int64_t exact_step,
                                  void* to) const {
  const ShardPiece& piece = layout_.pieces()[piece_index];
  MutexLock lock(&values_mu_);
  if (exact_step >= 0 && (step_ != exact_step || updating_)) {
    return absl::AbortedError(absl::StrCat("weights of step ", exact_step,
                                           " are gone: the shard has come to step ", step_,
                                           updating_ ? " and beyond" : ""));
  }
  std::memcpy(to,
              values_.data() + piece.offset +
                  static_cast<uint64_t>(begin - piece.piece.begin()) * piece.element_size,
              static_cast<size_t>(count) * piece.element_size);
  return absl::OkStatus();
}

void ShardStore::TakeSnapshot(int64_t label) {
  if (this->snapshot(label) != nullptr) return;
  auto taken = std::make_shared<Snapshot>();
  taken->label = label;
  taken->step = step();
  const auto copy = [this](const AlignedBuffer& from) {
    std::shared_ptr<AlignedBuffer> to = pool_.Get();
    if (from.size() > 0) std::memcpy(to->data(), from.data(), from.size());
    return to;
  };
  const std::shared_ptr<const Cut> cut = FindCut(label);
  taken->values = cut != nullptr && cut->step == taken->step ? cut->values : copy(values_);
  for (const AlignedBuffer& slot : slots_) taken->slots.push_back(copy(slot));
  MutexLock lock(&cuts_mu_);
  snapshot_ = std::move(taken);
}

std::shared_ptr<const ShardStore::Snapshot> ShardStore::snapshot(int64_t label) const {
  MutexLock lock(&cuts_mu_);
  return snapshot_ != nullptr && snapshot_->label == label ? snapshot_ : nullptr;
}

void ShardStore::DropSnapshot(int64_t label) {
  MutexLock lock(&cuts_mu_);
  if (snapshot_ != nullptr && snapshot_->label == label) snapshot_.reset();
}

}  // namespace codistill
