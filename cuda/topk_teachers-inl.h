// The softmax loss's part for teachers that name their most likely classes only (loss.h): sums over
// those classes, one walk over exponentials in the cache where a difference would not do, and
// changes to few elements of what becomes the gradient. Included once per instruction set.

#if defined(CODISTILL_CUDA_TOPK_TEACHERS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CODISTILL_CUDA_TOPK_TEACHERS_INL_H_
#undef CODISTILL_CUDA_TOPK_TEACHERS_INL_H_
#else
#define CODISTILL_CUDA_TOPK_TEACHERS_INL_H_
#endif

#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/loss_kernels.h"
#include "cuda/row_softmax-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

// For one row after the other: Take(), then, for the gradient, the rest.
//
// Of teacher k of K let q be its probabilities of the classes it names, t those of all others
// together (both divided by their sum), p = softmax(z / T), P what p gives the others, and r_k =
// t / P. Its gradient is T / K times p_c - q_c for a class it names and p_c (1 - r_k) for another.
// With R_c the sum of r_k over the teachers that name c and R over all, dense teachers' part apart:
//
//   gradient_c / T = p_c (1 - (R - R_c) / K) - sum_k q_kc / K
//
// that is one factor, 1 - R / K, for all classes but those named.
class TopKTeachers {
 public:
  explicit TopKTeachers(const LossWork& work)
      : teachers_(work.teach ? work.inputs->topk_teachers : absl::Span<const TopKTeacher>()),
        n_(work.inputs->classes),
        inverse_t_(1.0 / work.options->temperature),
        divergence_(work.options->teacher_loss == LossOptions::kKlTeacherStudent),
        all_(static_cast<double>(teachers_.size() + work.inputs->teachers.size())) {
    if (!teachers_.empty()) named_.resize(n_);
  }

  size_t size() const { return teachers_.size(); }

  // Row `r`, whose student has the logits `z` and, at temperature T, the softmax `student`, which
  // is as before after the call. Returns the sum of the teachers' psi without T^2.
  double Take(int64_t r, const float* z, RowSoftmax* student) {
    row_ = r;
    z_ = z;
    log_sum_ = student->LogSumExp();
    origin_ = student->origin();
    classes_.clear();
    tails_.clear();
    ratios_ = 0;
    extreme_ = false;
    double psi = 0;
    for (const TopKTeacher& teacher : teachers_) psi += TakeTeacher(teacher, student);
    return psi;
  }

  // 1 - R / K: what the gradient has of p at classes that no teacher names.
  double Factor() const { return 1 - ratios_ / all_; }

  // Calls change(c, factor, q) for every named class once: the class's own factor of p, and the
  // teachers' mean probability of it.
  template <typename Change>
  void ForNamed(const Change& change) const {
    for (int32_t c : classes_) {
      change(c, 1 - (ratios_ - named_[c].ratio) / all_, named_[c].q / all_);
    }
  }

  // Whether the student gives a teacher's tail so little that ratios or exponentials leave their
  // precision. The row's gradient then comes from Exact().
  bool extreme() const { return extreme_; }

  // gradient_c / T of this row, in double precision and without shared sums: slow. Dense teachers'
  // q is not taken off.
  double Exact(int64_t c) {
    const double log_p = LogProbability(c);
    const double p = std::exp(log_p);
    double gradient = p;
    for (size_t k = 0; k < teachers_.size(); ++k) {
      const double q = ProbabilityOf(k, c);
      gradient -= (q >= 0 ? q : tails_[k].mass * std::exp(log_p - tails_[k].log_p)) / all_;
    }
    return gradient;
  }

 private:
  // A class that some teacher of the current row names.
  struct Named {
    int64_t row = -1;  // for which the rest is valid
    double ratio = 0;  // R_c
    double q = 0;      // sum over teachers
  };
  struct Tail {
    double mass;       // t
    double log_p;      // log P
    double normalise;  // 1 / (sum of q and t as they came)
  };

  double LogProbability(int64_t c) const {
    return (static_cast<double>(z_[c]) - origin_) * inverse_t_ - log_sum_;
  }

