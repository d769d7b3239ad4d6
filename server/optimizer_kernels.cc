#include "server/optimizer_kernels.h"

#include <cstdint>
#include <cstring>

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "server/optimizer_kernels.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// What one vector of each stream holds, before and after.
template <class V>
struct Lanes {
  V g, w;
  V slots[kMaxSlots];
};

// The rules: factors spread over a vector `D`, and one update of all lanes. Every product that is
// added goes through MulAdd, so that vectors and tails round alike.
template <class D>
struct Rule {
  using V = hn::Vec<D>;
  Rule(D tag, const UpdateFactors& f)
      : d(tag),
        gradient_scale(hn::Set(d, f.gradient_scale)),
        decay(hn::Set(d, f.decay)),
        minus_rate(hn::Set(d, -f.rate)) {}
  HWY_INLINE V Gradient(const Lanes<V>& x) const {
    return hn::MulAdd(decay, x.w, hn::Mul(gradient_scale, x.g));
  }
  const D d;
  const V gradient_scale, decay, minus_rate;
};

template <class D>
struct Sgd : Rule<D> {
  static constexpr int kSlots = 0;
  using V = hn::Vec<D>;
  Sgd(D d, const UpdateFactors& f) : Rule<D>(d, f) {}
  HWY_INLINE void Apply(Lanes<V>* x) const {
    x->w = hn::MulAdd(this->minus_rate, this->Gradient(*x), x->w);
  }
};

template <class D>
struct Momentum : Rule<D> {
  static constexpr int kSlots = 1;
  using V = hn::Vec<D>;
  Momentum(D d, const UpdateFactors& f)
      : Rule<D>(d, f), first(hn::Set(d, f.first)), first_rest(hn::Set(d, f.first_rest)) {}
  HWY_INLINE void Apply(Lanes<V>* x) const {
    const V g = hn::Mul(first_rest, this->Gradient(*x));
    x->slots[0] = hn::MulAdd(first, x->slots[0], g);
    x->w = hn::MulAdd(this->minus_rate, x->slots[0], x->w);
  }
  const V first, first_rest;
};

template <class D>
struct Nesterov : Rule<D> {
  static constexpr int kSlots = 1;
  using V = hn::Vec<D>;
  Nesterov(D d, const UpdateFactors& f) : Rule<D>(d, f), first(hn::Set(d, f.first)) {}
  HWY_INLINE void Apply(Lanes<V>* x) const {
    const V g = this->Gradient(*x);
    x->slots[0] = hn::MulAdd(first, x->slots[0], g);
    x->w = hn::MulAdd(this->minus_rate, hn::MulAdd(first, x->slots[0], g), x->w);
  }
  const V first;
};

template <class D>
struct Adagrad : Rule<D> {
  static constexpr int kSlots = 1;
  using V = hn::Vec<D>;
  Adagrad(D d, const UpdateFactors& f) : Rule<D>(d, f), epsilon(hn::Set(d, f.epsilon)) {}
  HWY_INLINE void Apply(Lanes<V>* x) const {
    const V g = this->Gradient(*x);
    x->slots[0] = hn::MulAdd(g, g, x->slots[0]);
    const V part = hn::Div(g, hn::Add(hn::Sqrt(x->slots[0]), epsilon));
    x->w = hn::MulAdd(this->minus_rate, part, x->w);
  }
  const V epsilon;
};

template <class D>
struct Adam : Rule<D> {
  static constexpr int kSlots = 2;
  using V = hn::Vec<D>;
  Adam(D d, const UpdateFactors& f)
      : Rule<D>(d, f),
        keep(hn::Set(d, f.keep)),
        first(hn::Set(d, f.first)),
        first_rest(hn::Set(d, f.first_rest)),
        second(hn::Set(d, f.second)),
        second_rest(hn::Set(d, f.second_rest)),
        correction(hn::Set(d, f.correction)),
        epsilon(hn::Set(d, f.epsilon)) {}
  HWY_INLINE void Apply(Lanes<V>* x) const {
    const V g = this->Gradient(*x);
    x->slots[0] = hn::MulAdd(first, x->slots[0], hn::Mul(first_rest, g));
    x->slots[1] = hn::MulAdd(second, x->slots[1], hn::Mul(second_rest, hn::Mul(g, g)));
    const V root = hn::Sqrt(hn::Mul(correction, x->slots[1]));
    const V part = hn::Div(x->slots[0], hn::Add(root, epsilon));
    x->w = hn::MulAdd(this->minus_rate, part, hn::Mul(keep, x->w));
  }
  const V keep, first, first_rest, second, second_rest, correction, epsilon;
};

template <bool kStream, class D, class V>
HWY_INLINE void Write(D d, V value, float* to) {
  if (kStream) {
    hn::Stream(value, d, to);
  } else {
    hn::StoreU(value, d, to);
  }
}

// One vector of every stream: everything is loaded before anything is stored, so that no load waits
// for a store to an address 4 KiB multiples away.
template <class R, bool kStream, class D>
HWY_INLINE void UpdateVectors(D d, const R& rule, const UpdateRange& range, size_t i) {
  Lanes<hn::Vec<D>> x;
  if (hn::MaxLanes(D()) == 1) {
    float gradient;  // of one that lies on no boundary there is only a copy
    std::memcpy(&gradient, range.gradient + i, sizeof(gradient));
    x.g = hn::Set(d, gradient);
  } else {
    x.g = hn::LoadU(d, range.gradient + i);
  }
  x.w = hn::LoadU(d, range.weights + i);
  for (int s = 0; s < R::kSlots; ++s) x.slots[s] = hn::LoadU(d, range.slots[s] + i);
  rule.Apply(&x);
  Write<kStream>(d, x.w, range.new_weights + i);
  for (int s = 0; s < R::kSlots; ++s) Write<kStream>(d, x.slots[s], range.new_slots[s] + i);
}

