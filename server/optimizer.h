#ifndef CODISTILL_SERVER_OPTIMIZER_H_
#define CODISTILL_SERVER_OPTIMIZER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "proto/job.pb.h"

namespace codistill {

// The element-wise update of one contiguous range of fp32 weights. An element's result depends on
// nothing but its own weight, gradient and slots, so ranges may be updated in any order, on any
// number of threads, and a tensor cut over shards is updated as if it were whole.
//
//   SGD       w -= lr * g
//   MOMENTUM  v = momentum * v + g;  w -= lr * v                      (as torch.optim.SGD)
//   NESTEROV  v = momentum * v + g;  w -= lr * (g + momentum * v)     (as torch.optim.SGD)
//   ADAGRAD   s += g^2;  w -= lr * g / (sqrt(s) + epsilon)            (Duchi et al. 2011)
//   ADAM      Kingma and Ba 2015, algorithm 1, with bias correction at step t
//   ADAMW     the same without decay in g;  w -= lr * weight_decay * w  (Loshchilov and Hutter)
//   LARS      v = momentum * v + lr * trust_ratio * g;  w -= v        (You et al. 2017)
//
// with g = gradient_scale * gradient + weight_decay * w (L2), in ADAMW without the second term.
// FTRL is an optimizer of rows of embedding tables, refused for dense parameters by validation:
// here it has no slots and changes nothing. Immutable, thread-safe.
class Optimizer {
 public:
  explicit Optimizer(const OptimizerConfig& config) : config_(config) {}

  // Names of the slots every trained element has, in the order Apply takes them: none, "momentum",
  // "sum" or "m" and "v". They are the names in checkpoints.
  std::vector<std::string> SlotNames() const;
  // What all slots start from: zero, or initial_accumulator.
  float InitialSlotValue() const;
  // OptimizerConfig.Kind by name: slots fit only the same kind.
  std::string KindName() const { return OptimizerConfig::Kind_Name(config_.kind()); }

  struct Step {
    double learning_rate = 0;
    double weight_decay = 0;    // 0 where the parameter takes none
    int64_t step = 1;           // from 1, for bias correction
    double gradient_scale = 1;  // what clipping leaves
    double trust_ratio = 1;     // LARS: TrustRatio of the whole tensor
  };
  // Reads the old weights and slots and writes the new ones. Everything has as many elements as
  // `weights`; an output is its own input (an update in place) or overlaps nothing. The gradient
  // may begin on any boundary.
  void Apply(const Step& step, absl::Span<const float> weights, absl::Span<const float> gradient,
             absl::Span<const float* const> slots, float* new_weights,
             absl::Span<float* const> new_slots) const;

  // Whether a step needs the norms of whole tensors before it is taken.
  bool NeedsTensorNorms() const { return config_.kind() == OptimizerConfig::LARS; }

  // LARS: trust_coefficient * |w| / (|g| + weight_decay * |w|), from the norms of one tensor; 1
  // where either is zero, as nothing can be told from it.
  double TrustRatio(double weight_norm, double gradient_norm, double weight_decay) const;

 private:
  const OptimizerConfig config_;
};

// to[i] = scale * from[i], and to[i] += scale * from[i]: the terms of an average in rank order.
void ScaleInto(float scale, absl::Span<const float> from, absl::Span<float> to);
void AddScaled(float scale, absl::Span<const float> from, absl::Span<float> to);

}  // namespace codistill

#endif  // CODISTILL_SERVER_OPTIMIZER_H_
