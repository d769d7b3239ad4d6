// Softmax cross-entropy with distillation: the vector kernel.
//
// A row is walked in chunks that fit the first-level cache. Walk one reads the student's and the
// teachers' logits from memory, computes one exponential an element relative to a running reference
// (so no extra walk looks for the maximum), keeps it in scratch that stays in the second-level
// cache, and sums. Walk two scales and combines the kept exponentials into the gradient. While a
// chunk is computed the next one is prefetched, which hides the memory behind the arithmetic.

#include <cfloat>
#include <cmath>
#include <vector>

#include "cuda/loss_kernels.h"

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cuda/softmax_loss.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "cuda/simd_math-inl.h"
#include "hwy/aligned_allocator.h"
#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

constexpr int64_t kChunk = 4096;
constexpr double kLog2E = 1.442695040888963407359924681;
constexpr double kLn2 = 0.693147180559945309417232121;
// How far, in powers of two, logits may lie above the reference before it is moved.
constexpr double kHeadroom = 64;

float MaxOfChunk(const float* x, int64_t n) {
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  V32 max = hn::Set(d, -FLT_MAX);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) max = hn::Max(max, hn::LoadU(d, x + i));
  if (i < n) max = hn::Max(max, LoadPartial(d, x + i, n - i));
  return hn::GetLane(hn::MaxOfLanes(d, max));
}

// What a walk sums besides exponentials.
enum class Moment {
  kNone,
  kStudent,     // e * (z - z_origin): for the cross-entropy
  kDifference,  // e * ((x - x_origin) - (z - z_origin)): for the divergence, exactly 0 for equals
  kLogits,      // x - x_origin: for label smoothing
};

struct ChunkSums {
  float max;
  double exps, moment;
};

// e[i] = 2^(k * x[i] - reference).
template <Moment kMoment>
struct ExpStep {
  const F32 d{};
  const V32 k, reference, x_origin, z_origin;
  V32 max, exps, moment;

  ExpStep(float scale, float reference_logit, float x_first, float z_first)
      : k(hn::Set(d, scale)),
        // Fused, the product need not be rounded by itself, so the reference can be; otherwise
        // subtract first to keep large logits from losing their low bits.
        reference(hn::Set(d, kFusedMulAdd ? -(scale * reference_logit) : -reference_logit)),
        x_origin(hn::Set(d, x_first)),
        z_origin(hn::Set(d, z_first)),
        max(hn::Set(d, -FLT_MAX)),
        exps(hn::Zero(d)),
        moment(hn::Zero(d)) {}

  HWY_INLINE V32 Exp(V32 x) const {
    return Exp2(d, kFusedMulAdd ? hn::MulAdd(x, k, reference) : hn::Mul(hn::Add(x, reference), k));
  }

  HWY_INLINE void Add(V32 x, V32 z, V32 e) {
    max = hn::Max(max, x);
    exps = hn::Add(exps, e);
    if (kMoment == Moment::kStudent) {
      moment = hn::MulAdd(e, hn::Sub(z, z_origin), moment);
    } else if (kMoment == Moment::kDifference) {
      moment = hn::MulAdd(e, hn::Sub(hn::Sub(x, x_origin), hn::Sub(z, z_origin)), moment);
    } else if (kMoment == Moment::kLogits) {
      moment = hn::Add(moment, hn::Sub(x, x_origin));
    }
  }
};

