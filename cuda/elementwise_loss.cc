// Sigmoid cross-entropy and squared error with distillation: the vector kernel. Every element is on
// its own, so rows are laid end to end and cut into blocks; a single-logit model fills vectors too.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/tensor/bfloat16.h"
#include "cuda/float_rows.h"
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

// The teacher's own probability of yes.
Binary FromProbability(F32 d, V32 q) {
  const V32 smallest = hn::Set(d, FLT_MIN);
  Binary b;
  b.yes = q;
  b.no = hn::Sub(hn::Set(d, 1.0f), q);
  b.log_yes = hn::Log(d, hn::Max(smallest, b.yes));
  b.log_no = hn::Log(d, hn::Max(smallest, b.no));
  return b;
}

// A block's part of an array of [rows, classes]: where it is or, of another format, a copy.
class BlockOfRows {
 public:
  BlockOfRows(const void* data, NumberFormat format, const float* scale, int64_t classes,
              int64_t block_rows)
      : data_(data), format_(format), scale_(scale), classes_(classes) {
    if (format_ != NumberFormat::kFloat32) decoded_.resize(block_rows * classes);
  }

  void Load(int64_t first_row, int64_t rows) {
    if (format_ == NumberFormat::kFloat32) {
      values_ = static_cast<const float*>(data_) + first_row * classes_;
      return;
    }
    values_ = decoded_.data();
    if (scale_ == nullptr) {
      DecodeNumbers(data_, format_, first_row * classes_, rows * classes_, 0, decoded_.data());
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      DecodeNumbers(data_, format_, (first_row + row) * classes_, classes_, scale_[first_row + row],
                    decoded_.data() + row * classes_);
    }
  }

  const float* values() const { return values_; }

 private:
  const void* data_;
  NumberFormat format_;
  const float* scale_;
  int64_t classes_;
  std::vector<float> decoded_;
  const float* values_ = nullptr;
};

class ElementwiseKernel {
 public:
  explicit ElementwiseKernel(const LossWork& work)
      : work_(work),
        options_(*work.options),
        inputs_(*work.inputs),
        inverse_t_(hn::Set(d_, 1.0f / options_.temperature)),
        teacher_share_(hn::Set(d_, inputs_.teachers.empty() ? 0 : 1.0f / inputs_.teachers.size())),
        keep_(hn::Set(d_, 1 - options_.label_smoothing)),
        shift_(hn::Set(d_, options_.label_smoothing / 2)),
        logits_(inputs_.logits, inputs_.logits_format, nullptr, inputs_.classes, work.block_rows) {
    // Kept apart until the block is known to be sound, where it would replace what is to be shown.
    const bool in_place = work.gradient == inputs_.logits;
    if (work.gradient != nullptr && (in_place || inputs_.logits_format != NumberFormat::kFloat32)) {
      gradient_.resize(work.block_rows * inputs_.classes);
    }
    if (inputs_.row_weights != nullptr) weights_.resize(work.block_rows * inputs_.classes);
    for (size_t k = 0; work.teach && k < inputs_.teachers.size(); ++k) {
      const DenseTeacher& teacher = inputs_.teachers[k];
      teachers_.emplace_back(teacher.values, teacher.format, teacher.scale, inputs_.classes,
                             work.block_rows);
    }
  }