// Memory is asked for so many elements ahead: one core's own prefetching leaves a third of what the
// memory could bring (read alone, 16 ms against 23 ms for 256 MiB).
constexpr size_t kAhead = 1024;

template <template <class> class R, bool kStream>
void UpdateAll(const UpdateFactors& factors, const UpdateRange& range) {
  const hn::ScalableTag<float> d;
  const R<hn::ScalableTag<float>> rule(d, factors);
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= range.size; i += lanes) {
    hwy::Prefetch(range.gradient + i + kAhead);
    hwy::Prefetch(range.weights + i + kAhead);
    for (int s = 0; s < R<hn::ScalableTag<float>>::kSlots; ++s) {
      hwy::Prefetch(range.slots[s] + i + kAhead);
    }
    UpdateVectors<R<hn::ScalableTag<float>>, kStream>(d, rule, range, i);
  }
  const hn::CappedTag<float, 1> one;
  const R<hn::CappedTag<float, 1>> tail(one, factors);
  for (; i < range.size; ++i) {
    UpdateVectors<R<hn::CappedTag<float, 1>>, false>(one, tail, range, i);
  }
}

bool IsAligned(const float* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 64 == 0; }

// Written elsewhere than read: past the caches, which saves reading what is overwritten.
bool MayStream(const UpdateRange& range, int slots) {
  bool may = range.new_weights != range.weights && IsAligned(range.new_weights);
  for (int s = 0; s < slots; ++s) {
    may = may && range.new_slots[s] != range.slots[s] && IsAligned(range.new_slots[s]);
  }
  return may;
}

template <template <class> class R>
void Update(const UpdateFactors& factors, const UpdateRange& range) {
  if (MayStream(range, R<hn::ScalableTag<float>>::kSlots)) {
    UpdateAll<R, true>(factors, range);
    hwy::FlushStream();  // ordered before whatever tells a reader
  } else {
    UpdateAll<R, false>(factors, range);
  }
}

void UpdateSgd(const UpdateFactors& f, const UpdateRange& range) { Update<Sgd>(f, range); }
void UpdateMomentum(const UpdateFactors& f, const UpdateRange& range) {
  Update<Momentum>(f, range);
}
void UpdateNesterov(const UpdateFactors& f, const UpdateRange& range) {
  Update<Nesterov>(f, range);
}
void UpdateAdagrad(const UpdateFactors& f, const UpdateRange& range) { Update<Adagrad>(f, range); }
void UpdateAdam(const UpdateFactors& f, const UpdateRange& range) { Update<Adam>(f, range); }

void ScaleInto(float scale, size_t size, const float* from, float* to) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  const auto factor = hn::Set(d, scale);
  size_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    hn::StoreU(hn::Mul(factor, hn::LoadU(d, from + i)), d, to + i);
  }
  for (; i < size; ++i) to[i] = scale * from[i];
}

void AddScaled(float scale, size_t size, const float* from, float* to) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  const auto factor = hn::Set(d, scale);
  for (; i + lanes <= size; i += lanes) {
    hn::StoreU(hn::MulAdd(factor, hn::LoadU(d, from + i), hn::LoadU(d, to + i)), d, to + i);
  }
  const hn::CappedTag<float, 1> one;
  for (; i < size; ++i) {
    hn::StoreU(hn::MulAdd(hn::Set(one, scale), hn::LoadU(one, from + i), hn::LoadU(one, to + i)),
               one, to + i);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace codistill {
namespace internal {

namespace {

// While alive, what is too small for a normal float is zero on this thread: a moment that dies away
// would stay a denormal for ever, and arithmetic on those costs a hundred cycles each.
class FlushDenormals {
 public:
#if HWY_ARCH_X86
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

}  // namespace

HWY_EXPORT(UpdateSgd);
HWY_EXPORT(UpdateMomentum);
HWY_EXPORT(UpdateNesterov);
HWY_EXPORT(UpdateAdagrad);
HWY_EXPORT(UpdateAdam);
HWY_EXPORT(ScaleInto);
HWY_EXPORT(AddScaled);

void UpdateSgd(const UpdateFactors& factors, const UpdateRange& range) {
  const FlushDenormals flush;
  HWY_DYNAMIC_DISPATCH(UpdateSgd)(factors, range);
}
void UpdateMomentum(const UpdateFactors& factors, const UpdateRange& range) {
  const FlushDenormals flush;
  HWY_DYNAMIC_DISPATCH(UpdateMomentum)(factors, range);
}
void UpdateNesterov(const UpdateFactors& factors, const UpdateRange& range) {
  const FlushDenormals flush;
  HWY_DYNAMIC_DISPATCH(UpdateNesterov)(factors, range);
}
void UpdateAdagrad(const UpdateFactors& factors, const UpdateRange& range) {
  const FlushDenormals flush;
  HWY_DYNAMIC_DISPATCH(UpdateAdagrad)(factors, range);
}
void UpdateAdam(const UpdateFactors& factors, const UpdateRange& range) {
  const FlushDenormals flush;
  HWY_DYNAMIC_DISPATCH(UpdateAdam)(factors, range);
}
void ScaleInto(float scale, size_t size, const float* from, float* to) {
  HWY_DYNAMIC_DISPATCH(ScaleInto)(scale, size, from, to);
}
void AddScaled(float scale, size_t size, const float* from, float* to) {
  HWY_DYNAMIC_DISPATCH(AddScaled)(scale, size, from, to);
}

}  // namespace internal
}  // namespace codistill
#endif  // HWY_ONCE