template <Moment kMoment>
ChunkSums ExpOfChunk(const float* HWY_RESTRICT x, const float* HWY_RESTRICT z, int64_t n,
                     float scale, float reference_logit, float x_origin, float z_origin,
                     float* HWY_RESTRICT e) {
  constexpr bool kReadsStudent = kMoment == Moment::kStudent || kMoment == Moment::kDifference;
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  ExpStep<kMoment> a(scale, reference_logit, x_origin, z_origin), b = a;
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    hwy::Prefetch(x + i + kChunk);
    hwy::Prefetch(x + i + lanes + kChunk);
    const V32 x0 = hn::LoadU(d, x + i), x1 = hn::LoadU(d, x + i + lanes);
    const V32 z0 = kReadsStudent ? hn::LoadU(d, z + i) : x0;
    const V32 z1 = kReadsStudent ? hn::LoadU(d, z + i + lanes) : x1;
    const V32 e0 = a.Exp(x0), e1 = b.Exp(x1);
    hn::Store(e0, d, e + i);
    hn::Store(e1, d, e + i + lanes);
    a.Add(x0, z0, e0);
    b.Add(x1, z1, e1);
  }
  for (; i < n; i += lanes) {
    const int64_t count = HWY_MIN(lanes, n - i);
    const auto real = hn::FirstN(d, count);
    const V32 x0 = LoadPartial(d, x + i, count);
    const V32 z0 = kReadsStudent ? LoadPartial(d, z + i, count) : x0;
    const V32 e0 = hn::IfThenElseZero(real, a.Exp(x0));
    hn::Store(e0, d, e + i);  // the scratch has room
    V32 before = a.moment;
    a.Add(x0, z0, e0);
    if (kMoment == Moment::kLogits) a.moment = hn::IfThenElse(real, a.moment, before);
  }
  ChunkSums sums;
  sums.max = hn::GetLane(hn::MaxOfLanes(d, hn::Max(a.max, b.max)));
  sums.exps = Sum(d, a.exps) + Sum(d, b.exps);
  sums.moment = Sum(d, a.moment) + Sum(d, b.moment);
  return sums;
}

// Softmax of one row's logits at one temperature: exponentials relative to a reference that may
// rise from chunk to chunk, and their sums.
class RowSoftmax {
 public:
  RowSoftmax(float temperature, int64_t classes)
      : k_(static_cast<float>(kLog2E / temperature)),
        exps_(hwy::AllocateAligned<float>(classes + kMaxLanes)),
        references_((classes + kChunk - 1) / kChunk) {}

  void Start(const float* x, int64_t n) {
    x_ = x;
    const float max = MaxOfChunk(x, HWY_MIN(n, kChunk));
    // Of logits that are not finite the sums are not either, whatever the reference.
    reference_ = std::isfinite(max) ? max : 0;
    origin_ = reference_;
    max_ = -FLT_MAX;
    sum_ = moment_ = 0;
  }

  // Takes in n elements from `begin`, a multiple of kChunk.
  template <Moment kMoment>
  void Extend(int64_t begin, int64_t n, const float* z, float z_origin) {
    ChunkSums sums = ExpOfChunk<kMoment>(x_ + begin, z + begin, n, k_, reference_, origin_,
                                         z_origin, exps_.get() + begin);
    if (std::isfinite(sums.max) &&
        sums.max * static_cast<double>(k_) - LogReference() > kHeadroom) {
      const double before = LogReference();
      reference_ = sums.max;
      const double shrink = std::exp2(before - LogReference());
      sum_ *= shrink;
      if (kMoment != Moment::kLogits) moment_ *= shrink;
      sums = ExpOfChunk<kMoment>(x_ + begin, z + begin, n, k_, reference_, origin_, z_origin,
                                 exps_.get() + begin);
    }
    references_[begin / kChunk] = LogReference();
    max_ = HWY_MAX(max_, sums.max);
    sum_ += sums.exps;
    moment_ += sums.moment;
  }

  // log sum exp(x / T) - origin / T.
  double LogSumExp() const {
    return (std::log2(sum_) + LogReference() - static_cast<double>(origin_) * k_) * kLn2;
  }
  double moment() const { return moment_; }
  double sum() const { return sum_; }
  float max() const { return max_; }
  float origin() const { return origin_; }
  const float* x() const { return x_; }
  const float* exps() const { return exps_.get(); }
  float* mutable_exps() { return exps_.get(); }

  // The factor that makes the exponentials of the chunk at `begin` probabilities.
  double Normaliser(int64_t begin) const {
    const double reference = references_[begin / kChunk];
    return (reference == LogReference() ? 1.0 : std::exp2(reference - LogReference())) / sum_;
  }

 private:
  // What the exponentials are relative to, as a power of two; exactly what ExpStep subtracts.
  double LogReference() const {
    return kFusedMulAdd ? static_cast<double>(k_ * reference_)
                        : static_cast<double>(k_) * reference_;
  }

  const float k_;  // log2(e) / T
  hwy::AlignedFreeUniquePtr<float[]> exps_;
  std::vector<double> references_;  // LogReference() of every chunk's exponentials
  const float* x_ = nullptr;
  float reference_ = 0, origin_ = 0, max_ = 0;
  double sum_ = 0, moment_ = 0;
};

// A term of the gradient: scale * values[i].
struct Term {
  float* values;
  float scale;
};