  void Block(int64_t block) {
    const int64_t classes = inputs_.classes, lanes = hn::Lanes(d_);
    const int64_t first_row = block * work_.block_rows;
    const int64_t rows = HWY_MIN(work_.block_rows, inputs_.rows - first_row);
    const int64_t size = rows * classes;
    Load(first_row, rows);
    work_.correct[block] = CountCorrect(first_row, rows);
    float* const gradient = work_.gradient == nullptr ? nullptr
                            : gradient_.empty()
                                ? static_cast<float*>(work_.gradient) + first_row * classes
                                : gradient_.data();
    // Every term is a mean over classes.
    const double scale = work_.row_scale / static_cast<double>(classes);
    const V32 label_scale = hn::Set(d_, static_cast<float>(scale));
    const V32 teacher_scale = hn::Set(d_, static_cast<float>(scale * inputs_.teacher_weight));
    const V32 zero = hn::Zero(d_);
    V32 label_sum = zero, teacher_sum = zero;
    outside_ = zero;
    for (int64_t i = 0; i < size; i += lanes) {
      const int64_t count = HWY_MIN(lanes, size - i);
      // Zero where there is no element or its row does not count.
      const V32 weight = hn::IfThenElseZero(
          hn::FirstN(d_, count),
          weights_.empty() ? hn::Set(d_, 1.0f) : Load(weights_.data() + i, count));
      const auto counts = hn::Gt(weight, zero);
      const V32 z = Load(logits_.values() + i, count);
      const V32 y = Load(targets_ + i, count);
      V32 phi, phi_slope;
      if (options_.label_loss == LossOptions::kSigmoidCrossEntropy) {
        const V32 target = hn::MulAdd(y, keep_, shift_);
        CrossEntropy(FromLogit(d_, z), z, target, &phi, &phi_slope);
      } else {
        HalfSquare(z, y, &phi, &phi_slope);
      }
      label_sum = hn::Add(label_sum, hn::IfThenElseZero(counts, hn::Mul(weight, phi)));
      V32 slope = hn::Mul(phi_slope, label_scale);
      if (work_.teach) {
        V32 psi, psi_slope;
        Teach(i, count, z, counts, &psi, &psi_slope);
        teacher_sum = hn::Add(teacher_sum, hn::IfThenElseZero(counts, hn::Mul(weight, psi)));
        slope = hn::MulAdd(psi_slope, teacher_scale, slope);
      }
      if (gradient == nullptr) continue;
      slope = hn::IfThenElseZero(counts, hn::Mul(weight, slope));
      if (count == lanes) {
        hn::StoreU(slope, d_, gradient + i);
      } else {
        StorePartial(d_, slope, gradient + i, count);
      }
    }
    work_.label_loss[block] = Sum(d_, label_sum) / static_cast<double>(classes);
    work_.teacher_loss[block] = Sum(d_, teacher_sum) / static_cast<double>(classes);
    NameFaults(block, first_row, rows);
    if (!gradient_.empty()) StoreGradient(first_row, size);
  }

 private:
  V32 Load(const float* x, int64_t count) const {
    return count == static_cast<int64_t>(hn::Lanes(d_)) ? hn::LoadU(d_, x)
                                                        : LoadPartial(d_, x, count);
  }

  void Load(int64_t first_row, int64_t rows) {
    logits_.Load(first_row, rows);
    targets_ = inputs_.targets + first_row * inputs_.classes;
    for (BlockOfRows& teacher : teachers_) teacher.Load(first_row, rows);
    if (weights_.empty()) return;
    for (int64_t row = 0; row < rows; ++row) {
      std::fill_n(weights_.begin() + row * inputs_.classes, inputs_.classes,
                  inputs_.row_weights[first_row + row]);
    }
  }

  // The block's gradient to where it is wanted.
  void StoreGradient(int64_t first_row, int64_t size) const {
    const int64_t begin = first_row * inputs_.classes;
    if (inputs_.logits_format == NumberFormat::kBfloat16) {
      ToBfloat16(gradient_.data(), size, static_cast<uint16_t*>(work_.gradient) + begin);
    } else {
      std::memcpy(static_cast<float*>(work_.gradient) + begin, gradient_.data(),
                  size * sizeof(float));
    }
  }

  // Before the gradient may have replaced the logits.
  void NameFaults(int64_t block, int64_t first_row, int64_t rows) const {
    const bool finite =
        std::isfinite(work_.label_loss[block]) && std::isfinite(work_.teacher_loss[block]);
    if (finite && hn::AllTrue(d_, hn::Eq(outside_, hn::Zero(d_)))) return;
    for (int64_t row = first_row; row < first_row + rows; ++row) {
      if (!(RowWeight(options_, inputs_, row) > 0)) continue;
      std::string fault = FindFault(work_, row, finite || !LossOverflows(row - first_row));
      if (fault.empty()) continue;
      work_.faults->Add(row, std::move(fault));
      return;
    }
  }

  // Whether a number of the block's row is not finite, or too large for the loss to be.
  bool LossOverflows(int64_t row) const {
    const int64_t begin = row * inputs_.classes, end = begin + inputs_.classes;
    constexpr float kLarge = 1e18f;  // its square is about as large as a float gets
    bool overflows = false;
    for (int64_t i = begin; i < end; ++i) {
      overflows |= !(std::abs(logits_.values()[i]) < kLarge) || !(std::abs(targets_[i]) < kLarge);
      for (const BlockOfRows& teacher : teachers_) {
        overflows |= !(std::abs(teacher.values()[i]) < kLarge);
      }
    }
    return overflows;
  }

