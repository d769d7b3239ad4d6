// A row is read from memory once. While a chunk of it is in the first-level cache its exponentials
// are taken and the largest logit of every group of neighbours is kept. The k-th largest of those
// maxima is a bound: at least k logits reach it, and few more do, so that only the groups that
// reach it are looked at again and a handful of candidates is sorted.

#include "predserver/row_outputs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "predserver/row_outputs.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "cuda/row_softmax-inl.h"
#include "hwy/highway.h"

#ifndef CODISTILL_PREDSERVER_ROW_OUTPUTS_ONCE_
#define CODISTILL_PREDSERVER_ROW_OUTPUTS_ONCE_
namespace codistill {
namespace internal {

// Writes n probabilities at element `begin` of the target.
inline void StoreProbabilities(const float* from, int64_t n, const ProbabilityTarget& to,
                               int64_t begin) {
  switch (to.type) {
    case ProbabilityTarget::kFloat:
      std::memcpy(static_cast<float*>(to.data) + begin, from, n * sizeof(float));
      return;
    case ProbabilityTarget::kHalf:
      ToFloat16(from, n, static_cast<uint16_t*>(to.data) + begin);
      return;
    case ProbabilityTarget::kBfloat16:
      ToBfloat16(from, n, static_cast<uint16_t*>(to.data) + begin);
      return;
  }
}

// Ascending keys are descending logits, and of equal ones ascending classes.
inline uint64_t SortKey(float logit, int64_t index) {
  const float positive_zero = logit + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, sizeof(bits));
  bits ^= (bits >> 31) != 0 ? 0u : 0x7fffffffu;
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(index);
}

}  // namespace internal
}  // namespace codistill
#endif  // CODISTILL_PREDSERVER_ROW_OUTPUTS_ONCE_

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

// Softmax of one row after the other, with a check that all logits are finite.
class RowWalk {
 public:
  RowWalk(int64_t columns, double temperature)
      : n_(columns), softmax_(static_cast<float>(temperature), columns) {}

  // False: a logit is not finite. `each(begin, count)` is called while a chunk is in the cache.
  template <typename Each>
  bool Take(const float* x, const Each& each) {
    softmax_.Start(x, n_);
    float spoilt = 0;
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t count = HWY_MIN(kChunk, n_ - begin);
      spoilt += each(begin, count);
      softmax_.Extend(Moment::kNone, begin, count, x, 0);
    }
    softmax_.Finish(n_);
    return spoilt == 0 && std::isfinite(softmax_.sum());
  }

  float* exps() { return softmax_.exps(); }
  double sum() const { return softmax_.sum(); }

 private:
  const int64_t n_;
  RowSoftmax softmax_;
};

// NaN if one of n numbers is not finite, else 0.
float Spoilt(const float* HWY_RESTRICT x, int64_t n) {
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  V32 sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) sum = hn::MulAdd(hn::LoadU(d, x + i), hn::Zero(d), sum);
  float spoilt = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < n; ++i) spoilt += x[i] * 0.0f;
  return spoilt;
}

void Scale(float factor, float* HWY_RESTRICT x, int64_t n) {
  const F32 d;
  const V32 by = hn::Set(d, factor);
  for (int64_t i = 0; i < n; i += hn::Lanes(d))
    hn::Store(hn::Mul(hn::Load(d, x + i), by), d, x + i);
}

int64_t Softmax(const float* logits, int64_t rows, int64_t columns, double temperature,
                const ProbabilityTarget& to) {
  const FlushDenormals flush;
  RowWalk walk(columns, temperature);
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = logits + row * columns;
    if (!walk.Take(x, [x](int64_t begin, int64_t count) { return Spoilt(x + begin, count); })) {
      return row;
    }
    Scale(static_cast<float>(1 / walk.sum()), walk.exps(), columns);
    StoreProbabilities(walk.exps(), columns, to, row * columns);
  }
  return -1;
}

