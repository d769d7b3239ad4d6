// Walks over rows of logits for the kernels that answer with probabilities. Included once per
// instruction set.

#if defined(CODISTILL_CUDA_ROW_WALK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CODISTILL_CUDA_ROW_WALK_INL_H_
#undef CODISTILL_CUDA_ROW_WALK_INL_H_
#else
#define CODISTILL_CUDA_ROW_WALK_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "cuda/row_softmax-inl.h"
#include "hwy/highway.h"

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
HWY_INLINE float Spoilt(const float* HWY_RESTRICT x, int64_t n) {
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  V32 sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) sum = hn::MulAdd(hn::LoadU(d, x + i), hn::Zero(d), sum);
  float spoilt = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < n; ++i) spoilt += x[i] * 0.0f;
  return spoilt;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#endif  // CODISTILL_CUDA_ROW_WALK_INL_H_
