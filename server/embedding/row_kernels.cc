#include "server/embedding/row_kernels.h"

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "server/embedding/row_kernels.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using F32 = hn::ScalableTag<float>;
// Of the elements that do not fill a vector.
using One = hn::CappedTag<float, 1>;

// Calls `body(d, i)` for every vector of a row, the rest one element at a time: an element's result
// is the same whatever its place in the vector.
template <typename Body>
HWY_INLINE void ForElements(size_t dim, const Body& body) {
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= dim; i += lanes) body(d, i);
  for (; i < dim; ++i) body(One(), i);
}

template <typename RowBody>
HWY_INLINE void ForRows(const RowWork& work, const RowBody& body) {
  for (size_t r = 0; r < work.count; ++r) body(work.rows[r], work.gradients[r]);
}

void Sgd(const RowWork& work) {
  const RowOptimizer::Options& o = work.optimizer->options();
  const size_t dim = work.optimizer->dim();
  const float rate = work.step->learning_rate;
  ForRows(work, [&](float* HWY_RESTRICT w, const float* HWY_RESTRICT gradient) HWY_ATTR {
    ForElements(dim, [&](auto d, size_t i) HWY_ATTR {
      const auto x = hn::LoadU(d, w + i);
      const auto g = hn::MulAdd(hn::Set(d, o.weight_decay), x, hn::LoadU(d, gradient + i));
      hn::StoreU(hn::NegMulAdd(hn::Set(d, rate), g, x), d, w + i);
    });
  });
}

void Momentum(const RowWork& work) {
  const RowOptimizer::Options& o = work.optimizer->options();
  const size_t dim = work.optimizer->dim();
  const float rate = work.step->learning_rate;
  ForRows(work, [&](float* HWY_RESTRICT w, const float* HWY_RESTRICT gradient) HWY_ATTR {
    float* const HWY_RESTRICT velocity = w + dim;
    ForElements(dim, [&](auto d, size_t i) HWY_ATTR {
      const auto x = hn::LoadU(d, w + i);
      const auto g = hn::MulAdd(hn::Set(d, o.weight_decay), x, hn::LoadU(d, gradient + i));
      const auto v = hn::MulAdd(hn::Set(d, o.momentum), hn::LoadU(d, velocity + i), g);
      hn::StoreU(v, d, velocity + i);
      hn::StoreU(hn::NegMulAdd(hn::Set(d, rate), v, x), d, w + i);
    });
  });
}

void Adagrad(const RowWork& work) {
  const RowOptimizer::Options& o = work.optimizer->options();
  const size_t dim = work.optimizer->dim();
  const float rate = work.step->learning_rate;
  ForRows(work, [&](float* HWY_RESTRICT w, const float* HWY_RESTRICT gradient) HWY_ATTR {
    float* const HWY_RESTRICT sums = w + dim;
    ForElements(dim, [&](auto d, size_t i) HWY_ATTR {
      const auto x = hn::LoadU(d, w + i);
      const auto g = hn::MulAdd(hn::Set(d, o.weight_decay), x, hn::LoadU(d, gradient + i));
      const auto s = hn::MulAdd(g, g, hn::LoadU(d, sums + i));
      hn::StoreU(s, d, sums + i);
      const auto change =
          hn::Div(hn::Mul(hn::Set(d, rate), g), hn::Add(hn::Sqrt(s), hn::Set(d, o.epsilon)));
      hn::StoreU(hn::Sub(x, change), d, w + i);
    });
  });
}

