// Softmax cross-entropy with distillation: the vector kernel.
//
// Walk one over a row reads the logits of student and teachers from memory and computes one
// exponential an element, relative to a running reference so that no walk has to look for the
// maximum first. Exponentials are kept in scratch that fits the second-level cache. Walk two scales
// and combines them into the gradient. For the usual case, one teacher at temperature 1, walk two
// of a row runs in the same loop as walk one of the next, so that memory is read, memory is written
// and exponentials are computed all at the same time.

#include <cfloat>
#include <cmath>
#include <utility>
#include <vector>

#include "cuda/loss_kernels.h"

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cuda/softmax_loss.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "cuda/row_softmax-inl.h"
#include "cuda/topk_teachers-inl.h"
#include "hwy/aligned_allocator.h"
#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

using Scratch = hwy::AlignedFreeUniquePtr<float[]>;

// What a row's walks share.
struct Row {
  const float* z = nullptr;
  int64_t label = 0;
  std::vector<RowSoftmax> student;  // one; at temperature 1
  std::vector<RowSoftmax> warm;     // one, the student at temperature T, when T is not 1
  std::vector<RowSoftmax> teachers;
};

class SoftmaxKernel {
 public:
  explicit SoftmaxKernel(const LossWork& work)
      : work_(work),
        options_(*work.options),
        n_(work.inputs->classes),
        inverse_t_(1.0 / options_.temperature),
        top_k_(work) {
    const size_t count = work.teachers.size();
    squared_ = work.teach && options_.teacher_loss == LossOptions::kSquaredErrorLogits;
    matches_probabilities_ =
        work.teach && (options_.teacher_loss == LossOptions::kSoftCrossEntropy ||
                       options_.teacher_loss == LossOptions::kKlTeacherStudent);
    average_ =
        work.teach && count > 1 && (squared_ || options_.teacher_average == LossOptions::kLogits);
    if (average_) mean_ = NewScratch();
    if (work.teach && !matches_probabilities_) extra_ = NewScratch();
    const size_t softmaxes = !work.teach || squared_ ? 0 : average_ ? 1 : count;
    interleaved_ = (matches_probabilities_ || !work.teach) && softmaxes <= 1 &&
                   (!work.teach || options_.temperature == 1);
    for (Row& row : rows_) {
      row.student.emplace_back(1.0f, n_);
      if ((softmaxes > 0 || top_k_.size() > 0) && options_.temperature != 1)
        row.warm.emplace_back(options_.temperature, n_);
      for (size_t k = 0; k < softmaxes; ++k) row.teachers.emplace_back(options_.temperature, n_);
      if (!interleaved_) break;  // the gradient of a row is then written before the next begins
    }
  }

