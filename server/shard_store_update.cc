// How a shard's store takes a step.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "common/base/parallel.h"
#include "common/tensor/sum_of_squares.h"
#include "server/buffer_average.h"
#include "server/shard_store.h"

namespace codistill {
namespace {

// Elements averaged and updated at a time: small enough to stay in the first-level caches.
constexpr int64_t kChunkElements = 16384;

// Blocks that are worth a thread.
constexpr int64_t kBlocksOfAThread = 2;

float* Floats(uint8_t* bytes) { return reinterpret_cast<float*>(bytes); }
const float* Floats(const uint8_t* bytes) { return reinterpret_cast<const float*>(bytes); }

}  // namespace

std::vector<double> ShardStore::Weights(absl::Span<const Contribution> contributions) {
  int64_t examples = 0;
  for (const Contribution& c : contributions) examples += c.num_examples;
  std::vector<double> weights;
  if (examples <= 0) return weights;
  for (const Contribution& c : contributions) {
    weights.push_back(static_cast<double>(c.num_examples) / static_cast<double>(examples));
  }
  return weights;
}

std::vector<Optimizer::Step> ShardStore::StepsOf(const Update& update) const {
  std::map<uint32_t, const TensorNorm*> norms;
  for (const TensorNorm& norm : update.norms) norms[norm.tensor()] = &norm;
  std::vector<Optimizer::Step> steps;
  for (const ShardPiece& piece : layout_.pieces()) {
    const ParameterPolicy& policy = policies_[piece.piece.tensor()];
    Optimizer::Step step;
    step.learning_rate = update.learning_rate * policy.learning_rate_multiplier;
    step.weight_decay = update.weight_decay * policy.weight_decay_multiplier;
    step.step = update.step;
    step.gradient_scale = update.clip_scale;
    const auto norm = norms.find(piece.piece.tensor());
    if (optimizer_.NeedsTensorNorms() && norm != norms.end()) {
      step.trust_ratio = optimizer_.TrustRatio(
          std::sqrt(norm->second->weight_squared()),
          update.clip_scale * std::sqrt(norm->second->gradient_squared()), step.weight_decay);
    }
    steps.push_back(step);
  }
  return steps;
}

void ShardStore::Apply(const Update& update, absl::Span<const Contribution> contributions) {
  const Work work = {contributions, Weights(contributions), StepsOf(update)};
  if (!work.weights.empty()) {
    {
      MutexLock lock(&mu_);
      updating_ = true;  // from here on no reader takes a reference to the live blocks
    }
    if (contributions.size() == 1 && contributions[0].push->sink() != nullptr) {
      Adopt(*contributions[0].push);
    } else {
      // Elements do not depend on one another, so neither does the result on who updates which.
      ParallelFor(options_.threads, static_cast<int64_t>(values_.size()), kBlocksOfAThread,
                  [this, &work](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      if (block_layouts_[i].changes) UpdateBlock(i, work);
                    }
                  });
    }
  }
  MutexLock lock(&mu_);
  updating_ = false;
  step_ = update.step;
}

void ShardStore::UpdateBlock(size_t block, const Work& work) {
  const BlockLayout& in_block = block_layouts_[block];
  BlockUpdate values(&blocks_, &values_[block]);
  std::vector<BlockUpdate> slots;
  std::vector<const uint8_t*> slots_from;
  std::vector<uint8_t*> slots_to;
  if (in_block.trained) {
    for (BlockArray& slot : slots_) {
      slots.emplace_back(&blocks_, &slot[block]);
      slots_from.push_back(slots.back().from());
      slots_to.push_back(slots.back().to());
    }
  }
  for (const Segment& segment : in_block.segments) {
    const ShardPiece& piece = layout_.pieces()[segment.piece];
    const size_t bytes = static_cast<size_t>(segment.count) * piece.element_size;
    if (Trains(piece)) {
      UpdateParameter(piece, segment, work, values.from(), values.to(), slots_from, slots_to);
      continue;
    }
    if (piece.role == TensorSpec::BUFFER) {
      std::vector<const uint8_t*> sources;
      for (const Contribution& c : work.contributions) {
        sources.push_back(c.push->data() + block * block_bytes_ + segment.offset);
      }
      CombineBuffers(piece.dtype, sources, work.weights, segment.count,
                     values.to() + segment.offset);
    } else if (!values.in_place()) {
      std::memcpy(values.to() + segment.offset, values.from() + segment.offset, bytes);
    }
    // A frozen parameter's slots keep what they start from, wherever they lie.
    for (size_t s = 0; s < slots.size() && piece.role == TensorSpec::PARAMETER; ++s) {
      if (slots[s].in_place()) continue;
      std::memcpy(slots_to[s] + segment.offset, slots_from[s] + segment.offset, bytes);
    }
  }
  values.Commit();
  for (BlockUpdate& slot : slots) slot.Commit();
}