int64_t Sigmoid(const float* logits, int64_t rows, int64_t columns, double temperature,
                const ProbabilityTarget& to) {
  const FlushDenormals flush;
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  const V32 k = hn::Set(d, static_cast<float>(-kLog2E / temperature));
  const V32 one = hn::Set(d, 1.0f);
  auto scratch = hwy::AllocateAligned<float>(kChunk + kMaxLanes);
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = logits + row * columns;
    for (int64_t begin = 0; begin < columns; begin += kChunk) {
      const int64_t count = HWY_MIN(kChunk, columns - begin);
      if (Spoilt(x + begin, count) != 0) return row;
      for (int64_t i = 0; i < count; i += lanes) {
        const V32 z = i + lanes <= count ? hn::LoadU(d, x + begin + i)
                                         : LoadPartial(d, x + begin + i, count - i);
        // Of the two outcomes the less likely one comes from its own exponential: no cancellation.
        const V32 e = Exp2(d, hn::Mul(hn::Abs(z), k));
        const V32 likely = hn::Div(one, hn::Add(one, e));
        const V32 p = hn::IfThenElse(hn::Lt(z, hn::Zero(d)), hn::Mul(e, likely), likely);
        hn::Store(p, d, scratch.get() + i);
      }
      StoreProbabilities(scratch.get(), count, to, row * columns + begin);
    }
  }
  return -1;
}

class TopK {
 public:
  TopK(int64_t columns, double temperature, int64_t k)
      : n_(columns), k_(k), walk_(columns, temperature), values_(k) {
    // Few groups are quickly searched, small ones quickly looked through.
    while (2 * group_ <= kChunk && columns / (2 * group_) >= 2 * k) group_ *= 2;
    grouped_ = columns / group_ >= k;
    maxima_.resize((columns + group_ - 1) / group_);
  }

  // Of one row; false: a logit is not finite.
  bool Take(const float* x) {
    const bool finite = walk_.Take(x, [this, x](int64_t begin, int64_t count) {
      return grouped_ ? Maxima(x, begin, count) : Spoilt(x + begin, count);
    });
    if (!finite) return false;
    Choose(x);
    float* exps = walk_.exps();
    double total = 0;
    for (int64_t i = 0; i < k_; ++i) {
      float& e = exps[Index(i)];
      // Equal logits but for the last bits may have exponentials in the other order.
      values_[i] = i > 0 ? HWY_MIN(e, values_[i - 1]) : e;
      total += e;
      e = 0;
    }
    const double rest = SumOf(exps);
    total += rest;
    Scale(&values_, static_cast<float>(1 / total));
    tail_ = static_cast<float>(rest / total);
    return true;
  }

  int32_t Index(int64_t i) const { return static_cast<int32_t>(keys_[i] & 0xffffffffu); }
  const std::vector<float>& values() const { return values_; }
  float tail() const { return tail_; }

 private:
  static void Scale(std::vector<float>* values, float factor) {
    for (float& value : *values) value *= factor;
  }

  // The largest of every group of a chunk; returns NaN if a logit is not finite.
  float Maxima(const float* HWY_RESTRICT x, int64_t begin, int64_t count) {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    V32 spoilt = hn::Zero(d);
    float* to = &maxima_[begin / group_];
    for (int64_t i = begin; i < begin + count; i += group_) {
      const int64_t end = HWY_MIN(i + group_, begin + count);
      V32 max = hn::Set(d, x[i]);
      int64_t j = i;
      for (; j + lanes <= end; j += lanes) {
        const V32 v = hn::LoadU(d, x + j);
        max = hn::Max(max, v);
        spoilt = hn::MulAdd(v, hn::Zero(d), spoilt);
      }
      if (j < end) {
        const V32 v = LoadPartial(d, x + j, end - j);
        max = hn::Max(max, v);
        spoilt = hn::MulAdd(v, hn::Zero(d), spoilt);
      }
      *to++ = hn::GetLane(hn::MaxOfLanes(d, max));
    }
    return hn::GetLane(hn::SumOfLanes(d, spoilt));
  }

