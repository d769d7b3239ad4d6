// The loops of the softmax loss: exponentials of a row with their sums, and the gradient of the row
// before, one at a time or together. Included once per instruction set.

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
  double exps, moment;
};

// Exponentials of some elements and their sums, in registers.
template <bool kSubtractBase, Moment kMoment>
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
        exps_total_(hn::Zero(d_)),
        moment_total_(hn::Zero(d_)) {}

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
    exps_ = moment_ = hn::Zero(d_);
  }

  // After the last Fold().
  ChunkSums Sums() const {
    ChunkSums sums;
    sums.max = hn::GetLane(hn::MaxOfLanes(d_, max_));
    sums.exps = Sum(d_, exps_total_);
    sums.moment = Sum(d_, moment_total_);
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
  V32 max_, exps_, moment_, exps_total_, moment_total_;
};

template <bool kSubtractBase, Moment kMoment>
ChunkSums ExpOfChunk(const Scaling& scaling, const float* HWY_RESTRICT x,
                     const float* HWY_RESTRICT z, int64_t n, float x_origin, float z_origin,
                     float* HWY_RESTRICT e) {
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  Exponentials<kSubtractBase, kMoment> sums(scaling, x_origin, z_origin);
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
  RowSoftmax(float temperature, int64_t classes)
      : exps_(hwy::AllocateAligned<float>(classes + kMaxLanes)),
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
    sum_ = moment_ = 0;
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
    if (std::isfinite(sums.max) && height - scaling_.reference > kHeadroom) {
      const double before = LogReference();
      SetReference(sums.max);
      const double shrink = std::exp2(before - LogReference());
      sum_ *= shrink;
      if (moment != Moment::kLogits) moment_ *= shrink;
      sums = ChunkOf(moment, begin, n, z, z_origin);
    }
    references_[begin / kChunk] = LogReference();
    max_ = HWY_MAX(max_, sums.max);
    sum_ += sums.exps;
    moment_ += sums.moment;
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

  const float* x() const { return x_; }
  float* exps() { return exps_.get(); }
  const float* exps() const { return exps_.get(); }
  double sum() const { return sum_; }  // of the exponentials
  double moment() const { return moment_; }
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

  template <bool kSubtractBase>
  ChunkSums ChunkOf(Moment moment, const float* x, const float* z, int64_t n, float z_origin,
                    float* e) const {
    switch (moment) {
      case Moment::kStudent:
        return ExpOfChunk<kSubtractBase, Moment::kStudent>(scaling_, x, z, n, origin_, z_origin, e);
      case Moment::kDifference:
        return ExpOfChunk<kSubtractBase, Moment::kDifference>(scaling_, x, z, n, origin_, z_origin,
                                                              e);
      case Moment::kLogits:
        return ExpOfChunk<kSubtractBase, Moment::kLogits>(scaling_, x, z, n, origin_, z_origin, e);
      default:
        return ExpOfChunk<kSubtractBase, Moment::kNone>(scaling_, x, z, n, origin_, z_origin, e);
    }
  }

  ChunkSums ChunkOf(Moment moment, int64_t begin, int64_t n, const float* z, float z_origin) {
    const float* x = x_ + begin;
    z += begin;
    float* e = &exps_[begin];
    return !kFusedMulAdd || scaling_.base != 0 ? ChunkOf<true>(moment, x, z, n, z_origin, e)
                                               : ChunkOf<false>(moment, x, z, n, z_origin, e);
  }

  hwy::AlignedFreeUniquePtr<float[]> exps_;
  std::vector<double> references_;  // LogReference() of every chunk's exponentials
  Scaling scaling_ = {0, 0, 0};
  const float* x_ = nullptr;
  float origin_ = 0, max_ = 0;
  double sum_ = 0, moment_ = 0;
};

// A term of the gradient: scale * values[i].
struct Term {
  float* values;
  float scale;
};

// Writes one row's gradient, scale * (a + b) - uniform, from front to back in as many portions as
// the caller likes. The terms' values must stay until Finish().
class GradientWriter {
 public:
  // `b` may have null values. Terms may be read a vector past n.
  void Start(const Term& a, const Term& b, float uniform, float scale, float* out, int64_t n,
             bool bypass_cache) {
    a_ = a.values;
    b_ = b.values != nullptr ? b.values : a.values;
    scale_a_ = a.scale * scale;
    scale_b_ = b.values != nullptr ? b.scale * scale : 0;
    uniform_ = uniform;
    out_ = out;
    n_ = n;
    bypass_cache_ = bypass_cache;
    const int64_t lanes = hn::Lanes(F32());
    const int64_t off = reinterpret_cast<uintptr_t>(out) / sizeof(float) % lanes;
    position_ = off == 0 ? 0 : HWY_MIN(n, lanes - off);  // from here on stores are aligned
    if (position_ > 0) Partial(0, position_);
  }

  // Whole vectors left.
  int64_t vectors() const { return (n_ - position_) / static_cast<int64_t>(hn::Lanes(F32())); }

  void Finish() {
    Portion portion(this);
    for (int64_t i = vectors(); i > 0; --i) portion.Next();
    portion.Done();
    if (position_ < n_) Partial(position_, n_ - position_);
    position_ = n_;
  }

  // A run of vectors, held in registers.
  class Portion {
   public:
    explicit Portion(GradientWriter* writer)
        : writer_(writer),
          a_(writer->a_ + writer->position_),
          b_(writer->b_ + writer->position_),
          out_(writer->out_ + writer->position_),
          bypass_cache_(writer->bypass_cache_),
          scale_a_(hn::Set(d_, writer->scale_a_)),
          scale_b_(hn::Set(d_, writer->scale_b_)),
          uniform_(hn::Set(d_, writer->uniform_)) {}