  int64_t CountCorrect(int64_t first_row, int64_t rows) const {
    if (options_.label_loss != LossOptions::kSigmoidCrossEntropy) return 0;
    const float* z = logits_.values();
    const float* y = targets_;
    int64_t correct = 0;
    for (int64_t row = 0; row < rows; ++row) {
      int64_t agree = 0;
      for (int64_t c = 0; c < inputs_.classes; ++c) agree += (*z++ > 0) == (*y++ > 0.5f);
      correct += agree == inputs_.classes && RowWeight(options_, inputs_, first_row + row) > 0;
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
    for (const BlockOfRows& teacher : teachers_) {
      sum = hn::Add(sum, Load(teacher.values() + i, count));
    }
    return hn::Mul(sum, teacher_share_);
  }

  // What teacher k says of the elements, noting probabilities that are none.
  template <typename Mask>
  Binary Said(size_t k, int64_t i, int64_t count, Mask counts) {
    const V32 x = Load(teachers_[k].values() + i, count);
    if (inputs_.teachers[k].kind == DenseTeacher::kLogits) {
      return FromLogit(d_, hn::Mul(x, inverse_t_));
    }
    const V32 beyond = hn::Max(hn::Neg(x), hn::Sub(x, hn::Set(d_, 1.0f)));
    outside_ = hn::Max(outside_, hn::IfThenElseZero(counts, beyond));
    return FromProbability(d_, x);
  }

  template <typename Mask>
  Binary MeanProbability(int64_t i, int64_t count, Mask counts) {
    if (teachers_.size() == 1) return Said(0, i, count, counts);
    Binary mean;
    mean.yes = mean.no = hn::Zero(d_);
    V32 max_yes = hn::Set(d_, -3e38f), max_no = max_yes;
    for (size_t k = 0; k < teachers_.size(); ++k) {
      const Binary q = Said(k, i, count, counts);
      mean.yes = hn::MulAdd(q.yes, teacher_share_, mean.yes);
      mean.no = hn::MulAdd(q.no, teacher_share_, mean.no);
      max_yes = hn::Max(max_yes, q.log_yes);
      max_no = hn::Max(max_no, q.log_no);
    }
    // Logarithms of the means from logarithms: right where the probabilities vanish.
    V32 sum_yes = hn::Zero(d_), sum_no = hn::Zero(d_);
    for (size_t k = 0; k < teachers_.size(); ++k) {
      const Binary q = Said(k, i, count, counts);
      sum_yes = hn::Add(sum_yes, hn::Exp(d_, hn::Sub(q.log_yes, max_yes)));
      sum_no = hn::Add(sum_no, hn::Exp(d_, hn::Sub(q.log_no, max_no)));
    }
    mean.log_yes = hn::Add(max_yes, hn::Log(d_, hn::Mul(sum_yes, teacher_share_)));
    mean.log_no = hn::Add(max_no, hn::Log(d_, hn::Mul(sum_no, teacher_share_)));
    return mean;
  }

  // psi and its derivative by z.
  template <typename Mask>
  void Teach(int64_t i, int64_t count, V32 z, Mask counts, V32* psi, V32* slope) {
    if (options_.teacher_loss == LossOptions::kSquaredErrorLogits) {
      HalfSquare(z, MeanLogit(i, count), psi, slope);
      return;
    }
    const V32 t = hn::Set(d_, options_.temperature);
    const V32 z_t = hn::Mul(z, inverse_t_);
    const Binary p = FromLogit(d_, z_t);
    const bool of_logits = options_.teacher_average == LossOptions::kLogits;
    const Binary q = of_logits ? FromLogit(d_, hn::Mul(MeanLogit(i, count), inverse_t_))
                               : MeanProbability(i, count, counts);
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
  // Of the block.
  BlockOfRows logits_;
  std::vector<BlockOfRows> teachers_;
  const float* targets_ = nullptr;
  std::vector<float> weights_;   // by element; empty: all 1
  std::vector<float> gradient_;  // empty: written where it is wanted
  V32 outside_ = hn::Zero(d_);   // how far probabilities lie outside [0, 1]
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
