// Sigmoid cross-entropy and squared error with distillation: the vector kernel. Every element is on
// its own, so rows are laid end to end and cut into blocks; a single-logit model fills vectors too.

#include <cmath>

#include "cuda/loss_kernels.h"

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cuda/elementwise_loss.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "cuda/simd_math-inl.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

// A binary decision: the probabilities of yes and no, and their logarithms.
struct Binary {
  V32 yes, no, log_yes, log_no;
};

Binary FromLogit(F32 d, V32 x) {
  const V32 zero = hn::Zero(d), one = hn::Set(d, 1.0f);
  // exp(-|x|) is safe whatever x, and both probabilities follow from it without cancellation.
  const V32 e = Exp2(d, hn::Mul(hn::Abs(x), hn::Set(d, -1.44269504f)));
  const V32 larger = hn::Div(one, hn::Add(one, e)), smaller = hn::Mul(e, larger);
  const V32 log_sum = hn::Log1p(d, e);
  const auto positive = hn::Ge(x, zero);
  Binary b;
  b.yes = hn::IfThenElse(positive, larger, smaller);
  b.no = hn::IfThenElse(positive, smaller, larger);
  b.log_yes = hn::Sub(hn::Min(x, zero), log_sum);
  b.log_no = hn::Sub(hn::Min(hn::Neg(x), zero), log_sum);
  return b;
}

class ElementwiseKernel {
 public:
  explicit ElementwiseKernel(const LossWork& work)
      : work_(work),
        options_(*work.options),
        inputs_(*work.inputs),
        inverse_t_(hn::Set(d_, 1.0f / options_.temperature)),
        teacher_share_(hn::Set(d_, work_.teachers.empty() ? 0 : 1.0f / work_.teachers.size())),
        keep_(hn::Set(d_, 1 - options_.label_smoothing)),
        shift_(hn::Set(d_, options_.label_smoothing / 2)) {}

  void Block(int64_t block) {
    const int64_t classes = inputs_.classes, lanes = hn::Lanes(d_);
    const int64_t first_row = block * work_.block_rows;
    const int64_t rows = HWY_MIN(work_.block_rows, inputs_.rows - first_row);
    const int64_t begin = first_row * classes, end = begin + rows * classes;
    work_.correct[block] = CountCorrect(first_row, rows);
    // Every term is a mean over classes.
    const double scale = work_.row_scale / static_cast<double>(classes);
    const V32 label_scale = hn::Set(d_, static_cast<float>(scale));
    const V32 teacher_scale = hn::Set(d_, static_cast<float>(scale * inputs_.teacher_weight));
    V32 label_sum = hn::Zero(d_), teacher_sum = hn::Zero(d_);
    for (int64_t i = begin; i < end; i += lanes) {
      const int64_t count = HWY_MIN(lanes, end - i);
      const auto real = hn::FirstN(d_, count);
      const V32 z = Load(work_.logits + i, count);
      const V32 y = Load(inputs_.targets + i, count);
      V32 phi, phi_slope;
      if (options_.label_loss == LossOptions::kSigmoidCrossEntropy) {
        const V32 target = hn::MulAdd(y, keep_, shift_);
        CrossEntropy(FromLogit(d_, z), z, target, &phi, &phi_slope);
      } else {
        HalfSquare(z, y, &phi, &phi_slope);
      }
      label_sum = hn::Add(label_sum, hn::IfThenElseZero(real, phi));
      V32 slope = hn::Mul(phi_slope, label_scale);
      if (work_.teach) {
        V32 psi, psi_slope;
        Teach(i, count, z, &psi, &psi_slope);
        teacher_sum = hn::Add(teacher_sum, hn::IfThenElseZero(real, psi));
        slope = hn::MulAdd(psi_slope, teacher_scale, slope);
      }
      if (work_.gradient == nullptr) continue;
      if (count == lanes) {
        hn::StoreU(slope, d_, work_.gradient + i);
      } else {
        StorePartial(d_, slope, work_.gradient + i, count);
      }
    }
    work_.label_loss[block] = Sum(d_, label_sum) / static_cast<double>(classes);
    work_.teacher_loss[block] = Sum(d_, teacher_sum) / static_cast<double>(classes);
  }

 private:
  V32 Load(const float* x, int64_t count) const {
    return count == static_cast<int64_t>(hn::Lanes(d_)) ? hn::LoadU(d_, x)
                                                        : LoadPartial(d_, x, count);
  }

  int64_t CountCorrect(int64_t first_row, int64_t rows) const {
    if (options_.label_loss != LossOptions::kSigmoidCrossEntropy) return 0;
    const float* z = work_.logits + first_row * inputs_.classes;
    const float* y = inputs_.targets + first_row * inputs_.classes;
    int64_t correct = 0;
    for (int64_t row = 0; row < rows; ++row) {
      int64_t agree = 0;
      for (int64_t c = 0; c < inputs_.classes; ++c) agree += (*z++ > 0) == (*y++ > 0.5f);
      correct += agree == inputs_.classes;
    }
    return correct;
  }

