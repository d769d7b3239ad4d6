// Softmaxes of rows: exponentials with their sums, and the sums over probabilities that came as
// such. Included once per instruction set.

#if defined(CODISTILL_CUDA_ROW_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CODISTILL_CUDA_ROW_SOFTMAX_INL_H_
#undef CODISTILL_CUDA_ROW_SOFTMAX_INL_H_
#else
#define CODISTILL_CUDA_ROW_SOFTMAX_INL_H_
#endif

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/simd_math-inl.h"
#include "hwy/aligned_allocator.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

constexpr int64_t kChunk = 4096;     // elements between looks at the reference
constexpr int64_t kBlock = 512;      // elements summed one after the other, to round less often
constexpr int64_t kPrefetch = 1024;  // elements ahead
constexpr int64_t kFirstLook = 256;  // elements the first reference is taken from
constexpr double kHeadroom = 64;     // powers of two logits may lie above the reference
constexpr double kHeadroomOfSquares = 30;  // where squares of exponentials are summed, too
constexpr double kLargeReference = 1 << 20;
constexpr double kLog2E = 1.442695040888963407359924681;
constexpr double kLn2 = 0.693147180559945309417232121;

// What a walk sums besides exponentials.
enum class Moment {
  kNone,
  kStudent,     // e * (z - z_origin): for the cross-entropy
  kDifference,  // e * ((x - x_origin) - (z - z_origin)): for the divergence, exactly 0 for equals
  kLogits,      // x - x_origin: for label smoothing
};

HWY_INLINE float MaxOf(const float* x, int64_t n) {
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  V32 max = hn::Set(d, -FLT_MAX);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) max = hn::Max(max, hn::LoadU(d, x + i));
  if (i < n) max = hn::Max(max, LoadPartial(d, x + i, n - i));
  return hn::GetLane(hn::MaxOfLanes(d, max));
}

// How logits become exponentials: e = 2^(k (x - base) - reference), reference an integer.
struct Scaling {
  float k;     // log2(e) / T
  float base;  // 0, or subtracted first to keep the low bits of x
  float reference;
};

struct ChunkSums {
  float max;
  double exps, moment, squares;
};

// Exponentials of some elements and their sums, in registers. kSquares: of their squares too.
template <bool kSubtractBase, Moment kMoment, bool kSquares>
class Exponentials {
 public:
  Exponentials(const Scaling& scaling, float x_origin, float z_origin)
      : k_(hn::Set(d_, scaling.k)),
        base_(hn::Set(d_, scaling.base)),
        // A step more than the least power that is not denormal, for the rounding of the quotient.
        lowest_(hn::Set(d_, (scaling.reference - 125.0f) / scaling.k)),
        magic_(hn::Set(d_, kRoundToExponent - scaling.reference)),
        x_origin_(hn::Set(d_, x_origin)),
        z_origin_(hn::Set(d_, z_origin)),
        max_(hn::Set(d_, -FLT_MAX)),
        exps_(hn::Zero(d_)),
        moment_(hn::Zero(d_)),
        squares_(hn::Zero(d_)),
        exps_total_(hn::Zero(d_)),
        moment_total_(hn::Zero(d_)),
        squares_total_(hn::Zero(d_)) {}

  HWY_INLINE V32 Exp(V32 x) const {
    if (kSubtractBase) x = hn::Sub(x, base_);
    x = ClampKeepingNan(d_, lowest_, x);
    // The reference is folded into the rounding constant: the nearest integer of k x comes out of
    // two operations and, fused, what is left of k x out of one more, without loss.
    const V32 shifted = hn::MulAdd(x, k_, magic_);
    const V32 r = hn::MulSub(x, k_, hn::Sub(shifted, magic_));
    return Power(d_, shifted, r);
  }

  HWY_INLINE void Add(V32 x, V32 z, V32 e) {
    max_ = hn::Max(max_, x);
    exps_ = hn::Add(exps_, e);
    if (kSquares) squares_ = hn::MulAdd(e, e, squares_);
    if (kMoment == Moment::kStudent) {
      moment_ = hn::MulAdd(e, hn::Sub(z, z_origin_), moment_);
    } else if (kMoment == Moment::kDifference) {
      moment_ = hn::MulAdd(e, hn::Sub(hn::Sub(x, x_origin_), hn::Sub(z, z_origin_)), moment_);
    } else if (kMoment == Moment::kLogits) {
      moment_ = hn::Add(moment_, hn::Sub(x, x_origin_));
    }
  }

