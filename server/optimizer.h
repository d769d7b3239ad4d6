#ifndef CODISTILL_SERVER_OPTIMIZER_H_
#define CODISTILL_SERVER_OPTIMIZER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "proto/job.pb.h"

namespace codistill {

// The element-wise update of one contiguous range of fp32 weights. An element's result depends on
// nothing but its own weight, gradient and slots, so ranges may be updated in any order and a
// tensor cut over shards is updated as if it were whole.
//
//   SGD       w -= lr * g
//   MOMENTUM  v = momentum * v + g;  w -= lr * v
//   ADAM      Kingma and Ba 2015, algorithm 1, with bias correction at step t
//
// with g = gradient + weight_decay * w (L2, not decoupled). Immutable, thread-safe.
class Optimizer {
 public:
  explicit Optimizer(const OptimizerConfig& config) : config_(config) {}

  // Names of the slots every trained element has, in the order Apply takes them: none, "momentum",
  // or "m" and "v". They are the names in checkpoints; slots start as zeros.
  std::vector<std::string> SlotNames() const;
  // OptimizerConfig.Kind by name: slots fit only the same kind.
  std::string KindName() const { return OptimizerConfig::Kind_Name(config_.kind()); }

  struct Step {
    double learning_rate = 0;
    double weight_decay = 0;  // 0 where the parameter takes none
    int64_t step = 1;         // from 1, for bias correction
  };
  // Reads the old weights and slots and writes the new ones. Everything has as many elements as
  // `weights`; an output is its own input (an update in place) or overlaps nothing.
  void Apply(const Step& step, absl::Span<const float> weights, absl::Span<const float> gradient,
             absl::Span<const float* const> slots, float* new_weights,
             absl::Span<float* const> new_slots) const;

 private:
  const OptimizerConfig config_;
};

// to[i] = scale * from[i], and to[i] += scale * from[i]: the terms of an average in rank order.
void ScaleInto(float scale, absl::Span<const float> from, absl::Span<float> to);
void AddScaled(float scale, absl::Span<const float> from, absl::Span<float> to);

}  // namespace codistill

#endif  // CODISTILL_SERVER_OPTIMIZER_H_
