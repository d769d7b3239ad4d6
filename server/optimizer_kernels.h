#ifndef CODISTILL_SERVER_OPTIMIZER_KERNELS_H_
#define CODISTILL_SERVER_OPTIMIZER_KERNELS_H_

#include <cstddef>

// The vector loops under server/ optimizer.h, chosen at run time for the processor (Highway). An
// element's result is the same in a vector and in the tail of a range.
namespace codistill {
namespace internal {

inline constexpr int kMaxSlots = 2;

// Where one range of elements is read from and written to; a `to` may be its own `from`, apart from
// that nothing overlaps.
struct UpdateRange {
  size_t size = 0;
  const float* gradient = nullptr;  // on any boundary
  const float* weights = nullptr;
  const float* slots[kMaxSlots] = {};
  float* new_weights = nullptr;
  float* new_slots[kMaxSlots] = {};
};

// Factors of the rules, worked out in double precision once a call. g = gradient_scale * gradient +
// decay * w.
struct UpdateFactors {
  float gradient_scale = 1;
  float decay = 0;
  float rate = 0;
  float keep = 1;         // decoupled decay: what is left of w
  float first = 0;        // momentum, or beta1
  float first_rest = 0;   // 1 - beta1, or what multiplies g in the velocity
  float second = 0;       // beta2
  float second_rest = 0;  // 1 - beta2
  float correction = 1;   // on the second moment
  float epsilon = 0;
};

void UpdateSgd(const UpdateFactors& factors, const UpdateRange& range);
// v' = first v + first_rest g; w' = w - rate v'
void UpdateMomentum(const UpdateFactors& factors, const UpdateRange& range);
// v' as momentum; w' = w - rate (g + first v')
void UpdateNesterov(const UpdateFactors& factors, const UpdateRange& range);
// s' = s + g^2; w' = w - rate g / (sqrt(s') + epsilon)
void UpdateAdagrad(const UpdateFactors& factors, const UpdateRange& range);
// m' = first m + first_rest g; v' = second v + second_rest g^2;
// w' = keep w - rate m' / (sqrt(correction v') + epsilon)
void UpdateAdam(const UpdateFactors& factors, const UpdateRange& range);

// to = scale * from, and to += scale * from.
void ScaleInto(float scale, size_t size, const float* from, float* to);
void AddScaled(float scale, size_t size, const float* from, float* to);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_SERVER_OPTIMIZER_KERNELS_H_
