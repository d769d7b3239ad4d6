// The loops of the softmax loss that write gradients: of one row alone, or along with the
// exponentials of the next. Included once per instruction set.

#if defined(CODISTILL_CUDA_GRADIENT_WRITER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CODISTILL_CUDA_GRADIENT_WRITER_INL_H_
#undef CODISTILL_CUDA_GRADIENT_WRITER_INL_H_
#else
#define CODISTILL_CUDA_GRADIENT_WRITER_INL_H_
#endif

#include <cstdint>

#include "cuda/row_softmax-inl.h"
#include "cuda/simd_math-inl.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

// The gradient of one row before it is scaled: square * a^2 + linear * a + other * b - uniform, and
// at the label less still.
struct RowGradient {
  const float* a = nullptr;
  const float* b = nullptr;  // may be null
  double square = 0, linear = 0, other = 0;
  double uniform = 0;
  int64_t label = 0;
  double at_label = 0;
};

// Writes one row's gradient from front to back in as many portions as the caller likes. kSquare of
// portions says whether there is a square, with one that can be 0.
class GradientWriter {
 public:
  // a and b must stay until Finish().
  void Start(const RowGradient& row, double scale, float* out, int64_t n, bool bypass_cache) {
    row_ = row;
    scale_ = scale;
    a_ = row.a;
    b_ = row.b != nullptr ? row.b : row.a;
    square_ = static_cast<float>(row.square * scale);
    linear_ = static_cast<float>(row.linear * scale);
    other_ = row.b != nullptr ? static_cast<float>(row.other * scale) : 0;
    uniform_ = static_cast<float>(row.uniform * scale);
    out_ = out;
    n_ = n;
    bypass_cache_ = bypass_cache;
    open_ = true;
    const int64_t lanes = hn::Lanes(F32());
    const int64_t off = reinterpret_cast<uintptr_t>(out) / sizeof(float) % lanes;
    position_ = off == 0 ? 0 : HWY_MIN(n, lanes - off);  // from here on stores are aligned
    if (position_ > 0) Partial(0, position_);
  }

  // Whole vectors left.
  int64_t vectors() const { return (n_ - position_) / static_cast<int64_t>(hn::Lanes(F32())); }

  // False: there was no row.
  bool Finish() {
    if (!open_) return false;
    if (row_.square != 0) {
      WriteAll<true>();
    } else {
      WriteAll<false>();
    }
    if (position_ < n_) Partial(position_, n_ - position_);
    position_ = n_;
    const int64_t c = row_.label;
    const double a = row_.a[c];
    const double b = row_.b != nullptr ? row_.b[c] : 0;
    out_[c] = static_cast<float>(
        ((row_.square * a + row_.linear) * a + row_.other * b - row_.uniform - row_.at_label) *
        scale_);
    open_ = false;
    return true;
  }

  // A run of vectors, held in registers.
  template <bool kSquare>
  class Portion {
   public:
    explicit Portion(GradientWriter* writer)
        : writer_(writer),
          a_(writer->a_ + writer->position_),
          b_(writer->b_ + writer->position_),
          out_(writer->out_ + writer->position_),
          bypass_cache_(writer->bypass_cache_),
          square_(hn::Set(d_, writer->square_)),
          linear_(hn::Set(d_, writer->linear_)),
          other_(hn::Set(d_, writer->other_)),
          uniform_(hn::Set(d_, writer->uniform_)) {}

    HWY_INLINE void Next() {
      const V32 a = hn::LoadU(d_, a_);
      const V32 slope = kSquare ? hn::MulAdd(square_, a, linear_) : linear_;
      const V32 v = hn::MulAdd(hn::LoadU(d_, b_), other_, hn::MulSub(a, slope, uniform_));
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
    const V32 square_, linear_, other_, uniform_;
  };

 private:
  template <bool kSquare>
  void WriteAll() {
    Portion<kSquare> portion(this);
    for (int64_t i = vectors(); i > 0; --i) portion.Next();
    portion.Done();
  }

  void Partial(int64_t i, int64_t count) const {
    const F32 d;
    const V32 a = LoadPartial(d, a_ + i, count), b = LoadPartial(d, b_ + i, count);
    const V32 slope = hn::MulAdd(hn::Set(d, square_), a, hn::Set(d, linear_));
    const V32 v = hn::MulAdd(b, hn::Set(d, other_), hn::MulSub(a, slope, hn::Set(d, uniform_)));
    StorePartial(d, v, out_ + i, count);
  }