  // Leaves the k best in keys_, in order.
  void Choose(const float* x) {
    keys_.clear();
    if (grouped_) {
      sorted_maxima_ = maxima_;
      std::nth_element(sorted_maxima_.begin(), sorted_maxima_.begin() + (k_ - 1),
                       sorted_maxima_.end(), std::greater<float>());
      const float bound = sorted_maxima_[k_ - 1];
      for (size_t g = 0; g < maxima_.size(); ++g) {
        if (maxima_[g] >= bound) AddFrom(x, static_cast<int64_t>(g) * group_, bound);
      }
    } else {
      for (int64_t i = 0; i < n_; ++i) keys_.push_back(SortKey(x[i], i));
    }
    if (static_cast<int64_t>(keys_.size()) > k_) {
      std::nth_element(keys_.begin(), keys_.begin() + (k_ - 1), keys_.end());
    }
    std::sort(keys_.begin(), keys_.begin() + k_);
  }

  // The logits of a group that reach the bound.
  void AddFrom(const float* HWY_RESTRICT x, int64_t begin, float bound) {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    const int64_t end = HWY_MIN(begin + group_, n_);
    const V32 least = hn::Set(d, bound);
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) {
      if (hn::AllFalse(d, hn::Ge(hn::LoadU(d, x + i), least))) continue;
      for (int64_t j = i; j < i + lanes; ++j) {
        if (x[j] >= bound) keys_.push_back(SortKey(x[j], j));
      }
    }
    for (; i < end; ++i) {
      if (x[i] >= bound) keys_.push_back(SortKey(x[i], i));
    }
  }

  // Of all exponentials; beyond the last there are zeros to the end of the vector.
  double SumOf(const float* HWY_RESTRICT exps) const {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    V32 total = hn::Zero(d);
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      const int64_t end = HWY_MIN(begin + kBlock, n_);
      V32 sum = hn::Zero(d);
      for (int64_t i = begin; i < end; i += lanes) sum = hn::Add(sum, hn::Load(d, exps + i));
      total = hn::Add(total, sum);
    }
    return Sum(d, total);
  }

  const int64_t n_, k_;
  int64_t group_ = kMaxLanes;  // neighbours, a power of two
  bool grouped_ = false;
  RowWalk walk_;
  std::vector<float> maxima_, sorted_maxima_, values_;
  std::vector<uint64_t> keys_;
  float tail_ = 0;
};

int64_t LargestRows(const float* logits, int64_t rows, int64_t columns, double temperature,
                    int64_t k, int32_t* index, const ProbabilityTarget& value, float* tail) {
  const FlushDenormals flush;
  TopK top(columns, temperature, k);
  for (int64_t row = 0; row < rows; ++row) {
    if (!top.Take(logits + row * columns)) return row;
    if (index != nullptr) {
      for (int64_t i = 0; i < k; ++i) index[row * k + i] = top.Index(i);
    }
    if (value.data != nullptr) StoreProbabilities(top.values().data(), k, value, row * k);
    if (tail != nullptr) tail[row] = top.tail();
  }
  return -1;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace codistill {
namespace internal {

HWY_EXPORT(Softmax);
HWY_EXPORT(Sigmoid);
HWY_EXPORT(LargestRows);

int64_t SoftmaxRows(const float* logits, int64_t rows, int64_t columns, double temperature,
                    const ProbabilityTarget& to) {
  return HWY_DYNAMIC_DISPATCH(Softmax)(logits, rows, columns, temperature, to);
}

int64_t SigmoidRows(const float* logits, int64_t rows, int64_t columns, double temperature,
                    const ProbabilityTarget& to) {
  return HWY_DYNAMIC_DISPATCH(Sigmoid)(logits, rows, columns, temperature, to);
}

int64_t TopKRows(const float* logits, int64_t rows, int64_t columns, double temperature, int64_t k,
                 int32_t* index, const ProbabilityTarget& value, float* tail) {
  return HWY_DYNAMIC_DISPATCH(LargestRows)(logits, rows, columns, temperature, k, index, value,
                                           tail);
}

}  // namespace internal
}  // namespace codistill
#endif  // HWY_ONCE