// out[i] = sum of terms - uniform, with `at_label` taken off element `label` (ignored when outside
// [0, n)). Writes to values of terms after the second.
class Combiner {
 public:
  Combiner(const Term* terms, int count, float uniform, int64_t label, float at_label)
      : a_(terms[0].values),
        b_(count > 1 ? terms[1].values : nullptr),
        scale_a_(hn::Set(d_, terms[0].scale)),
        scale_b_(hn::Set(d_, count > 1 ? terms[1].scale : 0)),
        uniform_(hn::Set(d_, uniform)),
        label_(label),
        at_label_(at_label) {}

  void Write(float* out, int64_t n, bool bypass_cache) const {
    const int64_t lanes = hn::Lanes(d_);
    int64_t i = 0;
    const int64_t off = reinterpret_cast<uintptr_t>(out) / sizeof(float) % lanes;
    if (off != 0) {  // up to the first aligned vector
      i = HWY_MIN(n, lanes - off);
      Partial(out, 0, i);
    }
    const int64_t last = i + (n - i) / lanes * lanes;
    const int64_t special = label_ >= i && label_ < last ? i + (label_ - i) / lanes * lanes : last;
    if (bypass_cache) {
      Whole<true>(out, i, special);
      if (special < last) hn::Stream(WithoutLabel(At(special), special), d_, out + special);
      Whole<true>(out, special + lanes, last);
    } else {
      Whole<false>(out, i, special);
      if (special < last) hn::Store(WithoutLabel(At(special), special), d_, out + special);
      Whole<false>(out, special + lanes, last);
    }
    if (last < n) Partial(out, last, n - last);
  }

 private:
  HWY_INLINE V32 At(int64_t i) const {
    const V32 a = hn::MulSub(hn::LoadU(d_, a_ + i), scale_a_, uniform_);
    return b_ == nullptr ? a : hn::MulAdd(hn::LoadU(d_, b_ + i), scale_b_, a);
  }

  V32 WithoutLabel(V32 v, int64_t i) const {
    HWY_ALIGN float lanes[kMaxLanes] = {};
    lanes[label_ - i] = at_label_;
    return hn::Sub(v, hn::Load(d_, lanes));
  }

  template <bool kBypassCache>
  void Whole(float* HWY_RESTRICT out, int64_t begin, int64_t end) const {
    const int64_t lanes = hn::Lanes(d_);
    if (b_ == nullptr) {
      for (int64_t i = begin; i < end; i += lanes) {
        Put<kBypassCache>(hn::MulSub(hn::LoadU(d_, a_ + i), scale_a_, uniform_), out + i);
      }
    } else {
      for (int64_t i = begin; i < end; i += lanes) {
        const V32 a = hn::MulSub(hn::LoadU(d_, a_ + i), scale_a_, uniform_);
        Put<kBypassCache>(hn::MulAdd(hn::LoadU(d_, b_ + i), scale_b_, a), out + i);
      }
    }
  }

  template <bool kBypassCache>
  HWY_INLINE void Put(V32 v, float* out) const {
    if (kBypassCache) {
      hn::Stream(v, d_, out);
    } else {
      hn::Store(v, d_, out);
    }
  }

  // Fewer elements than a vector has. The scratch may be read past them.
  void Partial(float* out, int64_t i, int64_t count) const {
    V32 v = At(i);
    if (label_ >= i && label_ < i + count) v = WithoutLabel(v, i);
    StorePartial(d_, v, out + i, count);
  }

  const F32 d_{};
  const float* const a_;
  const float* const b_;
  const V32 scale_a_, scale_b_, uniform_;
  const int64_t label_;
  const float at_label_;
};

// target = target * scale + source * source_scale.
void Accumulate(float* HWY_RESTRICT target, float scale, const float* HWY_RESTRICT source,
                float source_scale, int64_t n) {
  const F32 d;
  const V32 s = hn::Set(d, scale), t = hn::Set(d, source_scale);
  for (int64_t i = 0; i < n; i += hn::Lanes(d)) {
    const V32 sum = hn::MulAdd(hn::LoadU(d, source + i), t, hn::Mul(hn::LoadU(d, target + i), s));
    hn::StoreU(sum, d, target + i);
  }
}