  double TakeTeacher(const TopKTeacher& teacher, RowSoftmax* student) {
    const int64_t k = teacher.k;
    const int32_t* index = teacher.index + row_ * k;
    const float* value = teacher.value + row_ * k;
    const float* exps = student->exps();
    double q_sum = 0, named_sum = 0, cross = 0, entropy = 0;
    for (int64_t i = 0; i < k; ++i) {
      const double q = value[i];
      q_sum += q;
      named_sum += exps[index[i]];
      cross -= q * LogProbability(index[i]);
      if (divergence_ && q > 0) entropy -= q * std::log(q);
    }
    Tail tail;
    // Where all classes are named there are no others to have anything.
    tail.mass = k < n_ ? teacher.tail[row_] : 0;
    tail.normalise = 1 / (q_sum + tail.mass);
    tail.mass *= tail.normalise;
    tail.log_p = 0;
    double psi = cross * tail.normalise, ratio = 0;
    if (divergence_) {
      // sum of (q s) log(q s), s the normaliser.
      psi += -entropy * tail.normalise + q_sum * tail.normalise * std::log(tail.normalise);
    }
    if (tail.mass > 0) {
      const double others = SumOfOthers(named_sum, index, k, student);
      const double p = others / student->sum();
      // Several teachers' ratios are added and taken off again.
      if (p <= (teachers_.size() == 1 ? 1e-30 : 1e-10)) {
        extreme_ = true;
        tail.log_p = ExactTail(index, k);
      } else {
        tail.log_p = std::log(p);
        ratio = tail.mass / p;
      }
      psi -= tail.mass * tail.log_p;
      if (divergence_) psi += tail.mass * std::log(tail.mass);
    }
    ratios_ += ratio;
    tails_.push_back(tail);
    for (int64_t i = 0; i < k; ++i) {
      Named& named = named_[index[i]];
      if (named.row != row_) {
        named = Named();
        named.row = row_;
        classes_.push_back(index[i]);
      }
      named.ratio += ratio;
      named.q += value[i] * tail.normalise;
    }
    return psi;
  }

  // Of the student's exponentials, those of the classes not in `index`. Exact where they are few.
  double SumOfOthers(double named_sum, const int32_t* index, int64_t k, RowSoftmax* student) {
    const double difference = student->sum() - named_sum;
    if (difference > 0.25 * student->sum()) return difference;
    float* exps = student->exps();
    saved_.resize(k);
    for (int64_t i = 0; i < k; ++i) {
      saved_[i] = exps[index[i]];
      exps[index[i]] = 0;
    }
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    V32 total = hn::Zero(d);
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      const int64_t end = HWY_MIN(begin + kBlock, n_);
      V32 sum = hn::Zero(d);
      // Beyond the last there are zeros to the end of the vector.
      for (int64_t i = begin; i < end; i += lanes) sum = hn::Add(sum, hn::Load(d, exps + i));
      total = hn::Add(total, sum);
    }
    for (int64_t i = 0; i < k; ++i) exps[index[i]] = saved_[i];
    return Sum(d, total);
  }

  // log P without exponentials that stop at the least float.
  double ExactTail(const int32_t* index, int64_t k) {
    is_named_.assign(n_, false);
    for (int64_t i = 0; i < k; ++i) is_named_[index[i]] = true;
    double max = -INFINITY, sum = 0;
    for (int64_t c = 0; c < n_; ++c) {
      if (!is_named_[c]) max = HWY_MAX(max, LogProbability(c));
    }
    for (int64_t c = 0; c < n_; ++c) {
      if (!is_named_[c]) sum += std::exp(LogProbability(c) - max);
    }
    return max + std::log(sum);
  }

  // Teacher k's of class c, -1 if it does not name it.
  double ProbabilityOf(size_t k, int64_t c) const {
    if (named_[c].row != row_) return -1;
    const TopKTeacher& teacher = teachers_[k];
    for (int64_t i = row_ * teacher.k; i < (row_ + 1) * teacher.k; ++i) {
      if (teacher.index[i] == c) return teacher.value[i] * tails_[k].normalise;
    }
    return -1;
  }

  const absl::Span<const TopKTeacher> teachers_;
  const int64_t n_;
  const double inverse_t_;
  const bool divergence_;
  const double all_;  // K, dense teachers among them
  std::vector<Named> named_;
  // Of the current row.
  int64_t row_ = -1;
  const float* z_ = nullptr;
  double log_sum_ = 0, origin_ = 0;
  std::vector<int32_t> classes_;
  std::vector<Tail> tails_;  // by teacher
  double ratios_ = 0;        // R
  bool extreme_ = false;
  std::vector<float> saved_;
  std::vector<char> is_named_;
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#endif  // CODISTILL_CUDA_TOPK_TEACHERS_INL_H_
