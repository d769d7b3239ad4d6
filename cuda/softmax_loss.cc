// Softmax cross-entropy with distillation: the vector kernel.
//
// Walk one over a row reads what student and teachers say from memory and computes one exponential
// a logit, relative to a running reference so that no walk has to look for the maximum first.
// Exponentials are kept in scratch that fits the second-level cache; so is what had to be decoded.
// Walk two scales and combines them into the gradient. For the usual cases, one teacher at
// temperature 1 or 2, walk two of a row runs in the same loop as walk one of the next, so that
// memory is read, memory is written and exponentials are computed all at the same time. At
// temperature 2 the student's exponentials at temperature 1 are the squares of those at 2.

#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/tensor/bfloat16.h"
#include "cuda/float_rows.h"
#include "cuda/loss_kernels.h"

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cuda/softmax_loss.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "cuda/gradient_writer-inl.h"
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

// What a teacher says of one row, whether by logits or by probabilities.
class TeacherRow {
 public:
  TeacherRow(DenseTeacher::Kind kind, float temperature, int64_t n) {
    if (kind == DenseTeacher::kLogits) softmax_.emplace(temperature, n);
  }

  void Start(const float* x, int64_t n) {
    softmax_.has_value() ? softmax_->Start(x, n) : probabilities_.Start(x);
  }
  void Extend(Moment moment, int64_t begin, int64_t count, const float* z, float z_origin) {
    if (softmax_.has_value()) {
      softmax_->Extend(moment, begin, count, z, z_origin);
    } else {
      probabilities_.Extend(begin, count, z, z_origin);
    }
  }
  void Finish(int64_t n) {
    if (softmax_.has_value()) softmax_->Finish(n);
  }

  // Probability of class c: values()[c] / sum().
  const float* values() const {
    return softmax_.has_value() ? softmax_->exps() : probabilities_.values();
  }
  double sum() const { return softmax_.has_value() ? softmax_->sum() : probabilities_.sum(); }
  double moment() const {
    return softmax_.has_value() ? softmax_->moment() : probabilities_.moment();
  }
  // Whether the sums look like those of probabilities.
  bool plausible() const {
    return softmax_.has_value() || (probabilities_.min() >= 0 &&
                                    std::abs(probabilities_.sum() - 1) <= kMassTolerance * 0.999);
  }

  // One of them is null.
  RowSoftmax* softmax() { return softmax_.has_value() ? &*softmax_ : nullptr; }
  const RowSoftmax* softmax() const { return softmax_.has_value() ? &*softmax_ : nullptr; }
  RowProbabilities* probabilities() { return softmax_.has_value() ? nullptr : &probabilities_; }

 private:
  std::optional<RowSoftmax> softmax_;
  RowProbabilities probabilities_;
};

// What a row's walks share.
struct Row {
  const float* z = nullptr;
  int64_t label = 0;
  double weight = 0;
  // One; at temperature 1, or where its squares are summed at 2.
  std::vector<RowSoftmax> student;
  std::vector<RowSoftmax> warm;  // one, the student at temperature T, when T is another
  std::vector<TeacherRow> teachers;
};