absl::Span<const float> ShardStore::Average(absl::Span<const Contribution> contributions,
                                            absl::Span<const double> weights, uint64_t in_push,
                                            size_t n, float* room) {
  if (contributions.size() == 1) {
    return absl::MakeConstSpan(Floats(contributions[0].push->data() + in_push), n);
  }
  for (size_t c = 0; c < contributions.size(); ++c) {
    const float scale = static_cast<float>(weights[c]);
    const auto term = absl::MakeConstSpan(Floats(contributions[c].push->data() + in_push), n);
    if (c == 0) {
      ScaleInto(scale, term, absl::MakeSpan(room, n));
    } else {
      AddScaled(scale, term, absl::MakeSpan(room, n));
    }
  }
  return absl::MakeConstSpan(room, n);
}

void ShardStore::UpdateParameter(const ShardPiece& piece, const Segment& segment, const Work& work,
                                 const uint8_t* from, uint8_t* to,
                                 absl::Span<const uint8_t* const> slots_from,
                                 absl::Span<uint8_t* const> slots_to) {
  alignas(64) float room[kChunkElements];
  std::vector<const float*> old_slots(slots_from.size());
  std::vector<float*> new_slots(slots_to.size());
  for (int64_t first = 0; first < segment.count; first += kChunkElements) {
    const size_t n = std::min(kChunkElements, segment.count - first);
    const uint64_t in_block = segment.offset + static_cast<uint64_t>(first) * sizeof(float);
    const uint64_t in_push =
        piece.offset + static_cast<uint64_t>(segment.first + first) * sizeof(float);
    const absl::Span<const float> gradient =
        Average(work.contributions, work.weights, in_push, n, room);
    for (size_t s = 0; s < slots_from.size(); ++s) {
      old_slots[s] = Floats(slots_from[s] + in_block);
      new_slots[s] = Floats(slots_to[s] + in_block);
    }
    optimizer_.Apply(work.steps[segment.piece], absl::MakeConstSpan(Floats(from + in_block), n),
                     gradient, old_slots, Floats(to + in_block), new_slots);
  }
}

std::vector<TensorNorm> ShardStore::Norms(absl::Span<const Contribution> contributions,
                                          bool weights) const {
  const std::vector<double> shares = Weights(contributions);
  // By block and segment, so that no sum depends on which thread computes it.
  struct Part {
    double gradient = 0;
    double weight = 0;
  };
  std::vector<std::vector<Part>> parts(values_.size());
  ParallelFor(options_.threads, static_cast<int64_t>(values_.size()), kBlocksOfAThread,
              [&](int64_t begin, int64_t end) {
                alignas(64) float room[kChunkElements];
                for (int64_t b = begin; b < end; ++b) {
                  const std::vector<Segment>& segments = block_layouts_[b].segments;
                  parts[b].resize(segments.size());
                  for (size_t i = 0; i < segments.size(); ++i) {
                    const Segment& segment = segments[i];
                    const ShardPiece& piece = layout_.pieces()[segment.piece];
                    if (!Trains(piece)) continue;
                    const float* const values = Floats(values_[b].data() + segment.offset);
                    for (int64_t first = 0; first < segment.count; first += kChunkElements) {
                      const size_t n = std::min(kChunkElements, segment.count - first);
                      if (weights) parts[b][i].weight += SumOfSquares(values + first, n);
                      if (shares.empty()) continue;
                      const uint64_t in_push =
                          piece.offset +
                          static_cast<uint64_t>(segment.first + first) * sizeof(float);
                      const auto average = Average(contributions, shares, in_push, n, room);
                      parts[b][i].gradient += SumOfSquares(average.data(), n);
                    }
                  }
                }
              });
  std::map<uint32_t, Part> sums;
  for (size_t b = 0; b < parts.size(); ++b) {
    for (size_t i = 0; i < parts[b].size(); ++i) {
      const ShardPiece& piece = layout_.pieces()[block_layouts_[b].segments[i].piece];
      if (!Trains(piece)) continue;
      Part& sum = sums[piece.piece.tensor()];
      sum.gradient += parts[b][i].gradient;
      sum.weight += parts[b][i].weight;
    }
  }
  std::vector<TensorNorm> norms;
  for (const auto& sum : sums) {
    norms.emplace_back();
    norms.back().set_tensor(sum.first);
    norms.back().set_gradient_squared(sum.second.gradient);
    norms.back().set_weight_squared(sum.second.weight);
  }
  return norms;
}

}  // namespace codistill
