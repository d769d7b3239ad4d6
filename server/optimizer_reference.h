#ifndef CODISTILL_SERVER_OPTIMIZER_REFERENCE_H_
#define CODISTILL_SERVER_OPTIMIZER_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <limits>

#include "proto/job.pb.h"
#include "server/optimizer.h"

// For tests and benchmarks: what an update should have been.
namespace codistill {

// One element in double precision, as the papers write it: nothing is rearranged or taken into a
// factor. `largest` is the largest term that any sum of the last update had in it.
struct ReferenceElement {
  OptimizerConfig config;
  double w = 0;
  double slots[2] = {0, 0};
  double largest_w = 0;
  double largest_slots[2] = {0, 0};

  void Apply(double gradient, const Optimizer::Step& step) {
    const double lr = step.learning_rate, decay = step.weight_decay;
    const double old = w;
    const double scaled = step.gradient_scale * gradient;
    const bool decoupled = config.kind() == OptimizerConfig::ADAMW;
    const double g = decoupled ? scaled : scaled + decay * w;
    const double largest_g =
        std::max({std::abs(scaled), decoupled ? 0.0 : std::abs(decay * w), std::abs(g)});
    double change = 0;
    double largest_change = 0;  // as the largest terms of what it is made of make it
    switch (config.kind()) {
      case OptimizerConfig::SGD:
        change = -lr * g;
        largest_change = lr * largest_g;
        break;
      case OptimizerConfig::MOMENTUM:
      case OptimizerConfig::NESTEROV: {
        const double mu = config.momentum();
        largest_slots[0] = std::max(std::abs(mu * slots[0]), largest_g);
        slots[0] = mu * slots[0] + g;
        const bool nesterov = config.kind() == OptimizerConfig::NESTEROV;
        change = -lr * (nesterov ? g + mu * slots[0] : slots[0]);
        largest_change = lr * std::max(largest_slots[0], largest_g);
        break;
      }
      case OptimizerConfig::LARS: {
        const double mu = config.momentum(), local = step.trust_ratio * lr;
        largest_slots[0] = std::max(std::abs(mu * slots[0]), local * largest_g);
        slots[0] = mu * slots[0] + local * g;
        change = -slots[0];
        largest_change = largest_slots[0];
        break;
      }
      case OptimizerConfig::ADAGRAD:
        largest_slots[0] = std::max(slots[0], largest_g * largest_g);
        slots[0] += g * g;
        change = -lr * g / (std::sqrt(slots[0]) + config.epsilon());
        largest_change = lr * largest_g / (std::sqrt(slots[0]) + config.epsilon());
        break;
      case OptimizerConfig::ADAM:
      case OptimizerConfig::ADAMW: {
        const double b1 = config.beta1(), b2 = config.beta2();
        const double t = static_cast<double>(step.step);
        largest_slots[0] = std::max(std::abs(b1 * slots[0]), (1 - b1) * largest_g);
        largest_slots[1] = std::max(b2 * slots[1], (1 - b2) * largest_g * largest_g);
        slots[0] = b1 * slots[0] + (1 - b1) * g;
        slots[1] = b2 * slots[1] + (1 - b2) * g * g;
        const double denominator = std::sqrt(slots[1] / (1 - std::pow(b2, t))) + config.epsilon();
        const double corrected = slots[0] / (1 - std::pow(b1, t));
        if (decoupled) change -= lr * decay * w;
        change -= lr * corrected / denominator;
        largest_change = std::max(lr * largest_slots[0] / (1 - std::pow(b1, t)) / denominator,
                                  decoupled ? std::abs(lr * decay * w) : 0.0);
        break;
      }
      case OptimizerConfig::FTRL:  // no optimizer of dense parameters
        break;
    }
    w += change;
    largest_w = std::max({std::abs(old), largest_change, std::abs(w)});
  }
};

// Units in the last place of a float as large as `scale` between the two.
inline double UlpsApart(float actual, double expected, double scale) {
  if (scale == 0) return actual == expected ? 0 : std::numeric_limits<double>::infinity();
  const float base = static_cast<float>(std::abs(scale));
  const double unit = static_cast<double>(std::nextafter(base, HUGE_VALF)) - base;
  return std::abs(actual - expected) / unit;
}

}  // namespace codistill

#endif  // CODISTILL_SERVER_OPTIMIZER_REFERENCE_H_