class SoftmaxKernel {
 public:
  explicit SoftmaxKernel(const LossWork& work)
      : work_(work),
        options_(*work.options),
        inputs_(*work.inputs),
        n_(work.inputs->classes),
        inverse_t_(1.0 / options_.temperature),
        logits_(inputs_.logits, inputs_.logits_format, nullptr, n_, 1),
        top_k_(work) {
    const size_t count = inputs_.teachers.size();
    squared_ = work.teach && options_.teacher_loss == LossOptions::kSquaredErrorLogits;
    matches_probabilities_ =
        work.teach && (options_.teacher_loss == LossOptions::kSoftCrossEntropy ||
                       options_.teacher_loss == LossOptions::kKlTeacherStudent);
    average_ =
        work.teach && count > 1 && (squared_ || options_.teacher_average == LossOptions::kLogits);
    prior_ = options_.label_smoothing > 0 && inputs_.label_prior != nullptr;
    if (average_) mean_ = NewScratch();
    if (work.teach && !matches_probabilities_) extra_ = NewScratch();
    if (inputs_.logits_format == NumberFormat::kBfloat16 && work.gradient != nullptr) {
      wide_gradient_ = NewScratch();
    }
    for (size_t k = 0; work.teach && k < count; ++k) {
      const DenseTeacher& teacher = inputs_.teachers[k];
      // Probabilities are read again for the gradient, while the next row is decoded.
      said_.emplace_back(teacher.values, teacher.format, teacher.scale, n_, 2);
    }
    const size_t rows = !work.teach || squared_ ? 0 : average_ ? 1 : count;
    const bool one = (matches_probabilities_ || !work.teach) && rows <= 1;
    const bool cold = !work.teach || options_.temperature == 1;
    const bool squares =
        one && rows == 1 && options_.temperature == 2 && top_k_.size() == 0 && !prior_;
    interleaved_ = one && (cold || squares);
    for (Row& row : rows_) {
      row.student.emplace_back(squares ? 2.0f : 1.0f, n_, squares);
      if (!squares && (rows > 0 || top_k_.size() > 0) && options_.temperature != 1)
        row.warm.emplace_back(options_.temperature, n_);
      for (size_t k = 0; k < rows; ++k) {
        row.teachers.emplace_back(average_ ? DenseTeacher::kLogits : inputs_.teachers[k].kind,
                                  options_.temperature, n_);
      }
      if (!interleaved_) break;  // the gradient of a row is then written before the next begins
    }
  }

