#include "predserver/row_outputs.h"

#include <cmath>

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "predserver/row_outputs.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "cuda/row_walk-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

void Scale(float factor, float* HWY_RESTRICT x, int64_t n) {
  const F32 d;
  const V32 by = hn::Set(d, factor);
  for (int64_t i = 0; i < n; i += hn::Lanes(d))
    hn::Store(hn::Mul(hn::Load(d, x + i), by), d, x + i);
}

int64_t Softmax(const float* logits, int64_t rows, int64_t columns, double temperature,
                const NumberTarget& to) {
  const FlushDenormals flush;
  RowWalk walk(columns, temperature);
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = logits + row * columns;
    if (!walk.Take(x, [x](int64_t begin, int64_t count) { return Spoilt(x + begin, count); })) {
      return row;
    }
    Scale(static_cast<float>(1 / walk.sum()), walk.exps(), columns);
    StoreNumbers(walk.exps(), columns, to, row * columns);
  }
  return -1;
}

int64_t Sigmoid(const float* logits, int64_t rows, int64_t columns, double temperature,
                const NumberTarget& to) {
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
      StoreNumbers(scratch.get(), count, to, row * columns + begin);
    }
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

int64_t SoftmaxRows(const float* logits, int64_t rows, int64_t columns, double temperature,
                    const NumberTarget& to) {
  return HWY_DYNAMIC_DISPATCH(Softmax)(logits, rows, columns, temperature, to);
}

int64_t SigmoidRows(const float* logits, int64_t rows, int64_t columns, double temperature,
                    const NumberTarget& to) {
  return HWY_DYNAMIC_DISPATCH(Sigmoid)(logits, rows, columns, temperature, to);
}

}  // namespace internal
}  // namespace codistill
#endif  // HWY_ONCE