class SoftmaxKernel {
 public:
  explicit SoftmaxKernel(const LossWork& work)
      : work_(work),
        options_(*work.options),
        n_(work.inputs->classes),
        inverse_t_(1.0 / options_.temperature),
        student_(1, n_) {
    if (!work.teach) return;
    const size_t count = work.inputs->teachers.size();
    const bool squared = options_.teacher_loss == LossOptions::kSquaredErrorLogits;
    average_ = count > 1 && (squared || options_.teacher_average == LossOptions::kLogits);
    if (average_) mean_ = Scratch();
    if (!squared) {
      if (options_.temperature != 1) warm_student_.emplace_back(options_.temperature, n_);
      const size_t softmaxes = average_ ? 1 : count;
      for (size_t k = 0; k < softmaxes; ++k) teachers_.emplace_back(options_.temperature, n_);
    }
    if (squared || options_.teacher_loss == LossOptions::kKlStudentTeacher) extra_ = Scratch();
  }

  void Row(int64_t row) {
    const LossInputs& inputs = *work_.inputs;
    const float* z = inputs.logits + row * n_;
    const int64_t label = inputs.labels[row];
    const double smoothing = options_.label_smoothing;
    WalkOne(row, z);

    // phi, relative to the student's origin.
    const double origin = student_.origin();
    const double at_label = z[label] - origin;
    double phi = student_.LogSumExp() - at_label;
    if (smoothing > 0) phi += smoothing * (at_label - student_.moment() / static_cast<double>(n_));
    work_.label_loss[row] = phi;
    work_.correct[row] = z[label] == student_.max() && IsFirst(z, label);
    work_.teacher_loss[row] = work_.teach ? Psi(row, z) : 0;
    if (work_.gradient != nullptr) WalkTwo(label, work_.gradient + row * n_);
  }

 private:
  hwy::AlignedFreeUniquePtr<float[]> Scratch() const {
    auto scratch = hwy::AllocateAligned<float>(n_ + kMaxLanes);
    // What lies past the row is read with it, though never used.
    for (size_t i = 0; i < kMaxLanes; ++i) scratch[n_ + i] = 0;
    return scratch;
  }

  // The student that the teachers' term is about: the one at temperature T.
  RowSoftmax& warm() { return warm_student_.empty() ? student_ : warm_student_[0]; }