  // At the end of every block.
  HWY_INLINE void Fold() {
    exps_total_ = hn::Add(exps_total_, exps_);
    moment_total_ = hn::Add(moment_total_, moment_);
    squares_total_ = hn::Add(squares_total_, squares_);
    exps_ = moment_ = squares_ = hn::Zero(d_);
  }

  // After the last Fold().
  ChunkSums Sums() const {
    ChunkSums sums;
    sums.max = hn::GetLane(hn::MaxOfLanes(d_, max_));
    sums.exps = Sum(d_, exps_total_);
    sums.moment = Sum(d_, moment_total_);
    sums.squares = kSquares ? Sum(d_, squares_total_) : 0;
    return sums;
  }

  // The last, partial vector of a row: stores a whole one, 0 beyond `count`.
  HWY_INLINE void Tail(const float* x, const float* z, int64_t count, float* e) {
    const auto real = hn::FirstN(d_, count);
    const V32 v = LoadPartial(d_, x, count);
    const V32 exp = hn::IfThenElseZero(real, Exp(v));
    hn::Store(exp, d_, e);
    const V32 before = moment_;
    Add(v, LoadPartial(d_, z, count), exp);
    moment_ = hn::IfThenElse(real, moment_, before);
    Fold();
  }

 private:
  const F32 d_{};
  const V32 k_, base_, lowest_, magic_, x_origin_, z_origin_;
  V32 max_, exps_, moment_, squares_, exps_total_, moment_total_, squares_total_;
};

template <bool kSubtractBase, Moment kMoment, bool kSquares>
ChunkSums ExpOfChunk(const Scaling& scaling, const float* HWY_RESTRICT x,
                     const float* HWY_RESTRICT z, int64_t n, float x_origin, float z_origin,
                     float* HWY_RESTRICT e) {
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  Exponentials<kSubtractBase, kMoment, kSquares> sums(scaling, x_origin, z_origin);
  int64_t i = 0;
  for (const int64_t whole = n / lanes * lanes; i < whole; sums.Fold()) {
    for (const int64_t end = HWY_MIN(i + kBlock, whole); i < end; i += lanes) {
      hwy::Prefetch(x + i + kPrefetch);
      const V32 v = hn::LoadU(d, x + i);
      const V32 exp = sums.Exp(v);
      hn::Store(exp, d, e + i);
      sums.Add(v, hn::LoadU(d, z + i), exp);
    }
  }
  if (i < n) sums.Tail(x + i, z + i, n - i, e + i);
  return sums.Sums();
}

// Softmax of one row's logits at one temperature: exponentials relative to a reference that may
// rise from chunk to chunk, and their sums.
class RowSoftmax {
 public:
  // `squares`: the sum of the exponentials' squares is wanted too, which belongs to the softmax at
  // half the temperature.
  RowSoftmax(float temperature, int64_t classes, bool squares = false)
      : squares_wanted_(squares),
        exps_(hwy::AllocateAligned<float>(classes + kMaxLanes)),
        references_((classes + kChunk - 1) / kChunk) {
    scaling_.k = static_cast<float>(kLog2E / temperature);
  }

  void Start(const float* x, int64_t n) {
    x_ = x;
    const float look = MaxOf(x, HWY_MIN(n, kFirstLook));
    // Of logits that are not finite the sums are not either, whatever the reference.
    origin_ = std::isfinite(look) ? look : 0;
    SetReference(origin_);
    max_ = -FLT_MAX;
    sum_ = moment_ = squares_ = 0;
  }

  // Takes in n elements from `begin`, a multiple of kChunk.
  void Extend(Moment moment, int64_t begin, int64_t n, const float* z, float z_origin) {
    ChunkSums sums = ChunkOf(moment, begin, n, z, z_origin);
    Take(moment, begin, n, z, z_origin, sums);
  }

