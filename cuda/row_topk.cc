// A row is read from memory once. While a chunk of it is in the first-level cache its exponentials
// are taken and the largest logit of every group of neighbours is kept. The k-th largest of those
// maxima is a bound: at least k logits reach it, and few more do, so that only the groups that
// reach it are looked at again and a handful of candidates is sorted.

#include "cuda/row_topk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/parallel.h"
#include "common/base/status.h"
#include "cuda/number_target.h"

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cuda/row_topk.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "cuda/row_walk-inl.h"
#include "hwy/highway.h"

#ifndef CODISTILL_CUDA_ROW_TOPK_ONCE_
#define CODISTILL_CUDA_ROW_TOPK_ONCE_
namespace codistill {
namespace internal {

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
#endif  // CODISTILL_CUDA_ROW_TOPK_ONCE_

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

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

// Rows [begin, end). Returns the first with a logit that is not finite, -1 if there is none.
int64_t LargestRows(const RowTopKInputs& inputs, const RowTopKOutputs& outputs, int64_t begin,
                    int64_t end) {
  const FlushDenormals flush;
  const int64_t k = inputs.k;
  TopK top(inputs.classes, inputs.temperature, k);
  for (int64_t row = begin; row < end; ++row) {
    if (!top.Take(inputs.logits + row * inputs.classes)) return row;
    if (outputs.index != nullptr) {
      for (int64_t i = 0; i < k; ++i) outputs.index[row * k + i] = top.Index(i);
    }
    if (outputs.value != nullptr) {
      StoreNumbers(top.values().data(), k, {outputs.value, outputs.value_format}, row * k);
    }
    if (outputs.tail != nullptr) outputs.tail[row] = top.tail();
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

HWY_EXPORT(LargestRows);

namespace {

// Logits a thread should have, to be worth starting.
constexpr int64_t kLogitsPerThread = 128 << 10;

absl::Status Invalid(absl::string_view argument, const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat("row top-k: ", argument, " ", problem));
}

}  // namespace
}  // namespace internal

absl::Status TopKRowNotFinite(int64_t row) {
  return internal::Invalid("logits",
                           absl::StrCat("of row ", row, " has a number that is not finite"));
}

absl::Status ValidateRowTopK(const RowTopKInputs& inputs, const RowTopKOutputs& outputs) {
  if (inputs.rows < 0) {
    return internal::Invalid("rows", absl::StrCat("is ", inputs.rows, "; want 0 or more"));
  }
  if (inputs.classes < 1 || inputs.classes > kMaxTopKClasses) {
    return internal::Invalid("classes",
                             absl::StrCat("is ", inputs.classes, "; want 1 to ", kMaxTopKClasses));
  }
  if (inputs.k < 1 || inputs.k > inputs.classes) {
    return internal::Invalid(
        "k", absl::StrCat("is ", inputs.k, "; want 1 to the number of classes, ", inputs.classes));
  }
  if (!(inputs.temperature > 0 && std::isfinite(inputs.temperature))) {
    return internal::Invalid("temperature",
                             absl::StrCat("is ", inputs.temperature, "; want more than 0"));
  }
  if (outputs.value_format == NumberFormat::kInt8) {
    return internal::Invalid("value_format", "is int8; want one of float32, float16 and bfloat16");
  }
  if (inputs.rows > 0 && inputs.logits == nullptr) return internal::Invalid("logits", "is null");
  return absl::OkStatus();
}

absl::Status RowTopKCpu(const RowTopKInputs& inputs, const RowTopKOutputs& outputs, int threads,
                        int64_t* not_finite_row) {
  if (not_finite_row != nullptr) *not_finite_row = -1;
  CODISTILL_RETURN_IF_ERROR(ValidateRowTopK(inputs, outputs));
  // Where a range of rows begins: its first row that is not finite.
  std::vector<int64_t> bad(inputs.rows, -1);
  ParallelFor(threads, inputs.rows, 1 + internal::kLogitsPerThread / inputs.classes,
              [&](int64_t begin, int64_t end) {
                bad[begin] =
                    HWY_DYNAMIC_DISPATCH(internal::LargestRows)(inputs, outputs, begin, end);
              });
  for (const int64_t row : bad) {
    if (row < 0) continue;
    if (not_finite_row != nullptr) *not_finite_row = row;
    return TopKRowNotFinite(row);
  }
  return absl::OkStatus();
}

}  // namespace codistill
#endif  // HWY_ONCE