  void Run(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Row& row = rows_[interleaved_ ? r % 2 : 0];
      WalkOne(r, &row);  // writes what is left of the row before
      gradient_.Finish();
      Report(r, &row);
      if (work_.gradient != nullptr) StartWalkTwo(r, &row);
      if (!interleaved_) gradient_.Finish();
    }
    gradient_.Finish();
    if (work_.bypass_cache) hwy::FlushStream();
  }

 private:
  Scratch NewScratch() const {
    Scratch scratch = hwy::AllocateAligned<float>(n_ + kMaxLanes);
    // What lies past the row is read with it, though never used.
    for (int64_t i = 0; i < kMaxLanes; ++i) scratch[n_ + i] = 0;
    return scratch;
  }

  // The student that the teachers' term is about: the one at temperature T.
  static RowSoftmax& Warm(Row* row) { return row->warm.empty() ? row->student[0] : row->warm[0]; }

  void WalkOne(int64_t r, Row* row) {
    const absl::Span<const float* const> teachers = work_.teachers;
    const float* z = row->z = work_.logits + r * n_;
    row->label = work_.inputs->labels[r];
    RowSoftmax& student = row->student[0];
    student.Start(z, n_);
    for (RowSoftmax& warm : row->warm) warm.Start(z, n_);
    if (average_) AverageTeachers(r);
    for (size_t k = 0; k < row->teachers.size(); ++k) {
      row->teachers[k].Start(average_ ? mean_.get() : teachers[k] + r * n_, n_);
    }
    // Only for one teacher does the divergence come out of the walk itself.
    const Moment moment =
        options_.teacher_loss == LossOptions::kKlTeacherStudent && row->teachers.size() == 1
            ? Moment::kDifference
            : Moment::kStudent;
    RowSoftmax* teacher = row->teachers.empty() ? nullptr : &row->teachers[0];
    const Moment student_moment = options_.label_smoothing > 0 ? Moment::kLogits : Moment::kNone;
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t count = HWY_MIN(kChunk, n_ - begin);
      if (interleaved_ && student.fast() && (teacher == nullptr || teacher->fast())) {
        ExtendTogether(begin, count, student_moment, moment, &student, teacher, &gradient_);
        continue;
      }
      student.Extend(student_moment, begin, count, z, 0);
      for (RowSoftmax& warm : row->warm) warm.Extend(Moment::kNone, begin, count, z, 0);
      for (RowSoftmax& teacher : row->teachers) {
        teacher.Extend(moment, begin, count, z, student.origin());
      }
    }
    student.Finish(n_);
    for (RowSoftmax& warm : row->warm) warm.Finish(n_);
    for (RowSoftmax& teacher : row->teachers) teacher.Finish(n_);
  }

  void AverageTeachers(int64_t r) {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    const absl::Span<const float* const> teachers = work_.teachers;
    const V32 share = hn::Set(d, 1.0f / static_cast<float>(teachers.size()));
    for (int64_t i = 0; i < n_; i += lanes) {
      const int64_t count = HWY_MIN(lanes, n_ - i);
      V32 sum = hn::Zero(d);
      for (const float* teacher : teachers) sum = hn::Add(sum, Load(teacher + r * n_ + i, count));
      hn::Store(hn::Mul(sum, share), d, mean_.get() + i);
    }
  }

  // Loss and correctness, all relative to the student's origin.
  void Report(int64_t r, Row* row) {
    const RowSoftmax& student = row->student[0];
    const double smoothing = options_.label_smoothing;
    const float label_logit = row->z[row->label];
    const double at_label = static_cast<double>(label_logit) - student.origin();
    double phi = student.LogSumExp() - at_label;
    if (smoothing > 0) phi += smoothing * (at_label - student.moment() / static_cast<double>(n_));
    work_.label_loss[r] = phi;
    work_.correct[r] = label_logit == student.max() && IsFirst(row->z, row->label);
    work_.teacher_loss[r] = work_.teach ? Psi(r, row) : 0;
  }

  // Whether no class before `label` has a logit as large.
  bool IsFirst(const float* z, int64_t label) const {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    const V32 max = hn::Set(d, z[label]);
    int64_t i = 0;
    for (; i + lanes <= label; i += lanes) {
      if (!hn::AllFalse(d, hn::Eq(hn::LoadU(d, z + i), max))) return false;
    }
    for (; i < label; ++i) {
      if (z[i] == z[label]) return false;
    }
    return true;
  }

  double Psi(int64_t r, Row* row) {
    const double t2 = static_cast<double>(options_.temperature) * options_.temperature;
    if (top_k_.size() == 0) return DensePsi(r, row, t2);
    // The mean over all teachers, those with all their logits counting each as one.
    const double dense = static_cast<double>(row->teachers.size());
    const double others = t2 * top_k_.Take(r, row->z, &Warm(row));
    const double all = dense + static_cast<double>(top_k_.size());
    return ((dense > 0 ? dense * DensePsi(r, row, t2) : 0) + others) / all;
  }

  double DensePsi(int64_t r, Row* row, double t2) {
    switch (options_.teacher_loss) {
      case LossOptions::kSoftCrossEntropy:
        return t2 * CrossEntropy(row);
      case LossOptions::kKlTeacherStudent: {
        if (row->teachers.size() > 1) return t2 * (CrossEntropy(row) + NegativeEntropy(*row));
        // sum q log q - sum q log p, with everything relative to the origins.
        const RowSoftmax& q = row->teachers[0];
        return t2 * (q.moment() / q.sum() * inverse_t_ - q.LogSumExp() + WarmLogSumExp(row));
      }
      case LossOptions::kKlStudentTeacher:
        return t2 * ReverseDivergence(row);
      case LossOptions::kSquaredErrorLogits:
        return SquaredError(row->z, average_ ? mean_.get() : work_.teachers[0] + r * n_);
    }
    return 0;
  }

  // log sum exp(z / T) - (student's origin) / T.
  double WarmLogSumExp(Row* row) const {
    const RowSoftmax& warm = Warm(row);
    return warm.LogSumExp() +
           (static_cast<double>(warm.origin()) - row->student[0].origin()) * inverse_t_;
  }

  double CrossEntropy(Row* row) const {
    double mean_logit = 0;  // of the student under the teachers' average, less the origin
    for (const RowSoftmax& teacher : row->teachers) mean_logit += teacher.moment() / teacher.sum();
    return WarmLogSumExp(row) - mean_logit / static_cast<double>(row->teachers.size()) * inverse_t_;
  }

  // Sum of q log q for the average of several teachers' probabilities.
  double NegativeEntropy(const Row& row) const {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    double total = 0;
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t end = HWY_MIN(begin + kChunk, n_);
      V32 sum = hn::Zero(d);
      for (int64_t i = begin; i < end; i += lanes) {
        V32 q = hn::Zero(d);
        for (const RowSoftmax& teacher : row.teachers) {
          const double share = 1 / (teacher.sum() * static_cast<double>(row.teachers.size()));
          q = hn::MulAdd(hn::Load(d, teacher.exps() + i), hn::Set(d, static_cast<float>(share)), q);
        }
        // q log q tends to 0 with q, so the logarithm may stop at the smallest normal number.
        const V32 log_q = hn::Log(d, hn::Max(hn::Set(d, FLT_MIN), q));
        sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(d, end - i), hn::Mul(q, log_q)));
      }
      total += Sum(d, sum);
    }
    return total;
  }

  // KL(p || q); leaves p (log(p / q) - KL) in extra_.
  double ReverseDivergence(Row* row) {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    const RowSoftmax& student = Warm(row);
    const V32 normaliser = hn::Set(d, static_cast<float>(1 / student.sum()));
    double total = 0;
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t end = HWY_MIN(begin + kChunk, n_);
      V32 sum = hn::Zero(d);
      for (int64_t i = begin; i < end; i += lanes) {
        const int64_t count = HWY_MIN(lanes, end - i);
        const V32 p = hn::Mul(hn::Load(d, student.exps() + i), normaliser);
        const V32 ratio = hn::Sub(LogProbability(student, i, count), LogAverage(*row, i, count));
        hn::Store(ratio, d, extra_.get() + i);
        sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(d, count), hn::Mul(p, ratio)));
      }
      total += Sum(d, sum);
    }
    const V32 kl = hn::Set(d, static_cast<float>(total));
    for (int64_t i = 0; i < n_; i += lanes) {
      const V32 p = hn::Mul(hn::Load(d, student.exps() + i), normaliser);
      hn::Store(hn::Mul(p, hn::Sub(hn::Load(d, extra_.get() + i), kl)), d, extra_.get() + i);
    }
    return total;
  }

  V32 LogProbability(const RowSoftmax& softmax, int64_t i, int64_t count) const {
    const F32 d;
    return hn::MulSub(hn::Sub(Load(softmax.x() + i, count), hn::Set(d, softmax.origin())),
                      hn::Set(d, static_cast<float>(inverse_t_)),
                      hn::Set(d, static_cast<float>(softmax.LogSumExp())));
  }

  // log of the mean of the teachers' probabilities; from logarithms, so that it is right where the
  // probabilities themselves vanish.
  V32 LogAverage(const Row& row, int64_t i, int64_t count) const {
    const F32 d;
    V32 max = LogProbability(row.teachers[0], i, count);
    if (row.teachers.size() == 1) return max;
    for (const RowSoftmax& teacher : row.teachers) {
      max = hn::Max(max, LogProbability(teacher, i, count));
    }
    V32 sum = hn::Zero(d);
    for (const RowSoftmax& teacher : row.teachers) {
      sum = hn::Add(sum, hn::Exp(d, hn::Sub(LogProbability(teacher, i, count), max)));
    }
    const V32 share = hn::Set(d, 1.0f / static_cast<float>(row.teachers.size()));
    return hn::Add(max, hn::Log(d, hn::Mul(sum, share)));
  }

  // Leaves z - t in extra_.
  double SquaredError(const float* z, const float* t) {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    double total = 0;
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t end = HWY_MIN(begin + kChunk, n_);
      V32 sum = hn::Zero(d);
      for (int64_t i = begin; i < end; i += lanes) {
        const int64_t count = HWY_MIN(lanes, end - i);
        const V32 difference = hn::IfThenElseZero(hn::FirstN(d, count),
                                                  hn::Sub(Load(z + i, count), Load(t + i, count)));
        hn::Store(difference, d, extra_.get() + i);
        sum = hn::MulAdd(difference, difference, sum);
      }
      total += Sum(d, sum);
    }
    return total / 2 / static_cast<double>(n_);
  }

  static V32 Load(const float* x, int64_t count) {
    const F32 d;
    return count == static_cast<int64_t>(hn::Lanes(d)) ? hn::LoadU(d, x) : LoadPartial(d, x, count);
  }

  void StartWalkTwo(int64_t r, Row* row) {
    const double smoothing = options_.label_smoothing;
    const double classes = static_cast<double>(n_);
    const double weight = work_.teach ? work_.inputs->teacher_weight : 0;
    const double weight_t = weight * options_.temperature;
    RowSoftmax& student = row->student[0];
    terms_.clear();
    const double factor = top_k_.size() > 0 ? top_k_.Factor() : 1;
    double share = 1;
    if (top_k_.size() > 0 && top_k_.extreme()) {
      WriteExactly(row, weight_t);
      return StartGradient(r);
    }
    if (matches_probabilities_ && row->warm.empty()) share = AwayFromZero(1 + weight_t * factor);
    if (top_k_.size() > 0 && row->warm.empty()) {
      MoveNamed(&student, 1, weight_t, share);
    }
    // Instead of treating the label's element apart, the exponential behind it is moved.
    student.exps()[row->label] -= static_cast<float>((1 - smoothing) * student.sum() / share);
    AddTerm(student.exps(), share / student.sum());
    if (matches_probabilities_) {
      for (RowSoftmax& warm : row->warm) {
        double warm_share = weight_t;
        if (top_k_.size() > 0) {
          warm_share = AwayFromZero(weight_t * factor);
          MoveNamed(&warm, 0, weight_t, warm_share);
        }
        AddTerm(warm.exps(), warm_share / warm.sum());
      }
      const double teachers = static_cast<double>(row->teachers.size() + top_k_.size());
      for (RowSoftmax& teacher : row->teachers) {
        AddTerm(teacher.exps(), -weight_t / (teachers * teacher.sum()));
      }
    } else if (work_.teach) {
      AddTerm(extra_.get(), squared_ ? weight / classes : weight_t);
    }
    // All terms beyond the first are gathered in the second.
    for (size_t i = 2; i < terms_.size(); ++i) {
      Accumulate(terms_[1].values, terms_[1].scale, terms_[i].values, terms_[i].scale);
      terms_[1].scale = 1;
    }
    StartGradient(r);
  }

  void StartGradient(int64_t r) {
    const Term none = {nullptr, 0};
    const double smoothing = options_.label_smoothing, classes = static_cast<double>(n_);
    gradient_.Start(terms_[0], terms_.size() > 1 ? terms_[1] : none,
                    static_cast<float>(work_.row_scale * smoothing / classes),
                    static_cast<float>(work_.row_scale), work_.gradient + r * n_, n_,
                    work_.bypass_cache);
  }

  // A share by which exponentials can be divided. What is changed of the gradient is far below its
  // rounding.
  static double AwayFromZero(double share) {
    return std::abs(share) < 1e-12 ? std::copysign(1e-12, share) : share;
  }

  // Moves the exponentials of the classes that top-k teachers name, so that times share / sum they
  // are (own + weight_t factor_c) p_c - weight_t q_c.
  void MoveNamed(RowSoftmax* softmax, double own, double weight_t, double share) const {
    float* exps = softmax->exps();
    const double sum = softmax->sum();
    top_k_.ForNamed([&](int32_t c, double factor, double q) {
      exps[c] =
          static_cast<float>(((own + weight_t * factor) * exps[c] - weight_t * q * sum) / share);
    });
  }

  // The row's gradient before smoothing, in place of the student's exponentials.
  void WriteExactly(Row* row, double weight_t) {
    RowSoftmax& student = row->student[0];
    float* exps = student.exps();
    const double teachers = static_cast<double>(row->teachers.size() + top_k_.size());
    for (int64_t c = 0; c < n_; ++c) {
      double psi = top_k_.Exact(c);
      for (const RowSoftmax& teacher : row->teachers) {
        psi -= teacher.exps()[c] / (teachers * teacher.sum());
      }
      exps[c] = static_cast<float>(exps[c] / student.sum() + weight_t * psi);
    }
    exps[row->label] -= static_cast<float>(1 - options_.label_smoothing);
    AddTerm(exps, 1);
  }

  void AddTerm(float* values, double scale) {
    terms_.push_back({values, static_cast<float>(scale)});
  }

  // target = target * scale + source * source_scale.
  void Accumulate(float* HWY_RESTRICT target, float scale, const float* HWY_RESTRICT source,
                  float source_scale) const {
    const F32 d;
    const V32 s = hn::Set(d, scale), t = hn::Set(d, source_scale);
    for (int64_t i = 0; i < n_; i += hn::Lanes(d)) {
      const V32 sum = hn::MulAdd(hn::Load(d, source + i), t, hn::Mul(hn::Load(d, target + i), s));
      hn::Store(sum, d, target + i);
    }
  }

  const LossWork& work_;
  const LossOptions& options_;
  const int64_t n_;
  const double inverse_t_;
  bool squared_ = false;                // psi is the squared error of logits
  bool matches_probabilities_ = false;  // psi's gradient is the difference of probabilities
  bool average_ = false;                // teachers' logits are averaged into mean_ first
  bool interleaved_ = false;            // walk two runs along with walk one of the next row
  Row rows_[2];
  Scratch mean_, extra_;
  TopKTeachers top_k_;
  std::vector<Term> terms_;
  GradientWriter gradient_;
};

void SoftmaxLoss(const LossWork& work, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  SoftmaxKernel(work).Run(begin, end);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace codistill {
namespace internal {

HWY_EXPORT(SoftmaxLoss);

void SoftmaxLoss(const LossWork& work, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(SoftmaxLoss)(work, begin, end);
}

}  // namespace internal
}  // namespace codistill
#endif  // HWY_ONCE
