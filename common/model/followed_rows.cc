#include "common/model/followed_rows.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/base/random.h"

namespace codistill {
namespace {

// Rows a bucket has on average before there are twice as many buckets: few enough that copying one
// for a single row that changed costs no more than a few cache lines a row.
constexpr int64_t kFullBucket = 32;
constexpr int kMaxBits = 40;

}  // namespace

std::shared_ptr<const FollowedRows> FollowedRows::Empty(int64_t dim, const RowInit& init) {
  std::shared_ptr<FollowedRows> rows(new FollowedRows());
  rows->dim_ = dim;
  rows->init_ = init;
  rows->buckets_.resize(1);
  return rows;
}

size_t FollowedRows::BucketOf(uint64_t key) const {
  // Upper bits of a hash that has nothing to do with the placement of keys on shards.
  return bits_ == 0 ? 0 : Mix(key) >> (64 - bits_);
}

uint64_t FollowedRows::BytesOf(const Bucket& bucket) {
  return sizeof(Bucket) + bucket.keys.capacity() * sizeof(uint64_t) +
         bucket.rows.capacity() * sizeof(float);
}

void FollowedRows::Find(absl::Span<const uint64_t> keys, float* rows) const {
  for (const uint64_t key : keys) {
    const Bucket* const bucket = buckets_[BucketOf(key)].get();
    bool found = false;
    if (bucket != nullptr) {
      const auto it = std::lower_bound(bucket->keys.begin(), bucket->keys.end(), key);
      if (it != bucket->keys.end() && *it == key) {
        std::memcpy(rows, bucket->rows.data() + (it - bucket->keys.begin()) * dim_,
                    dim_ * sizeof(float));
        found = true;
      }
    }
    if (!found) DefaultRow(init_, key, absl::MakeSpan(rows, dim_));
    rows += dim_;
  }
}

FollowedRows::Builder::Builder(std::shared_ptr<const FollowedRows> base)
    : next_(new FollowedRows(*base)), own_(next_->buckets_.size(), nullptr) {}

FollowedRows::Bucket* FollowedRows::Builder::Own(size_t index) {
  if (own_[index] != nullptr) return own_[index];
  std::shared_ptr<const Bucket>& place = next_->buckets_[index];
  auto copy = place == nullptr ? std::make_shared<Bucket>() : std::make_shared<Bucket>(*place);
  own_[index] = copy.get();
  if (place != nullptr) next_->bytes_ -= BytesOf(*place);
  place = std::move(copy);
  next_->bytes_ += BytesOf(*own_[index]);
  return own_[index];
}

void FollowedRows::Builder::Put(uint64_t key, const float* row) {
  const int64_t dim = next_->dim_;
  Bucket* bucket = Own(next_->BucketOf(key));
  auto it = std::lower_bound(bucket->keys.begin(), bucket->keys.end(), key);
  const auto at = it - bucket->keys.begin();
  if (it != bucket->keys.end() && *it == key) {
    std::memcpy(bucket->rows.data() + at * dim, row, dim * sizeof(float));
    return;
  }
  next_->bytes_ -= BytesOf(*bucket);
  bucket->keys.insert(it, key);
  bucket->rows.insert(bucket->rows.begin() + at * dim, row, row + dim);
  next_->bytes_ += BytesOf(*bucket);
  ++next_->size_;
  if (next_->size_ > kFullBucket << next_->bits_ && next_->bits_ < kMaxBits) Grow();
}

void FollowedRows::Builder::Erase(uint64_t key) {
  const int64_t dim = next_->dim_;
  const size_t index = next_->BucketOf(key);
  const Bucket* const old = next_->buckets_[index].get();
  if (old == nullptr || !std::binary_search(old->keys.begin(), old->keys.end(), key)) return;
  Bucket* const bucket = Own(index);
  const auto it = std::lower_bound(bucket->keys.begin(), bucket->keys.end(), key);
  const auto at = it - bucket->keys.begin();
  bucket->keys.erase(it);
  bucket->rows.erase(bucket->rows.begin() + at * dim, bucket->rows.begin() + (at + 1) * dim);
  --next_->size_;
}

void FollowedRows::Builder::Grow() {
  const int64_t dim = next_->dim_;
  const std::vector<std::shared_ptr<const Bucket>> old = std::move(next_->buckets_);
  next_->bits_ += 1;
  next_->bytes_ = 0;
  next_->buckets_.assign(size_t{1} << next_->bits_, nullptr);
  own_.assign(next_->buckets_.size(), nullptr);
  // A bucket's keys go to its two halves, in their order.
  for (size_t i = 0; i < old.size(); ++i) {
    if (old[i] == nullptr) continue;
    std::shared_ptr<Bucket> halves[2];
    for (size_t k = 0; k < old[i]->keys.size(); ++k) {
      const size_t half = next_->BucketOf(old[i]->keys[k]) & 1;
      if (halves[half] == nullptr) halves[half] = std::make_shared<Bucket>();
      halves[half]->keys.push_back(old[i]->keys[k]);
      const float* const row = old[i]->rows.data() + k * dim;
      halves[half]->rows.insert(halves[half]->rows.end(), row, row + dim);
    }
    for (size_t half = 0; half < 2; ++half) {
      if (halves[half] == nullptr) continue;
      halves[half]->keys.shrink_to_fit();
      halves[half]->rows.shrink_to_fit();
      next_->bytes_ += BytesOf(*halves[half]);
      own_[2 * i + half] = halves[half].get();
      next_->buckets_[2 * i + half] = std::move(halves[half]);
    }
  }
}

std::shared_ptr<const FollowedRows> FollowedRows::Builder::Build() {
  own_.clear();
  return std::move(next_);
}

}  // namespace codistill
