#include "server/optimizer.h"

#include <cmath>
#include <cstddef>

#include "server/optimizer_kernels.h"

namespace codistill {

std::vector<std::string> Optimizer::SlotNames() const {
  switch (config_.kind()) {
    case OptimizerConfig::SGD:
    case OptimizerConfig::FTRL:
      return {};
    case OptimizerConfig::MOMENTUM:
    case OptimizerConfig::NESTEROV:
    case OptimizerConfig::LARS:
      return {"momentum"};
    case OptimizerConfig::ADAGRAD:
      return {"sum"};
    case OptimizerConfig::ADAM:
    case OptimizerConfig::ADAMW:
      return {"m", "v"};
  }
  return {};
}

float Optimizer::InitialSlotValue() const {
  return config_.kind() == OptimizerConfig::ADAGRAD ? config_.initial_accumulator() : 0.0f;
}

void Optimizer::Apply(const Step& step, absl::Span<const float> weights,
                      absl::Span<const float> gradient, absl::Span<const float* const> slots,
                      float* new_weights, absl::Span<float* const> new_slots) const {
  internal::UpdateRange range;
  range.size = weights.size();
  range.gradient = gradient.data();
  range.weights = weights.data();
  range.new_weights = new_weights;
  for (size_t s = 0; s < slots.size() && s < internal::kMaxSlots; ++s) {
    range.slots[s] = slots[s];
    range.new_slots[s] = new_slots[s];
  }

  // All in double: 1 - beta2 in float arithmetic has lost half its digits.
  internal::UpdateFactors factors;
  factors.gradient_scale = static_cast<float>(step.gradient_scale);
  factors.decay = static_cast<float>(step.weight_decay);
  factors.rate = static_cast<float>(step.learning_rate);
  factors.first = config_.momentum();
  factors.first_rest = 1;
  factors.epsilon = config_.epsilon();
  switch (config_.kind()) {
    case OptimizerConfig::SGD:
      internal::UpdateSgd(factors, range);
      return;
    case OptimizerConfig::MOMENTUM:
      internal::UpdateMomentum(factors, range);
      return;
    case OptimizerConfig::NESTEROV:
      internal::UpdateNesterov(factors, range);
      return;
    case OptimizerConfig::LARS:
      // The rate is in the velocity, so that it keeps each step's own.
      factors.first_rest = static_cast<float>(step.learning_rate * step.trust_ratio);
      factors.rate = 1;
      internal::UpdateMomentum(factors, range);
      return;
    case OptimizerConfig::ADAGRAD:
      internal::UpdateAdagrad(factors, range);
      return;
    case OptimizerConfig::ADAM:
    case OptimizerConfig::ADAMW: {
      // Both bias corrections go into factors, so that they cost no division an element.
      const double t = static_cast<double>(step.step);
      const double beta1 = config_.beta1(), beta2 = config_.beta2();
      factors.rate = static_cast<float>(step.learning_rate / (1.0 - std::pow(beta1, t)));
      factors.first = config_.beta1();
      factors.first_rest = static_cast<float>(1.0 - beta1);
      factors.second = config_.beta2();
      factors.second_rest = static_cast<float>(1.0 - beta2);
      factors.correction = static_cast<float>(1.0 / (1.0 - std::pow(beta2, t)));
      if (config_.kind() == OptimizerConfig::ADAMW) {
        factors.decay = 0;
        factors.keep = static_cast<float>(1.0 - step.learning_rate * step.weight_decay);
      }
      internal::UpdateAdam(factors, range);
      return;
    }
    case OptimizerConfig::FTRL:
      return;
  }
}

double Optimizer::TrustRatio(double weight_norm, double gradient_norm, double weight_decay) const {
  if (!(weight_norm > 0) || !(gradient_norm > 0)) return 1;
  return config_.trust_coefficient() * weight_norm / (gradient_norm + weight_decay * weight_norm);
}

void ScaleInto(float scale, absl::Span<const float> from, absl::Span<float> to) {
  internal::ScaleInto(scale, to.size(), from.data(), to.data());
}

void AddScaled(float scale, absl::Span<const float> from, absl::Span<float> to) {
  internal::AddScaled(scale, to.size(), from.data(), to.data());
}

}  // namespace codistill
