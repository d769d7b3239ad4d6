#include "predserver/cached_rows.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#include "common/tensor/int8_rows.h"

namespace codistill {

CachedRows::CachedRows(PredictionCache* cache, std::vector<int64_t> ids, int64_t columns)
    : cache_(cache), ids_(std::move(ids)), columns_(columns) {
  Forget(0);
}

CachedRows::~CachedRows() { GiveUp(); }

void CachedRows::Forget(uint64_t generation) {
  generation_ = generation;
  found_.assign(ids_.size(), false);
  missing_ = static_cast<int64_t>(ids_.size());
}

float* CachedRows::RowOf(int32_t example) {
  if (logits_.empty()) {
    row_floats_ = cache_->row_floats();
    logits_ = Tensor::Allocate(
        DT_FLOAT, {static_cast<int64_t>(ids_.size()) * (row_floats_ / columns_), columns_});
  }
  return static_cast<float*>(logits_.data()) + example * row_floats_;
}

void CachedRows::Found(int32_t example, const PredictionCache::Origin& origin) {
  if (missing_ == static_cast<int64_t>(ids_.size()) || origin.step < oldest_.step) {
    oldest_ = origin;
  }
  found_[example] = true;
  --missing_;
}

CachedRows::Next CachedRows::Look(uint64_t generation, int64_t least_step, int64_t* hits,
                                  int64_t* misses) {
  if (generation != generation_) Forget(generation);
  compute_.clear();
  *hits = *misses = 0;
  const bool any = cache_->row_floats() > 0;
  const auto count = static_cast<int32_t>(ids_.size());
  for (int32_t i = 0; i < count; ++i) {
    if (found_[i]) continue;
    PredictionCache::Origin origin;
    if (any && cache_->Find(KeyOf(i), least_step, RowOf(i), &origin)) {
      Found(i, origin);
      ++*hits;
    } else if (cache_->Claim(KeyOf(i), this)) {
      claims_.push_back(KeyOf(i));
      compute_.push_back(i);
    } else if (waits_ >= kMostWaits) {
      compute_.push_back(i);  // others have failed often enough
    }
  }
  if (missing_ == 0) return Next::kAnswer;
  if (compute_.empty()) return Next::kWait;
  *misses = static_cast<int64_t>(compute_.size());
  if (compute_.size() == ids_.size()) {
    compute_.clear();
    logits_ = Tensor();
  }
  return Next::kCompute;
}

std::shared_ptr<PredictionCache::Waiter> CachedRows::Wait(std::function<void()> go) {
  ++waits_;
  auto waiter = std::make_shared<PredictionCache::Waiter>(std::move(go));
  for (size_t i = 0; i < ids_.size(); ++i) {
    if (!found_[i]) cache_->Wait(KeyOf(static_cast<int32_t>(i)), waiter);
  }
  return waiter;
}

bool CachedRows::Take(const Tensor& logits, const Version& version, absl::Time loaded_at) {
  const size_t examples = compute_.empty() ? ids_.size() : compute_.size();
  const int64_t floats = logits.elements() / static_cast<int64_t>(examples);
  const PredictionCache::Origin origin{version.step(), loaded_at};
  const auto* const rows = static_cast<const float*>(logits.data());
  for (size_t i = 0; i < examples; ++i) {
    const int64_t id = ids_[compute_.empty() ? i : compute_[i]];
    const float* const row = rows + static_cast<int64_t>(i) * floats;
    if (!std::isfinite(LargestMagnitude(row, floats))) continue;
    cache_->Insert({id, version.generation()}, origin, row, floats);
  }
  if (compute_.empty()) {
    generation_ = version.generation();
    logits_ = logits;
    oldest_ = origin;
    missing_ = 0;
  } else if (version.generation() != generation_ ||
             floats != (logits_.empty() ? cache_->row_floats() : row_floats_)) {
    return false;
  } else {
    for (size_t i = 0; i < examples; ++i) {
      std::memcpy(RowOf(compute_[i]), rows + static_cast<int64_t>(i) * floats,
                  static_cast<size_t>(floats) * sizeof(float));
      Found(compute_[i], origin);
    }
  }
  return true;
}

void CachedRows::GiveUp() {
  if (claims_.empty()) return;
  const std::vector<PredictionCache::Key> claims = std::move(claims_);
  claims_.clear();
  cache_->Release(claims, this);
}

}  // namespace codistill