  void WalkOne(int64_t row, const float* z) {
    const absl::Span<const float* const> teachers = work_.inputs->teachers;
    student_.Start(z, n_);
    for (RowSoftmax& warm : warm_student_) warm.Start(z, n_);
    if (average_) AverageTeachers(row);
    for (size_t k = 0; k < teachers_.size(); ++k) {
      teachers_[k].Start(average_ ? mean_.get() : teachers[k] + row * n_, n_);
    }
    const bool divergence = options_.teacher_loss == LossOptions::kKlTeacherStudent;
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t count = HWY_MIN(kChunk, n_ - begin);
      if (options_.label_smoothing > 0) {
        student_.Extend<Moment::kLogits>(begin, count, z, 0);
      } else {
        student_.Extend<Moment::kNone>(begin, count, z, 0);
      }
      for (RowSoftmax& warm : warm_student_) warm.Extend<Moment::kNone>(begin, count, z, 0);
      for (RowSoftmax& teacher : teachers_) {
        if (divergence && teachers_.size() == 1) {
          teacher.Extend<Moment::kDifference>(begin, count, z, student_.origin());
        } else {
          teacher.Extend<Moment::kStudent>(begin, count, z, student_.origin());
        }
      }
    }
  }

  void AverageTeachers(int64_t row) {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    const absl::Span<const float* const> teachers = work_.inputs->teachers;
    const V32 share = hn::Set(d, 1.0f / static_cast<float>(teachers.size()));
    for (int64_t i = 0; i < n_; i += lanes) {
      const int64_t count = HWY_MIN(lanes, n_ - i);
      V32 sum = hn::Zero(d);
      for (const float* teacher : teachers) {
        const float* t = teacher + row * n_ + i;
        sum = hn::Add(sum, count == lanes ? hn::LoadU(d, t) : LoadPartial(d, t, count));
      }
      hn::Store(hn::Mul(sum, share), d, mean_.get() + i);
    }
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

  double Psi(int64_t row, const float* z) {
    const double t2 = static_cast<double>(options_.temperature) * options_.temperature;
    switch (options_.teacher_loss) {
      case LossOptions::kSoftCrossEntropy:
        return t2 * CrossEntropy();
      case LossOptions::kKlTeacherStudent: {
        if (teachers_.size() > 1) return t2 * (CrossEntropy() + NegativeEntropyOfAverage());
        // sum q log q - sum q log p, with everything relative to the origins.
        const RowSoftmax& q = teachers_[0];
        const double kl = q.moment() / q.sum() * inverse_t_ - q.LogSumExp() + WarmLogSumExp();
        return t2 * kl;
      }
      case LossOptions::kKlStudentTeacher:
        return t2 * ReverseDivergence(z);
      case LossOptions::kSquaredErrorLogits:
        return SquaredError(z, average_ ? mean_.get() : work_.inputs->teachers[0] + row * n_);
    }
    return 0;
  }

  // log sum exp(z / T) - (student's origin) / T.
  double WarmLogSumExp() {
    return warm().LogSumExp() +
           (static_cast<double>(warm().origin()) - student_.origin()) * inverse_t_;
  }

  double CrossEntropy() {
    double mean_logit = 0;  // of the student under the teachers' average, less the origin
    for (const RowSoftmax& teacher : teachers_) mean_logit += teacher.moment() / teacher.sum();
    return WarmLogSumExp() - mean_logit / static_cast<double>(teachers_.size()) * inverse_t_;
  }

  // Sum of q log q for the average of several teachers' probabilities.
  double NegativeEntropyOfAverage() {
    const F32 d;
    const int64_t lanes = hn::Lanes(d);
    std::vector<float> scales(teachers_.size());
    double total = 0;
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t end = HWY_MIN(begin + kChunk, n_);
      for (size_t k = 0; k < scales.size(); ++k) {
        scales[k] = static_cast<float>(teachers_[k].Normaliser(begin) / teachers_.size());
      }
      V32 sum = hn::Zero(d);
      for (int64_t i = begin; i < end; i += lanes) {
        V32 q = hn::Zero(d);
        for (size_t k = 0; k < scales.size(); ++k) {
          q = hn::MulAdd(hn::Load(d, teachers_[k].exps() + i), hn::Set(d, scales[k]), q);
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
  double ReverseDivergence(const float* z) {
    // log p = (z - p_origin) / T - p_log, and so for every teacher.
    const double p_log = warm().LogSumExp();
    std::vector<double> q_logs;
    for (const RowSoftmax& teacher : teachers_) q_logs.push_back(teacher.LogSumExp());
    const int64_t lanes = hn::Lanes(F32());
    double total = 0;
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t end = HWY_MIN(begin + kChunk, n_);
      const F32 d;
      const V32 normaliser = hn::Set(d, static_cast<float>(warm().Normaliser(begin)));
      V32 sum = hn::Zero(d);
      for (int64_t i = begin; i < end; i += lanes) {
        const int64_t count = HWY_MIN(lanes, end - i);
        const V32 p = hn::Mul(hn::Load(d, warm().exps() + i), normaliser);
        const V32 log_p = LogProbability(z + i, count, warm().origin(), p_log);
        const V32 log_q = LogAverage(i, count, q_logs);
        const V32 ratio = hn::Sub(log_p, log_q);
        hn::Store(ratio, d, extra_.get() + i);
        sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(d, count), hn::Mul(p, ratio)));
      }
      total += Sum(d, sum);
    }
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t end = HWY_MIN(begin + kChunk, n_);
      const F32 d;
      const V32 normaliser = hn::Set(d, static_cast<float>(warm().Normaliser(begin)));
      const V32 kl = hn::Set(d, static_cast<float>(total));
      for (int64_t i = begin; i < end; i += lanes) {
        const V32 p = hn::Mul(hn::Load(d, warm().exps() + i), normaliser);
        const V32 ratio = hn::Load(d, extra_.get() + i);
        hn::Store(hn::Mul(p, hn::Sub(ratio, kl)), d, extra_.get() + i);
      }
    }
    return total;
  }

  V32 LogProbability(const float* x, int64_t count, float origin, double log_sum) const {
    const F32 d;
    const V32 v =
        count == static_cast<int64_t>(hn::Lanes(d)) ? hn::LoadU(d, x) : LoadPartial(d, x, count);
    return hn::MulSub(hn::Sub(v, hn::Set(d, origin)), hn::Set(d, static_cast<float>(inverse_t_)),
                      hn::Set(d, static_cast<float>(log_sum)));
  }

  // log of the mean of the teachers' probabilities; from logarithms, so that it is right where the
  // probabilities themselves vanish.
  V32 LogAverage(int64_t i, int64_t count, const std::vector<double>& q_logs) const {
    const F32 d;
    V32 max = LogProbability(teachers_[0].x() + i, count, teachers_[0].origin(), q_logs[0]);
    if (teachers_.size() == 1) return max;
    for (size_t k = 1; k < teachers_.size(); ++k) {
      max = hn::Max(max,
                    LogProbability(teachers_[k].x() + i, count, teachers_[k].origin(), q_logs[k]));
    }
    V32 sum = hn::Zero(d);
    for (size_t k = 0; k < teachers_.size(); ++k) {
      const V32 log_q =
          LogProbability(teachers_[k].x() + i, count, teachers_[k].origin(), q_logs[k]);
      sum = hn::Add(sum, hn::Exp(d, hn::Sub(log_q, max)));
    }
    const V32 share = hn::Set(d, 1.0f / static_cast<float>(teachers_.size()));
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
        const V32 difference =
            count == lanes
                ? hn::Sub(hn::LoadU(d, z + i), hn::LoadU(d, t + i))
                : hn::IfThenElseZero(hn::FirstN(d, count), hn::Sub(LoadPartial(d, z + i, count),
                                                                   LoadPartial(d, t + i, count)));
        hn::Store(difference, d, extra_.get() + i);
        sum = hn::MulAdd(difference, difference, sum);
      }
      total += Sum(d, sum);
    }
    return total / 2 / static_cast<double>(n_);
  }

  void WalkTwo(int64_t label, float* gradient) {
    const double scale = work_.row_scale;
    const double smoothing = options_.label_smoothing;
    const double weight = work_.teach ? work_.inputs->teacher_weight * scale : 0;
    const double weight_t = weight * options_.temperature;
    const bool matches_probabilities =
        work_.teach && (options_.teacher_loss == LossOptions::kSoftCrossEntropy ||
                        options_.teacher_loss == LossOptions::kKlTeacherStudent);
    const float uniform = static_cast<float>(scale * smoothing / static_cast<double>(n_));
    const float at_label = static_cast<float>(scale * (1 - smoothing));
    for (int64_t begin = 0; begin < n_; begin += kChunk) {
      const int64_t count = HWY_MIN(kChunk, n_ - begin);
      terms_.clear();
      double student_scale = scale;
      if (matches_probabilities && warm_student_.empty()) student_scale += weight_t;
      AddTerm(student_.mutable_exps() + begin, student_scale * student_.Normaliser(begin));
      if (matches_probabilities) {
        for (RowSoftmax& warm : warm_student_) {
          AddTerm(warm.mutable_exps() + begin, weight_t * warm.Normaliser(begin));
        }
        for (RowSoftmax& teacher : teachers_) {
          AddTerm(teacher.mutable_exps() + begin,
                  -weight_t / static_cast<double>(teachers_.size()) * teacher.Normaliser(begin));
        }
      } else if (work_.teach) {
        AddTerm(extra_.get() + begin, options_.teacher_loss == LossOptions::kSquaredErrorLogits
                                          ? weight / static_cast<double>(n_)
                                          : weight_t);
      }
      // All terms beyond the first are gathered in the second.
      for (size_t i = 2; i < terms_.size(); ++i) {
        Accumulate(terms_[1].values, terms_[1].scale, terms_[i].values, terms_[i].scale, count);
        terms_[1].scale = 1;
      }
      Combiner(terms_.data(), static_cast<int>(terms_.size()), uniform, label - begin, at_label)
          .Write(gradient + begin, count, work_.bypass_cache);
    }
  }

  void AddTerm(float* values, double scale) {
    terms_.push_back({values, static_cast<float>(scale)});
  }

  const LossWork& work_;
  const LossOptions& options_;
  const int64_t n_;
  const double inverse_t_;
  bool average_ = false;  // teachers' logits are averaged into mean_ first
  RowSoftmax student_;
  std::vector<RowSoftmax> warm_student_;  // one when T is not 1
  std::vector<RowSoftmax> teachers_;
  hwy::AlignedFreeUniquePtr<float[]> mean_, extra_;
  std::vector<Term> terms_;
};

void SoftmaxLoss(const LossWork& work, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  SoftmaxKernel kernel(work);
  for (int64_t row = begin; row < end; ++row) kernel.Row(row);
  if (work.bypass_cache) hwy::FlushStream();
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