  void Run(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const double weight = RowWeight(options_, inputs_, r);
      if (!(weight > 0)) {
        Skip(r);
        continue;
      }
      Row& row = rows_[interleaved_ ? r % 2 : 0];
      row.weight = weight;
      WalkOne(r, &row);  // writes what is left of the row before
      FinishGradient();
      Report(r, &row);
      if (work_.gradient != nullptr) StartWalkTwo(r, &row);
      if (!interleaved_) FinishGradient();
    }
    FinishGradient();
    if (work_.bypass_cache) hwy::FlushStream();
  }

 private:
  Scratch NewScratch() const {
    Scratch scratch = hwy::AllocateAligned<float>(n_ + kMaxLanes);
    // What lies past the row is read with it, though never used.
    for (int64_t i = 0; i < kMaxLanes; ++i) scratch[n_ + i] = 0;
    return scratch;
  }

  // A row that does not count.
  void Skip(int64_t r) {
    FinishGradient();  // so that the two rows' scratch can go on taking turns
    work_.label_loss[r] = work_.teacher_loss[r] = 0;
    work_.correct[r] = 0;
    if (work_.gradient == nullptr) return;
    const int64_t bytes = n_ * static_cast<int64_t>(BytesOf(inputs_.logits_format));
    std::memset(static_cast<char*>(work_.gradient) + r * bytes, 0, bytes);
  }

  // The student that the teachers' term is about: the one at temperature T.
  static RowSoftmax& Warm(Row* row) { return row->warm.empty() ? row->student[0] : row->warm[0]; }

  void WalkOne(int64_t r, Row* row) {
    const float* z = row->z = logits_.Row(r);
    row->label = inputs_.labels[r];
    RowSoftmax& student = row->student[0];
    if (average_) AverageTeachers(r);
    std::vector<const float*>& given = given_;
    given.clear();
    for (size_t k = 0; k < row->teachers.size(); ++k) {
      given.push_back(average_ ? mean_.get() : said_[k].Row(r));
    }
    // Only for one teacher's logits does the divergence come out of the walk itself.
    const Moment moment = DivergenceFromWalk(*row) ? Moment::kDifference : Moment::kStudent;
    TeacherRow* teacher = row->teachers.empty() ? nullptr : &row->teachers[0];
    RowSoftmax* teacher_softmax = teacher == nullptr ? nullptr : teacher->softmax();
    const Moment student_moment =
        options_.label_smoothing > 0 && !prior_ ? Moment::kLogits : Moment::kNone;
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t count = HWY_MIN(kChunk, n_ - begin);
      logits_.Decode(begin, count);
      for (size_t k = 0; !average_ && k < row->teachers.size(); ++k) said_[k].Decode(begin, count);
      if (begin == 0) {
        student.Start(z, n_);
        for (RowSoftmax& warm : row->warm) warm.Start(z, n_);
        for (size_t k = 0; k < row->teachers.size(); ++k) row->teachers[k].Start(given[k], n_);
      }
      if (interleaved_ && student.fast() &&
          (teacher_softmax == nullptr || teacher_softmax->fast())) {
        ExtendTogether(begin, count, student_moment, moment, &student, teacher_softmax,
                       teacher == nullptr ? nullptr : teacher->probabilities(), &gradient_);
        continue;
      }
      student.Extend(student_moment, begin, count, z, 0);
      for (RowSoftmax& warm : row->warm) warm.Extend(Moment::kNone, begin, count, z, 0);
      for (TeacherRow& teacher : row->teachers) {
        teacher.Extend(moment, begin, count, z, student.origin());
      }
    }
    student.Finish(n_);
    for (RowSoftmax& warm : row->warm) warm.Finish(n_);
    for (TeacherRow& teacher : row->teachers) teacher.Finish(n_);
  }

  bool DivergenceFromWalk(const Row& row) const {
    return options_.teacher_loss == LossOptions::kKlTeacherStudent && row.teachers.size() == 1 &&
           row.teachers[0].softmax() != nullptr;
  }

  void AverageTeachers(int64_t r) {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    const V32 share = hn::Set(d, 1.0f / static_cast<float>(said_.size()));
    given_.clear();
    for (FloatRows& said : said_) {
      given_.push_back(said.Row(r));
      said.Decode(0, n_);
    }
    for (int64_t i = 0; i < n_; i += lanes) {
      const int64_t count = HWY_MIN(lanes, n_ - i);
      V32 sum = hn::Zero(d);
      for (const float* teacher : given_) sum = hn::Add(sum, Load(teacher + i, count));
      hn::Store(hn::Mul(sum, share), d, mean_.get() + i);
    }
  }

  // Loss and correctness, all relative to the student's origin.
  void Report(int64_t r, Row* row) {
    const RowSoftmax& student = row->student[0];
    const double smoothing = options_.label_smoothing;
    const float label_logit = row->z[row->label];
    const double at_label = static_cast<double>(label_logit) - student.origin();
    const double log_sum =
        student.squares_wanted() ? student.LogSumExpOfSquares() : student.LogSumExp();
    double phi = log_sum - at_label;
    if (smoothing > 0) {
      const double mean =
          prior_ ? MeanUnderPrior(*row) : student.moment() / static_cast<double>(n_);
      phi += smoothing * (at_label - mean);
    }
    const double psi = work_.teach ? Psi(r, row) : 0;
    work_.label_loss[r] = row->weight * phi;
    work_.teacher_loss[r] = row->weight * psi;
    work_.correct[r] = label_logit == student.max() && IsFirst(row->z, row->label);
    // The logits are still there: of this row no gradient has been written.
    const bool finite = std::isfinite(phi) && std::isfinite(psi);
    bool plausible = true;
    for (const TeacherRow& teacher : row->teachers) plausible &= teacher.plausible();
    if (finite && plausible) return;
    std::string fault = FindFault(work_, r, finite);
    if (!fault.empty()) work_.faults->Add(r, std::move(fault));
  }

  // Of the student's logits, less the origin.
  double MeanUnderPrior(const Row& row) const {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    const V32 origin = hn::Set(d, row.student[0].origin());
    double total = 0;
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      const int64_t end = HWY_MIN(begin + kBlock, n_);
      V32 sum = hn::Zero(d);
      for (int64_t i = begin; i < end; i += lanes) {
        const int64_t count = HWY_MIN(lanes, end - i);
        const V32 z = hn::Sub(Load(row.z + i, count), origin);
        sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(d, count),
                                              hn::Mul(z, Load(inputs_.label_prior + i, count))));
      }
      total += Sum(d, sum);
    }
    return total * work_.prior_scale;
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
        if (!DivergenceFromWalk(*row)) return t2 * (CrossEntropy(row) + NegativeEntropy(*row));
        // sum q log q - sum q log p, with everything relative to the origins.
        const RowSoftmax& q = *row->teachers[0].softmax();
        return t2 * (q.moment() / q.sum() * inverse_t_ - q.LogSumExp() + WarmLogSumExp(row));
      }
      case LossOptions::kKlStudentTeacher:
        return t2 * ReverseDivergence(row);
      case LossOptions::kSquaredErrorLogits:
        return SquaredError(row->z, average_ ? mean_.get() : WholeRow(&said_[0], r));
    }
    return 0;
  }

  const float* WholeRow(FloatRows* rows, int64_t r) const {
    const float* row = rows->Row(r);
    rows->Decode(0, n_);
    return row;
  }

  // log sum exp(z / T) - (student's origin) / T.
  double WarmLogSumExp(Row* row) const {
    const RowSoftmax& warm = Warm(row);
    return warm.LogSumExp() +
           (static_cast<double>(warm.origin()) - row->student[0].origin()) * inverse_t_;
  }

  double CrossEntropy(Row* row) const {
    double mean_logit = 0;  // of the student under the teachers' average, less the origin
    for (const TeacherRow& teacher : row->teachers) mean_logit += teacher.moment() / teacher.sum();
    return WarmLogSumExp(row) - mean_logit / static_cast<double>(row->teachers.size()) * inverse_t_;
  }

  // Sum of q log q for the average of the teachers' probabilities.
  double NegativeEntropy(const Row& row) {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    shares_.clear();
    for (const TeacherRow& teacher : row.teachers) {
      shares_.push_back(
          static_cast<float>(1 / (teacher.sum() * static_cast<double>(row.teachers.size()))));
    }
    double total = 0;
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t end = HWY_MIN(begin + kChunk, n_);
      V32 sum = hn::Zero(d);
      for (int64_t i = begin; i < end; i += lanes) {
        const int64_t count = HWY_MIN(lanes, end - i);
        V32 q = hn::Zero(d);
        for (size_t k = 0; k < shares_.size(); ++k) {
          q = hn::MulAdd(Load(row.teachers[k].values() + i, count), hn::Set(d, shares_[k]), q);
        }
        // q log q tends to 0 with q, so the logarithm may stop at the smallest normal number.
        const V32 log_q = hn::Log(d, hn::Max(hn::Set(d, FLT_MIN), q));
        sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(d, count), hn::Mul(q, log_q)));
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

  V32 LogProbability(const TeacherRow& teacher, int64_t i, int64_t count) const {
    if (teacher.softmax() != nullptr) return LogProbability(*teacher.softmax(), i, count);
    const F32 d;
    const V32 q = hn::Mul(Load(teacher.values() + i, count),
                          hn::Set(d, static_cast<float>(1 / teacher.sum())));
    return hn::Log(d, hn::Max(hn::Set(d, FLT_MIN), q));
  }

  // log of the mean of the teachers' probabilities; from logarithms, so that it is right where the
  // probabilities themselves vanish.
  V32 LogAverage(const Row& row, int64_t i, int64_t count) const {
    const F32 d;
    V32 max = LogProbability(row.teachers[0], i, count);
    if (row.teachers.size() == 1) return max;
    for (const TeacherRow& teacher : row.teachers) {
      max = hn::Max(max, LogProbability(teacher, i, count));
    }
    V32 sum = hn::Zero(d);
    for (const TeacherRow& teacher : row.teachers) {
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
    const double weight = work_.teach ? inputs_.teacher_weight : 0;
    const double weight_t = weight * options_.temperature;
    RowSoftmax& student = row->student[0];
    RowGradient gradient;
    gradient.a = student.exps();
    gradient.label = row->label;
    gradient.at_label = 1 - smoothing;
    if (!prior_) gradient.uniform = smoothing / classes;
    if (top_k_.size() > 0 && top_k_.extreme()) {
      WriteExactly(row, weight_t);
      gradient.linear = 1;
    } else if (student.squares_wanted()) {
      gradient.square = 1 / student.squares();
      gradient.linear = weight_t / student.sum();
    } else {
      gradient.linear = StudentShare(row, weight_t) / student.sum();
    }
    if (!(top_k_.size() > 0 && top_k_.extreme())) {
      AddTeachers(row, weight, weight_t, &gradient);
    }
    if (prior_) {
      Accumulate(&student, &gradient, inputs_.label_prior, -smoothing * work_.prior_scale);
    }
    StartGradient(r, row->weight, gradient);
  }

  // How often the student's probabilities at temperature 1 are in the gradient; moves those of the
  // classes that top-k teachers name.
  double StudentShare(Row* row, double weight_t) {
    if (!matches_probabilities_ || !row->warm.empty()) return 1;
    const double factor = top_k_.size() > 0 ? top_k_.Factor() : 1;
    const double share = AwayFromZero(1 + weight_t * factor);
    if (top_k_.size() > 0) MoveNamed(&row->student[0], 1, weight_t, share);
    return share;
  }

  void AddTeachers(Row* row, double weight, double weight_t, RowGradient* gradient) {
    RowSoftmax& student = row->student[0];
    if (!matches_probabilities_) {
      if (!work_.teach) return;
      gradient->b = extra_.get();
      gradient->other = squared_ ? weight / static_cast<double>(n_) : weight_t;
      return;
    }
    for (RowSoftmax& warm : row->warm) {
      double warm_share = weight_t;
      if (top_k_.size() > 0) {
        warm_share = AwayFromZero(weight_t * top_k_.Factor());
        MoveNamed(&warm, 0, weight_t, warm_share);
      }
      gradient->b = warm.exps();
      gradient->other = warm_share / warm.sum();
    }
    const double teachers = static_cast<double>(row->teachers.size() + top_k_.size());
    for (const TeacherRow& teacher : row->teachers) {
      const double share = -weight_t / (teachers * teacher.sum());
      if (gradient->b == nullptr) {
        gradient->b = teacher.values();
        gradient->other = share;
      } else {
        Accumulate(&student, gradient, teacher.values(), share);
      }
    }
  }

  // Takes `values` times `share` into the student's exponentials, for the linear term.
  void Accumulate(RowSoftmax* student, RowGradient* gradient, const float* HWY_RESTRICT values,
                  double share) const {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    float* HWY_RESTRICT exps = student->exps();
    const V32 linear = hn::Set(d, static_cast<float>(gradient->linear));
    const V32 by = hn::Set(d, static_cast<float>(share));
    for (int64_t i = 0; i < n_; i += lanes) {
      const V32 value = Load(values + i, HWY_MIN(lanes, n_ - i));
      hn::Store(hn::MulAdd(value, by, hn::Mul(hn::Load(d, exps + i), linear)), d, exps + i);
    }
    gradient->linear = 1;
  }

  void StartGradient(int64_t r, double weight, const RowGradient& gradient) {
    const double scale = work_.row_scale * weight;
    if (wide_gradient_ != nullptr) {
      wide_row_ = r;
      gradient_.Start(gradient, scale, wide_gradient_.get(), n_, /*bypass_cache=*/false);
      return;
    }
    gradient_.Start(gradient, scale, static_cast<float*>(work_.gradient) + r * n_, n_,
                    work_.bypass_cache);
  }

  void FinishGradient() {
    if (!gradient_.Finish() || wide_gradient_ == nullptr) return;
    ToBfloat16(wide_gradient_.get(), n_, static_cast<uint16_t*>(work_.gradient) + wide_row_ * n_);
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
      for (const TeacherRow& teacher : row->teachers) {
        psi -= teacher.values()[c] / (teachers * teacher.sum());
      }
      exps[c] = static_cast<float>(exps[c] / student.sum() + weight_t * psi);
    }
  }

  const LossWork& work_;
  const LossOptions& options_;
  const LossInputs& inputs_;
  const int64_t n_;
  const double inverse_t_;
  bool squared_ = false;                // psi is the squared error of logits
  bool matches_probabilities_ = false;  // psi's gradient is the difference of probabilities
  bool average_ = false;                // teachers' logits are averaged into mean_ first
  bool interleaved_ = false;            // walk two runs along with walk one of the next row
  bool prior_ = false;                  // labels are smoothed towards label_prior
  FloatRows logits_;
  std::vector<FloatRows> said_;  // by the teachers
  Row rows_[2];
  Scratch mean_, extra_;
  Scratch wide_gradient_;  // of row wide_row_, where a narrower one is wanted
  int64_t wide_row_ = 0;
  TopKTeachers top_k_;
  std::vector<const float*> given_;  // by teacher, of one row
  std::vector<float> shares_;        // by teacher
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