  // -target log p(yes) - (1 - target) log p(no), with the large parts cancelled first.
  void CrossEntropy(const Binary& p, V32 z, V32 target, V32* loss, V32* slope) const {
    const V32 linear = hn::Sub(hn::Max(z, hn::Zero(d_)), hn::Mul(target, z));
    const V32 log_sum = hn::Sub(hn::Min(z, hn::Zero(d_)), p.log_yes);
    *loss = hn::Add(linear, log_sum);
    *slope = hn::Sub(p.yes, target);
  }

  void HalfSquare(V32 z, V32 target, V32* loss, V32* slope) const {
    *slope = hn::Sub(z, target);
    *loss = hn::Mul(hn::Mul(*slope, *slope), hn::Set(d_, 0.5f));
  }

  V32 MeanLogit(int64_t i, int64_t count) const {
    V32 sum = hn::Zero(d_);
    for (const float* teacher : work_.teachers) sum = hn::Add(sum, Load(teacher + i, count));
    return hn::Mul(sum, teacher_share_);
  }

  Binary MeanProbability(int64_t i, int64_t count) const {
    Binary mean;
    mean.yes = mean.no = hn::Zero(d_);
    V32 max_yes = hn::Set(d_, -3e38f), max_no = max_yes;
    for (const float* teacher : work_.teachers) {
      const Binary q = FromLogit(d_, hn::Mul(Load(teacher + i, count), inverse_t_));
      mean.yes = hn::MulAdd(q.yes, teacher_share_, mean.yes);
      mean.no = hn::MulAdd(q.no, teacher_share_, mean.no);
      max_yes = hn::Max(max_yes, q.log_yes);
      max_no = hn::Max(max_no, q.log_no);
    }
    // Logarithms of the means from logarithms: right where the probabilities vanish.
    V32 sum_yes = hn::Zero(d_), sum_no = hn::Zero(d_);
    for (const float* teacher : work_.teachers) {
      const Binary q = FromLogit(d_, hn::Mul(Load(teacher + i, count), inverse_t_));
      sum_yes = hn::Add(sum_yes, hn::Exp(d_, hn::Sub(q.log_yes, max_yes)));
      sum_no = hn::Add(sum_no, hn::Exp(d_, hn::Sub(q.log_no, max_no)));
    }
    mean.log_yes = hn::Add(max_yes, hn::Log(d_, hn::Mul(sum_yes, teacher_share_)));
    mean.log_no = hn::Add(max_no, hn::Log(d_, hn::Mul(sum_no, teacher_share_)));
    return mean;
  }

  // psi and its derivative by z.
  void Teach(int64_t i, int64_t count, V32 z, V32* psi, V32* slope) const {
    if (options_.teacher_loss == LossOptions::kSquaredErrorLogits) {
      HalfSquare(z, MeanLogit(i, count), psi, slope);
      return;
    }
    const V32 t = hn::Set(d_, options_.temperature);
    const V32 z_t = hn::Mul(z, inverse_t_);
    const Binary p = FromLogit(d_, z_t);
    const bool of_logits =
        work_.teachers.size() == 1 || options_.teacher_average == LossOptions::kLogits;
    const Binary q = of_logits ? FromLogit(d_, hn::Mul(MeanLogit(i, count), inverse_t_))
                               : MeanProbability(i, count);
    if (options_.teacher_loss == LossOptions::kKlStudentTeacher) {
      const V32 yes = hn::Sub(p.log_yes, q.log_yes), no = hn::Sub(p.log_no, q.log_no);
      *psi = hn::MulAdd(p.yes, yes, hn::Mul(p.no, no));
      *slope = hn::Mul(hn::Mul(p.yes, p.no), hn::Sub(yes, no));
    } else {
      CrossEntropy(p, z_t, q.yes, psi, slope);
      if (options_.teacher_loss == LossOptions::kKlTeacherStudent) {
        *psi = hn::Add(*psi, hn::MulAdd(q.yes, q.log_yes, hn::Mul(q.no, q.log_no)));
      }
    }
    *psi = hn::Mul(*psi, hn::Mul(t, t));
    *slope = hn::Mul(*slope, t);
  }

  const F32 d_{};
  const LossWork& work_;
  const LossOptions& options_;
  const LossInputs& inputs_;
  const V32 inverse_t_, teacher_share_;
  const V32 keep_, shift_;  // smoothed target = keep * target + shift
};

void ElementwiseLoss(const LossWork& work, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  ElementwiseKernel kernel(work);
  for (int64_t block = begin; block < end; ++block) kernel.Block(block);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace codistill {
namespace internal {

HWY_EXPORT(ElementwiseLoss);

void ElementwiseLoss(const LossWork& work, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(ElementwiseLoss)(work, begin, end);
}

}  // namespace internal
}  // namespace codistill
#endif  // HWY_ONCE
