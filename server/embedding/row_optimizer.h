#ifndef CODISTILL_SERVER_EMBEDDING_ROW_OPTIMIZER_H_
#define CODISTILL_SERVER_EMBEDDING_ROW_OPTIMIZER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace codistill {

// The update of rows that have a gradient in a step; all others stay as they are ("lazy"). g is the
// gradient plus weight_decay * w.
//
//   SGD       w -= lr * g
//   MOMENTUM  v = momentum * v + g;  w -= lr * v
//   ADAGRAD   s += g^2;  w -= lr * g / (sqrt(s) + epsilon)                    (Duchi et al. 2011)
//   ADAM      Kingma and Ba 2015, algorithm 1; t is the table's step, not the row's count
//   FTRL      FTRL-Proximal with per-coordinate rates (McMahan et al. 2013, algorithm 1):
//             sigma = (sqrt(n + g^2) - sqrt(n)) / lr;  z += g - sigma * w;  n += g^2
//             w = 0 if |z| <= l1, else -(z - sign(z) * l1) / ((beta + sqrt(n)) / lr + l2)
//
// A row and its slots lie together: dim weights, then dim elements of each slot. Immutable,
// thread-safe.
class RowOptimizer {
 public:
  enum class Kind { kSgd, kMomentum, kAdagrad, kAdam, kFtrl };
  struct Options {
    Kind kind = Kind::kSgd;
    float weight_decay = 0;  // not for FTRL, which has l2
    float momentum = 0.9f;
    float beta1 = 0.9f;
    float beta2 = 0.999f;
    float epsilon = 1e-8f;          // ADAGRAD, ADAM
    float initial_accumulator = 0;  // ADAGRAD: s; FTRL: n
    float ftrl_beta = 1;
    float l1 = 0;
    float l2 = 0;
  };

  RowOptimizer(const Options& options, int dim);

  // INVALID_ARGUMENT naming the field and what would be right.
  static absl::Status Check(const Options& options);

  int dim() const { return dim_; }
  // Names of the slots in their order, as in checkpoints: none, "momentum", "accumulator", "m" and
  // "v", "z" and "n".
  std::vector<std::string> SlotNames() const;
  int num_slots() const { return num_slots_; }
  // Floats of a row with its slots.
  int row_floats() const { return dim_ * (1 + num_slots_); }

  // The parts of a step that are the same for all rows.
  struct Step {
    float learning_rate = 0;
    float adam_rate = 0;         // learning_rate / (1 - beta1^t)
    float adam_correction2 = 0;  // 1 / (1 - beta2^t)
  };
  Step MakeStep(double learning_rate, int64_t step) const;

  // Slots of a row whose weights are new. FTRL's z is such that the weights follow from it.
  void InitSlots(const Step& step, float* row) const;

  // Updates each row by `gradients[i]`, in order; rows may repeat.
  void Apply(const Step& step, absl::Span<float* const> rows,
             absl::Span<const float* const> gradients) const;

  const Options& options() const { return options_; }

 private:
  const Options options_;
  const int dim_;
  const int num_slots_;
};

// Whether all n elements are finite.
bool AllFinite(const float* x, int64_t n);

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_ROW_OPTIMIZER_H_
