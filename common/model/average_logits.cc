#include "common/model/average_logits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "common/model/average_logits.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using V32 = hn::Vec<F32>;

// The first `count` elements, and `rest` in the others.
V32 LoadSome(F32 d, const float* from, int64_t count, V32 rest) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  if (count >= lanes) return hn::LoadU(d, from);
  HWY_ALIGN float part[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(rest, d, part);
  std::copy(from, from + count, part);
  return hn::Load(d, part);
}

void StoreSome(F32 d, V32 value, int64_t count, float* to) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  if (count >= lanes) {
    hn::StoreU(value, d, to);
    return;
  }
  HWY_ALIGN float part[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(value, d, part);
  std::copy(part, part + count, to);
}

void Mean(absl::Span<const float* const> members, int64_t n, float* out) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const V32 share = hn::Set(d, 1.0f / static_cast<float>(members.size()));
  for (int64_t i = 0; i < n; i += lanes) {
    V32 sum = hn::Zero(d);
    for (const float* z : members) sum = hn::Add(sum, LoadSome(d, z + i, n - i, hn::Zero(d)));
    StoreSome(d, hn::Mul(sum, share), n - i, out + i);
  }
}

// 0 for what is too small, and a NaN stays one; hn::Exp makes 0 of it.
V32 ExpOf(F32 d, V32 x) { return hn::IfThenElse(hn::Eq(x, x), hn::Exp(d, x), x); }

float LogSumExp(const float* z, int64_t n) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const V32 none = hn::Set(d, -std::numeric_limits<float>::infinity());
  V32 largest = none;
  for (int64_t i = 0; i < n; i += lanes) {
    largest = hn::Max(largest, LoadSome(d, z + i, n - i, none));
  }
  const V32 top = hn::MaxOfLanes(d, largest);
  V32 sum = hn::Zero(d);
  for (int64_t i = 0; i < n; i += lanes) {
    const V32 x = hn::Sub(LoadSome(d, z + i, n - i, none), top);
    sum = hn::Add(sum, ExpOf(d, x));
  }
  return hn::GetLane(top) + std::log(hn::GetLane(hn::SumOfLanes(d, sum)));
}

void Softmax(absl::Span<const float* const> members, int64_t rows, int64_t columns, float* out) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const V32 share = hn::Set(d, 1.0f / static_cast<float>(members.size()));
  const V32 smallest = hn::Set(d, std::numeric_limits<float>::min());
  std::vector<float> normaliser(members.size());
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * columns;
    for (size_t m = 0; m < members.size(); ++m) {
      normaliser[m] = LogSumExp(members[m] + at, columns);
    }
    for (int64_t i = 0; i < columns; i += lanes) {
      V32 sum = hn::Zero(d);
      for (size_t m = 0; m < members.size(); ++m) {
        const V32 x = hn::Sub(LoadSome(d, members[m] + at + i, columns - i, hn::Zero(d)),
                              hn::Set(d, normaliser[m]));
        sum = hn::Add(sum, ExpOf(d, x));
      }
      const V32 p = hn::Mul(sum, share);
      // Not Max, which would make a number of a NaN.
      const V32 kept = hn::IfThenElse(hn::Lt(p, smallest), smallest, p);
      StoreSome(d, hn::IfThenElse(hn::Eq(p, p), hn::Log(d, kept), p), columns - i, out + at + i);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace codistill {
namespace internal {
HWY_EXPORT(Mean);
HWY_EXPORT(Softmax);
}  // namespace internal

void AverageLogits(absl::Span<const float* const> members, int64_t rows, int64_t columns,
                   float* out) {
  using namespace internal;
  HWY_DYNAMIC_DISPATCH(Mean)(members, rows * columns, out);
}

void AverageSoftmax(absl::Span<const float* const> members, int64_t rows, int64_t columns,
                    float* out) {
  using namespace internal;
  HWY_DYNAMIC_DISPATCH(Softmax)(members, rows, columns, out);
}

namespace {

// log(sum(exp(sign * z))) over the members, at `i`.
double LogOfSum(absl::Span<const float* const> members, int64_t i, double sign) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (const float* z : members) top = std::max(top, sign * z[i]);
  for (const float* z : members) sum += std::exp(sign * z[i] - top);
  return top + std::log(sum);
}

}  // namespace

void AverageSigmoid(absl::Span<const float* const> members, int64_t rows, int64_t columns,
                    float* out) {
  // One column as a rule: nothing to vectorise.
  for (int64_t i = 0; i < rows * columns; ++i) {
    double yes = 0, no = 0;
    for (const float* z : members) {
      // Each from its own exponential, so that the smaller of the two keeps its digits.
      yes += 1 / (1 + std::exp(-static_cast<double>(z[i])));
      no += 1 / (1 + std::exp(static_cast<double>(z[i])));
    }
    // What is next to nothing for every member is its exponential.
    constexpr double kLeast = 1e-300;
    const double log_yes = yes < kLeast ? LogOfSum(members, i, 1) : std::log(yes);
    const double log_no = no < kLeast ? LogOfSum(members, i, -1) : std::log(no);
    out[i] = static_cast<float>(log_yes - log_no);
  }
}

}  // namespace codistill
#endif  // HWY_ONCE