  RowGradient row_;
  double scale_ = 0;
  const float* a_ = nullptr;
  const float* b_ = nullptr;
  float square_ = 0, linear_ = 0, other_ = 0, uniform_ = 0;
  float* out_ = nullptr;
  int64_t position_ = 0, n_ = 0;
  bool bypass_cache_ = false, open_ = false;
};

enum class Teaching { kNone, kLogits, kProbabilities };

// A chunk of the student and of its teacher, of the kind kTeaching says, while `gradient` writes
// another row. kSquares: the student sums squares, and that gradient has them too.
template <Teaching kTeaching, Moment kStudentMoment, Moment kTeacherMoment, bool kSquares>
void ExtendChunk(int64_t begin, int64_t n, RowSoftmax* student, RowSoftmax* teacher,
                 RowProbabilities* probabilities, GradientWriter* gradient) {
  constexpr bool kLogits = kTeaching == Teaching::kLogits;
  constexpr bool kProbabilities = kTeaching == Teaching::kProbabilities;
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  const float* HWY_RESTRICT z = student->x() + begin;
  const float* HWY_RESTRICT t = (kLogits          ? teacher->x()
                                 : kProbabilities ? probabilities->values()
                                                  : student->x()) +
                                begin;
  float* HWY_RESTRICT z_exps = student->exps() + begin;
  float* HWY_RESTRICT t_exps = kLogits ? teacher->exps() + begin : nullptr;
  const float z_origin = student->origin();
  Exponentials<!kFusedMulAdd, kStudentMoment, kSquares> p(student->scaling(), z_origin, 0);
  Exponentials<!kFusedMulAdd, kTeacherMoment, false> q(
      kLogits ? teacher->scaling() : student->scaling(), kLogits ? teacher->origin() : 0, z_origin);
  ProbabilitySums given(z_origin);
  GradientWriter::Portion<kSquares> portion(gradient);
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
      if (kTeaching == Teaching::kNone) continue;
      hwy::Prefetch(t + i + kPrefetch);
      const V32 t_v = hn::LoadU(d, t + i);
      if (kLogits) {
        const V32 t_e = q.Exp(t_v);
        hn::Store(t_e, d, t_exps + i);
        q.Add(t_v, z_v, t_e);
      } else {
        given.Add(t_v, z_v);
      }
    }
    if (i == block_end) {
      p.Fold();
      if (kLogits) q.Fold();
      if (kProbabilities) given.Fold();
    }
  }
  portion.Done();
  if (i < n) {
    p.Tail(z + i, z + i, n - i, z_exps + i);
    if (kLogits) q.Tail(t + i, z + i, n - i, t_exps + i);
    if (kProbabilities) given.Tail(t + i, z + i, n - i);
  }
  student->Take(kStudentMoment, begin, n, student->x(), 0, p.Sums());
  if (kLogits) teacher->Take(kTeacherMoment, begin, n, student->x(), z_origin, q.Sums());
  if (kProbabilities) probabilities->Take(given);
}

template <Moment kStudentMoment, bool kSquares>
void ExtendFor(int64_t begin, int64_t n, Moment teacher_moment, RowSoftmax* student,
               RowSoftmax* teacher, RowProbabilities* probabilities, GradientWriter* gradient) {
  const auto extend =
      probabilities != nullptr
          ? ExtendChunk<Teaching::kProbabilities, kStudentMoment, Moment::kStudent, kSquares>
      : teacher == nullptr ? ExtendChunk<Teaching::kNone, kStudentMoment, Moment::kNone, kSquares>
      : teacher_moment == Moment::kDifference
          ? ExtendChunk<Teaching::kLogits, kStudentMoment, Moment::kDifference, kSquares>
          : ExtendChunk<Teaching::kLogits, kStudentMoment, Moment::kStudent, kSquares>;
  extend(begin, n, student, teacher, probabilities, gradient);
}

// Takes n elements from `begin` into `student` and, unless null, either `teacher` or
// `probabilities`, the softmaxes fast(), while `gradient` writes another row.
inline void ExtendTogether(int64_t begin, int64_t n, Moment student_moment, Moment teacher_moment,
                           RowSoftmax* student, RowSoftmax* teacher,
                           RowProbabilities* probabilities, GradientWriter* gradient) {
  const bool logits = student_moment == Moment::kLogits, squares = student->squares_wanted();
  const auto extend = logits && squares ? ExtendFor<Moment::kLogits, true>
                      : logits          ? ExtendFor<Moment::kLogits, false>
                      : squares         ? ExtendFor<Moment::kNone, true>
                                        : ExtendFor<Moment::kNone, false>;
  extend(begin, n, teacher_moment, student, teacher, probabilities, gradient);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#endif  // CODISTILL_CUDA_GRADIENT_WRITER_INL_H_
