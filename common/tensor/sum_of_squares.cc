#include "common/tensor/sum_of_squares.h"

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "common/tensor/sum_of_squares.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Sums that do not wait for one another. As many for every vector length: a product of two floats
// is exact in double, so the result is the same to the bit on every processor.
constexpr int64_t kSums = 32;
constexpr int64_t kAhead = 1024;

double Squares(const float* values, int64_t n) {
  using D = hn::CappedTag<double, 8>;
  const D d;
  const hn::Rebind<float, D> f;
  constexpr int64_t kLanes = hn::MaxLanes(D());
  constexpr int64_t kVectors = kSums / kLanes;
  hn::Vec<D> sums[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) sums[v] = hn::Zero(d);
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    // Far ahead: one core's own prefetching leaves a third of what the memory could bring.
    hwy::Prefetch(values + i + kAhead);
    hwy::Prefetch(values + i + kAhead + 16);
    for (int64_t v = 0; v < kVectors; ++v) {
      const auto x = hn::PromoteTo(d, hn::LoadU(f, values + i + v * kLanes));
      sums[v] = hn::MulAdd(x, x, sums[v]);
    }
  }
  HWY_ALIGN double lanes[kSums];
  for (int64_t v = 0; v < kVectors; ++v) hn::Store(sums[v], d, lanes + v * kLanes);
  for (; i < n; ++i) lanes[i % kSums] += static_cast<double>(values[i]) * values[i];
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace codistill {
namespace internal {

HWY_EXPORT(Squares);

}  // namespace internal

double SumOfSquares(const float* values, int64_t n) {
  return HWY_DYNAMIC_DISPATCH(internal::Squares)(values, n);
}

}  // namespace codistill
#endif