    HWY_INLINE void Next() {
      const V32 v = hn::MulAdd(hn::LoadU(d_, b_), scale_b_,
                               hn::MulSub(hn::LoadU(d_, a_), scale_a_, uniform_));
      if (bypass_cache_) {
        hn::Stream(v, d_, out_);
      } else {
        hn::Store(v, d_, out_);
      }
      const int64_t lanes = hn::Lanes(d_);
      a_ += lanes;
      b_ += lanes;
      out_ += lanes;
    }

    void Done() { writer_->position_ = out_ - writer_->out_; }

   private:
    const F32 d_{};
    GradientWriter* const writer_;
    const float* HWY_RESTRICT a_;
    const float* HWY_RESTRICT b_;
    float* HWY_RESTRICT out_;
    const bool bypass_cache_;
    const V32 scale_a_, scale_b_, uniform_;
  };

 private:
  void Partial(int64_t i, int64_t count) const {
    const F32 d;
    const V32 a = hn::MulSub(hn::LoadU(d, a_ + i), hn::Set(d, scale_a_), hn::Set(d, uniform_));
    StorePartial(d, hn::MulAdd(hn::LoadU(d, b_ + i), hn::Set(d, scale_b_), a), out_ + i, count);
  }

  const float* a_ = nullptr;
  const float* b_ = nullptr;
  float scale_a_ = 0, scale_b_ = 0, uniform_ = 0;
  float* out_ = nullptr;
  int64_t position_ = 0, n_ = 0;
  bool bypass_cache_ = false;
};

// A chunk of the student and, with kTeach, of its teacher, while `gradient` writes another row.
template <bool kTeach, Moment kStudentMoment, Moment kTeacherMoment>
void ExtendTogether(int64_t begin, int64_t n, RowSoftmax* student, RowSoftmax* teacher,
                    GradientWriter* gradient) {
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  const float* HWY_RESTRICT z = student->x() + begin;
  const float* HWY_RESTRICT t = kTeach ? teacher->x() + begin : z;
  float* HWY_RESTRICT z_exps = student->exps() + begin;
  float* HWY_RESTRICT t_exps = kTeach ? teacher->exps() + begin : nullptr;
  const float z_origin = student->origin();
  const float t_origin = kTeach ? teacher->origin() : 0;
  Exponentials<!kFusedMulAdd, kStudentMoment> p(student->scaling(), z_origin, 0);
  Exponentials<!kFusedMulAdd, kTeacherMoment> q(kTeach ? teacher->scaling() : student->scaling(),
                                                t_origin, z_origin);
  GradientWriter::Portion portion(gradient);
  const int64_t whole = n / lanes * lanes;
  const int64_t both = HWY_MIN(whole, gradient->vectors() * lanes);
  int64_t i = 0;
  while (i < whole) {
    // The gradient's row, having begun with a partial vector, may end one earlier than this one.
    // That must not move the borders of blocks, on which the last bits of the sums depend.
    const bool write = i < both;
    const int64_t block_end = HWY_MIN((i / kBlock + 1) * kBlock, whole);
    const int64_t end = write ? HWY_MIN(block_end, both) : block_end;
    for (; i < end; i += lanes) {
      if (write) portion.Next();
      hwy::Prefetch(z + i + kPrefetch);
      const V32 z_v = hn::LoadU(d, z + i);
      const V32 z_e = p.Exp(z_v);
      hn::Store(z_e, d, z_exps + i);
      p.Add(z_v, z_v, z_e);
      if (kTeach) {
        hwy::Prefetch(t + i + kPrefetch);
        const V32 t_v = hn::LoadU(d, t + i);
        const V32 t_e = q.Exp(t_v);
        hn::Store(t_e, d, t_exps + i);
        q.Add(t_v, z_v, t_e);
      }
    }
    if (i == block_end) {
      p.Fold();
      if (kTeach) q.Fold();
    }
  }
  portion.Done();
  if (i < n) {
    p.Tail(z + i, z + i, n - i, z_exps + i);
    if (kTeach) q.Tail(t + i, z + i, n - i, t_exps + i);
  }
  student->Take(kStudentMoment, begin, n, student->x(), 0, p.Sums());
  if (kTeach) teacher->Take(kTeacherMoment, begin, n, student->x(), z_origin, q.Sums());
}

template <Moment kStudentMoment>
void ExtendTogether(int64_t begin, int64_t n, Moment teacher_moment, RowSoftmax* student,
                    RowSoftmax* teacher, GradientWriter* gradient) {
  if (teacher == nullptr) {
    ExtendTogether<false, kStudentMoment, Moment::kNone>(begin, n, student, teacher, gradient);
  } else if (teacher_moment == Moment::kDifference) {
    ExtendTogether<true, kStudentMoment, Moment::kDifference>(begin, n, student, teacher, gradient);
  } else {
    ExtendTogether<true, kStudentMoment, Moment::kStudent>(begin, n, student, teacher, gradient);
  }
}

// Takes n elements from `begin` into `student` and, unless null, `teacher`, both fast(), while
// `gradient` writes another row.
inline void ExtendTogether(int64_t begin, int64_t n, Moment student_moment, Moment teacher_moment,
                           RowSoftmax* student, RowSoftmax* teacher, GradientWriter* gradient) {
  if (student_moment == Moment::kLogits) {
    ExtendTogether<Moment::kLogits>(begin, n, teacher_moment, student, teacher, gradient);
  } else {
    ExtendTogether<Moment::kNone>(begin, n, teacher_moment, student, teacher, gradient);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#endif  // CODISTILL_CUDA_ROW_SOFTMAX_INL_H_
