#include "server/optimizer.h"

#include <cmath>
#include <cstddef>

namespace codistill {
namespace {

// The loops below are all there is to vectorise: one pass, no branch. An output may be its own
// input but overlaps nothing else, so no iteration depends on another. This file is compiled with
// -O3 in every configuration.

void ApplySgd(float lr, float decay, size_t n, const float* w, const float* g, float* to) {
#pragma GCC ivdep
  for (size_t i = 0; i < n; ++i) to[i] = w[i] - lr * (g[i] + decay * w[i]);
}

void ApplyMomentum(float lr, float decay, float momentum, size_t n, const float* w, const float* g,
                   const float* v, float* to, float* new_v) {
#pragma GCC ivdep
  for (size_t i = 0; i < n; ++i) {
    const float velocity = momentum * v[i] + (g[i] + decay * w[i]);
    new_v[i] = velocity;
    to[i] = w[i] - lr * velocity;
  }
}

// `correction2` is 1 / (1 - beta2^t) and `rate` lr / (1 - beta1^t): both corrections cost no
// division an element.
void ApplyAdam(float rate, float correction2, float decay, float beta1, float beta2, float epsilon,
               size_t n, const float* w, const float* g, const float* m, const float* v, float* to,
               float* new_m, float* new_v) {
  const float one_minus_beta1 = 1.0f - beta1;
  const float one_minus_beta2 = 1.0f - beta2;
#pragma GCC ivdep
  for (size_t i = 0; i < n; ++i) {
    const float gradient = g[i] + decay * w[i];
    const float first = beta1 * m[i] + one_minus_beta1 * gradient;
    const float second = beta2 * v[i] + one_minus_beta2 * gradient * gradient;
    new_m[i] = first;
    new_v[i] = second;
    to[i] = w[i] - rate * first / (std::sqrt(second * correction2) + epsilon);
  }
}

}  // namespace

std::vector<std::string> Optimizer::SlotNames() const {
  switch (config_.kind()) {
    case OptimizerConfig::SGD:
      return {};
    case OptimizerConfig::MOMENTUM:
      return {"momentum"};
    case OptimizerConfig::ADAM:
      return {"m", "v"};
    default:  // validation refuses what is not here yet
      break;
  }
  return {};
}

void Optimizer::Apply(const Step& step, absl::Span<const float> weights,
                      absl::Span<const float> gradient, absl::Span<const float* const> slots,
                      float* new_weights, absl::Span<float* const> new_slots) const {
  const size_t n = weights.size();
  const float lr = static_cast<float>(step.learning_rate);
  const float decay = static_cast<float>(step.weight_decay);
  switch (config_.kind()) {
    case OptimizerConfig::SGD:
      ApplySgd(lr, decay, n, weights.data(), gradient.data(), new_weights);
      return;
    case OptimizerConfig::MOMENTUM:
      ApplyMomentum(lr, decay, config_.momentum(), n, weights.data(), gradient.data(), slots[0],
                    new_weights, new_slots[0]);
      return;
    case OptimizerConfig::ADAM: {
      const double t = static_cast<double>(step.step);
      const double beta1 = config_.beta1(), beta2 = config_.beta2();
      const float rate = static_cast<float>(step.learning_rate / (1.0 - std::pow(beta1, t)));
      const float correction2 = static_cast<float>(1.0 / (1.0 - std::pow(beta2, t)));
      ApplyAdam(rate, correction2, decay, config_.beta1(), config_.beta2(), config_.epsilon(), n,
                weights.data(), gradient.data(), slots[0], slots[1], new_weights, new_slots[0],
                new_slots[1]);
      return;
    }
    default:
      return;
  }
}

void ScaleInto(float scale, absl::Span<const float> from, absl::Span<float> to) {
  const float* __restrict source = from.data();
  float* __restrict target = to.data();
  for (size_t i = 0; i < to.size(); ++i) target[i] = scale * source[i];
}

void AddScaled(float scale, absl::Span<const float> from, absl::Span<float> to) {
  const float* __restrict source = from.data();
  float* __restrict target = to.data();
  for (size_t i = 0; i < to.size(); ++i) target[i] += scale * source[i];
}

}  // namespace codistill