  // Adds the sums of a chunk whose exponentials are in place; computes it again if they overflowed.
  void Take(Moment moment, int64_t begin, int64_t n, const float* z, float z_origin,
            ChunkSums sums) {
    const double height = (static_cast<double>(sums.max) - scaling_.base) * scaling_.k;
    if (std::isfinite(sums.max) &&
        height - scaling_.reference > (squares_wanted_ ? kHeadroomOfSquares : kHeadroom)) {
      const double before = LogReference();
      SetReference(sums.max);
      const double shrink = std::exp2(before - LogReference());
      sum_ *= shrink;
      squares_ *= shrink * shrink;
      if (moment != Moment::kLogits) moment_ *= shrink;
      sums = ChunkOf(moment, begin, n, z, z_origin);
    }
    references_[begin / kChunk] = LogReference();
    max_ = HWY_MAX(max_, sums.max);
    sum_ += sums.exps;
    moment_ += sums.moment;
    squares_ += sums.squares;
  }

  // After the last chunk: makes all exponentials relative to the last reference.
  void Finish(int64_t n) {
    const F32 d;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      const double factor = std::exp2(references_[begin / kChunk] - LogReference());
      if (factor == 1 || std::isnan(factor)) continue;
      const V32 scale = hn::Set(d, static_cast<float>(factor));
      for (int64_t i = begin; i < HWY_MIN(begin + kChunk, n); i += hn::Lanes(d)) {
        hn::Store(hn::Mul(hn::Load(d, &exps_[i]), scale), d, &exps_[i]);
      }
    }
  }

  // log sum exp(x / T) - origin / T.
  double LogSumExp() const {
    return (std::log2(sum_) + LogReference() - static_cast<double>(origin_) * scaling_.k) * kLn2;
  }

  // log sum exp(2 x / T) - 2 origin / T, from the squares.
  double LogSumExpOfSquares() const {
    return (std::log2(squares_) +
            2 * (LogReference() - static_cast<double>(origin_) * scaling_.k)) *
           kLn2;
  }

  const float* x() const { return x_; }
  float* exps() { return exps_.get(); }
  const float* exps() const { return exps_.get(); }
  double sum() const { return sum_; }  // of the exponentials
  double moment() const { return moment_; }
  double squares() const { return squares_; }  // sum of their squares
  bool squares_wanted() const { return squares_wanted_; }
  float max() const { return max_; }
  float origin() const { return origin_; }  // a typical logit of the row
  const Scaling& scaling() const { return scaling_; }
  // Whether the scaling needs no base, as ExtendTogether requires.
  bool fast() const { return !kFusedMulAdd || scaling_.base == 0; }

 private:
  // Makes `logit` the reference.
  void SetReference(float logit) {
    const double height = static_cast<double>(logit) * scaling_.k;
    // The sum of a large reference and the rounding constant would not be exact.
    const bool subtract = !kFusedMulAdd || std::abs(height) >= kLargeReference;
    scaling_.base = subtract ? logit : 0;
    scaling_.reference = subtract ? 0 : static_cast<float>(std::nearbyint(height));
  }

  // What the exponentials are relative to, as a power of two.
  double LogReference() const {
    return static_cast<double>(scaling_.base) * scaling_.k + scaling_.reference;
  }

  template <bool kSubtractBase, bool kSquares>
  ChunkSums ChunkOf(Moment moment, const float* x, const float* z, int64_t n, float z_origin,
                    float* e) const {
    switch (moment) {
      case Moment::kStudent:
        return ExpOfChunk<kSubtractBase, Moment::kStudent, false>(scaling_, x, z, n, origin_,
                                                                  z_origin, e);
      case Moment::kDifference:
        return ExpOfChunk<kSubtractBase, Moment::kDifference, false>(scaling_, x, z, n, origin_,
                                                                     z_origin, e);
      case Moment::kLogits:
        return ExpOfChunk<kSubtractBase, Moment::kLogits, kSquares>(scaling_, x, z, n, origin_,
                                                                    z_origin, e);
      default:
        return ExpOfChunk<kSubtractBase, Moment::kNone, kSquares>(scaling_, x, z, n, origin_,
                                                                  z_origin, e);
    }
  }

  ChunkSums ChunkOf(Moment moment, int64_t begin, int64_t n, const float* z, float z_origin) {
    const float* x = x_ + begin;
    z += begin;
    float* e = &exps_[begin];
    const bool subtract = !kFusedMulAdd || scaling_.base != 0;
    if (squares_wanted_) {
      return subtract ? ChunkOf<true, true>(moment, x, z, n, z_origin, e)
                      : ChunkOf<false, true>(moment, x, z, n, z_origin, e);
    }
    return subtract ? ChunkOf<true, false>(moment, x, z, n, z_origin, e)
                    : ChunkOf<false, false>(moment, x, z, n, z_origin, e);
  }

  bool squares_wanted_;
  hwy::AlignedFreeUniquePtr<float[]> exps_;
  std::vector<double> references_;  // LogReference() of every chunk's exponentials
  Scaling scaling_ = {0, 0, 0};
  const float* x_ = nullptr;
  float origin_ = 0, max_ = 0;
  double sum_ = 0, moment_ = 0, squares_ = 0;
};

