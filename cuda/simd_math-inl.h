// Vector pieces shared by the loss kernels. Included once per instruction set, by way of
// hwy/foreach_target.h; see Highway's README for the pattern.

#if defined(CODISTILL_CUDA_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CODISTILL_CUDA_SIMD_MATH_INL_H_
#undef CODISTILL_CUDA_SIMD_MATH_INL_H_
#else
#define CODISTILL_CUDA_SIMD_MATH_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"

#if HWY_ARCH_X86
#include <xmmintrin.h>
#endif

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

namespace hn = ::hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using V32 = hn::Vec<F32>;
constexpr int64_t kMaxLanes = hn::MaxLanes(F32());

// Whether MulAdd rounds once.
#if HWY_NATIVE_FMA && HWY_TARGET != HWY_EMU128 && HWY_TARGET != HWY_SCALAR
constexpr bool kFusedMulAdd = true;
#else
constexpr bool kFusedMulAdd = false;
#endif

// 1.5 * 2^23 + 127: added to a float, it leaves the nearest integer, plus 127, in the low bits of
// the sum, which makes them the exponent field of that power of two.
constexpr float kRoundToExponent = 12582912.0f + 127.0f;

// 2^(n + r) from `shifted` = n + kRoundToExponent, -126 <= n <= 127, and r in [-0.5, 0.5]; relative
// error below 3e-7. A NaN in r gives NaN.
HWY_INLINE V32 Power(F32 d, V32 shifted, V32 r) {
  const hn::RebindToSigned<F32> di;
  const V32 power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(di, shifted)));
  // Minimax of 2^r with value 1 at 0; relative error 9.2e-8.
  V32 p = hn::Set(d, 0.001326472731307149f);
  p = hn::MulAdd(p, r, hn::Set(d, 0.009671512991189957f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.05550733581185341f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.24022242426872253f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.6931470036506653f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  return hn::Mul(p, power);
}

// max(lowest, x), but NaN where x is NaN.
HWY_INLINE V32 ClampKeepingNan(F32 d, V32 lowest, V32 x) {
#if HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
  static_cast<void>(d);
  return hn::IfThenElse(hn::Lt(x, lowest), lowest, x);
#else
  static_cast<void>(d);
  return hn::Max(lowest, x);  // on x86 owing to the order
#endif
}

// 2^y for y <= 127; y under -126 counts as -126, so nothing is denormal. NaN and +inf give NaN.
// About half the work of hwy/contrib/math's Exp, whose range is wider.
HWY_INLINE V32 Exp2(F32 d, V32 y) {
  const V32 magic = hn::Set(d, kRoundToExponent);
  y = ClampKeepingNan(d, hn::Set(d, -126.0f), y);
  const V32 shifted = hn::Add(y, magic);
  return Power(d, shifted, hn::Sub(y, hn::Sub(shifted, magic)));
}

// A vector of which only the first `count` lanes exist in memory; the others repeat x[0].
HWY_INLINE V32 LoadPartial(F32 d, const float* x, int64_t count) {
  HWY_ALIGN float lanes[kMaxLanes];
  for (size_t i = 0; i < hn::Lanes(d); ++i) lanes[i] = x[static_cast<int64_t>(i) < count ? i : 0];
  return hn::Load(d, lanes);
}

HWY_INLINE void StorePartial(F32 d, V32 v, float* x, int64_t count) {
  HWY_ALIGN float lanes[kMaxLanes];
  hn::Store(v, d, lanes);
  for (int64_t i = 0; i < count; ++i) x[i] = lanes[i];
}

HWY_INLINE double Sum(F32 d, V32 v) {
  HWY_ALIGN float lanes[kMaxLanes];
  hn::Store(v, d, lanes);
  double sum = 0;
  for (size_t i = 0; i < hn::Lanes(d); ++i) sum += lanes[i];
  return sum;
}

// While alive, results too small for a normal float are zero on this thread. They cannot matter in
// a gradient, and computing with denormals costs a hundred cycles each.
class FlushDenormals {
 public:
#if HWY_ARCH_X86
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#endif  // CODISTILL_CUDA_SIMD_MATH_INL_H_