void Adam(const RowWork& work) {
  const RowOptimizer::Options& o = work.optimizer->options();
  const size_t dim = work.optimizer->dim();
  const RowOptimizer::Step& step = *work.step;
  ForRows(work, [&](float* HWY_RESTRICT w, const float* HWY_RESTRICT gradient) HWY_ATTR {
    float* const HWY_RESTRICT first = w + dim;
    float* const HWY_RESTRICT second = first + dim;
    ForElements(dim, [&](auto d, size_t i) HWY_ATTR {
      const auto x = hn::LoadU(d, w + i);
      const auto g = hn::MulAdd(hn::Set(d, o.weight_decay), x, hn::LoadU(d, gradient + i));
      const auto m = hn::MulAdd(hn::Set(d, o.beta1), hn::LoadU(d, first + i),
                                hn::Mul(hn::Set(d, 1.0f - o.beta1), g));
      const auto v = hn::MulAdd(hn::Set(d, o.beta2), hn::LoadU(d, second + i),
                                hn::Mul(hn::Set(d, 1.0f - o.beta2), hn::Mul(g, g)));
      hn::StoreU(m, d, first + i);
      hn::StoreU(v, d, second + i);
      const auto root = hn::Sqrt(hn::Mul(v, hn::Set(d, step.adam_correction2)));
      const auto change =
          hn::Div(hn::Mul(hn::Set(d, step.adam_rate), m), hn::Add(root, hn::Set(d, o.epsilon)));
      hn::StoreU(hn::Sub(x, change), d, w + i);
    });
  });
}

void Ftrl(const RowWork& work) {
  const RowOptimizer::Options& o = work.optimizer->options();
  const size_t dim = work.optimizer->dim();
  const float inverse_rate = 1.0f / work.step->learning_rate;
  ForRows(work, [&](float* HWY_RESTRICT w, const float* HWY_RESTRICT gradient) HWY_ATTR {
    float* const HWY_RESTRICT zs = w + dim;
    float* const HWY_RESTRICT ns = zs + dim;
    ForElements(dim, [&](auto d, size_t i) HWY_ATTR {
      const auto g = hn::LoadU(d, gradient + i);
      const auto n = hn::LoadU(d, ns + i);
      const auto new_n = hn::MulAdd(g, g, n);
      const auto root = hn::Sqrt(new_n);
      const auto per_rate = hn::Set(d, inverse_rate);
      const auto sigma = hn::Mul(hn::Sub(root, hn::Sqrt(n)), per_rate);
      const auto z = hn::NegMulAdd(sigma, hn::LoadU(d, w + i), hn::Add(hn::LoadU(d, zs + i), g));
      hn::StoreU(z, d, zs + i);
      hn::StoreU(new_n, d, ns + i);
      const auto divisor =
          hn::MulAdd(hn::Add(hn::Set(d, o.ftrl_beta), root), per_rate, hn::Set(d, o.l2));
      const auto l1 = hn::Set(d, o.l1);
      const auto shrunk = hn::Div(hn::Sub(hn::CopySign(l1, z), z), divisor);
      hn::StoreU(hn::IfThenElseZero(hn::Gt(hn::Abs(z), l1), shrunk), d, w + i);
    });
  });
}

void Apply(const RowWork& work) {
  switch (work.optimizer->options().kind) {
    case RowOptimizer::Kind::kSgd:
      return Sgd(work);
    case RowOptimizer::Kind::kMomentum:
      return Momentum(work);
    case RowOptimizer::Kind::kAdagrad:
      return Adagrad(work);
    case RowOptimizer::Kind::kAdam:
      return Adam(work);
    case RowOptimizer::Kind::kFtrl:
      return Ftrl(work);
  }
}

bool Finite(const float* x, int64_t n) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  // x * 0 is 0 for finite x and NaN for all others, which a sum keeps.
  auto sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) sum = hn::MulAdd(hn::LoadU(d, x + i), hn::Zero(d), sum);
  float rest = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < n; ++i) rest += x[i] * 0.0f;
  return rest == 0;
}

}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace codistill {
namespace internal {

HWY_EXPORT(Apply);
HWY_EXPORT(Finite);

void ApplyToRows(const RowWork& work) { HWY_DYNAMIC_DISPATCH(Apply)(work); }
bool AllFinite(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(Finite)(x, n); }

}  // namespace internal
}  // namespace codistill
#endif