// Sums over probabilities, in registers.
class ProbabilitySums {
 public:
  explicit ProbabilitySums(float z_origin)
      : z_origin_(hn::Set(d_, z_origin)),
        min_(hn::Zero(d_)),
        sum_(hn::Zero(d_)),
        moment_(hn::Zero(d_)),
        sum_total_(hn::Zero(d_)),
        moment_total_(hn::Zero(d_)) {}

  HWY_INLINE void Add(V32 q, V32 z) {
    min_ = hn::Min(min_, q);
    sum_ = hn::Add(sum_, q);
    moment_ = hn::MulAdd(q, hn::Sub(z, z_origin_), moment_);
  }

  // At the end of every block.
  HWY_INLINE void Fold() {
    sum_total_ = hn::Add(sum_total_, sum_);
    moment_total_ = hn::Add(moment_total_, moment_);
    sum_ = moment_ = hn::Zero(d_);
  }

  // The last, partial vector of a row.
  HWY_INLINE void Tail(const float* q, const float* z, int64_t count) {
    Add(hn::IfThenElseZero(hn::FirstN(d_, count), LoadPartial(d_, q, count)),
        LoadPartial(d_, z, count));
    Fold();
  }

  // After the last Fold().
  float min() const { return hn::GetLane(hn::MinOfLanes(d_, min_)); }
  double sum() const { return Sum(d_, sum_total_); }
  double moment() const { return Sum(d_, moment_total_); }

 private:
  const F32 d_{};
  const V32 z_origin_;
  V32 min_, sum_, moment_, sum_total_, moment_total_;
};

// One row of a teacher that gives probabilities: what RowSoftmax is of one that gives logits.
class RowProbabilities {
 public:
  void Start(const float* q) {
    values_ = q;
    min_ = 0;
    sum_ = moment_ = 0;
  }

  // Takes in n elements from `begin`, a multiple of kChunk.
  void Extend(int64_t begin, int64_t n, const float* z, float z_origin) {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    const float* HWY_RESTRICT q = values_ + begin;
    z += begin;
    ProbabilitySums sums(z_origin);
    int64_t i = 0;
    for (const int64_t whole = n / lanes * lanes; i < whole; sums.Fold()) {
      for (const int64_t end = HWY_MIN(i + kBlock, whole); i < end; i += lanes) {
        hwy::Prefetch(q + i + kPrefetch);
        sums.Add(hn::LoadU(d, q + i), hn::LoadU(d, z + i));
      }
    }
    if (i < n) sums.Tail(q + i, z + i, n - i);
    Take(sums);
  }

  void Take(const ProbabilitySums& sums) {
    min_ = HWY_MIN(min_, sums.min());
    sum_ += sums.sum();
    moment_ += sums.moment();
  }

  const float* values() const { return values_; }  // to be divided by sum()
  double sum() const { return sum_; }
  double moment() const { return moment_; }  // sum of q (z - z_origin)
  float min() const { return min_; }         // the least of them that is negative; else 0

 private:
  const float* values_ = nullptr;
  float min_ = 0;
  double sum_ = 0, moment_ = 0;
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#endif  // CODISTILL_CUDA_ROW_SOFTMAX_INL_H_
