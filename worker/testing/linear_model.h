#ifndef CODISTILL_WORKER_TESTING_LINEAR_MODEL_H_
#define CODISTILL_WORKER_TESTING_LINEAR_MODEL_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "common/model/model.h"

namespace codistill {

// A model without libtorch: logits = (x + noise) W + b + h, where `noise` is seeded (as dropout is)
// and h is an optional recurrent state [1, examples, 1] that grows by one each pass. Tensors, in
// order: "w" [inputs, outputs] and "b" [outputs], parameters; "seen" INT64 [1], a buffer that
// counts training passes.
class LinearModel : public Model {
 public:
  LinearModel(int64_t inputs, int64_t outputs, bool recurrent, float noise = 0,
              int weight_sets = 1);

  const TensorList& tensors() const override { return tensors_; }
  absl::Span<const TensorView> storage() const override { return sets_[set_].views; }
  int weight_sets() const override { return static_cast<int>(sets_.size()); }
  absl::Span<const TensorView> storage(int set) const override { return sets_[set].views; }
  absl::Status UseWeights(int set) override {
    set_ = set;
    return absl::OkStatus();
  }
  absl::StatusOr<Logits> Predict(absl::Span<const Tensor> inputs, States* states) const override;
  absl::StatusOr<Logits> Forward(absl::Span<const Tensor> inputs, States* states,
                                 uint64_t seed) override;
  absl::Status Backward(const Tensor& gradient, const OnGradient& on_gradient) override;
  absl::Status Accumulate(const Tensor& gradient) override;
  void ForgetGradients() override { kept_.clear(); }

  // What Forward was given, call by call.
  const std::vector<uint64_t>& seeds() const { return seeds_; }
  const std::vector<float>& first_states() const { return first_states_; }

 private:
  absl::StatusOr<Logits> Run(const Tensor& x, States* states) const;
  // Of "w" and "b", those kept included.
  std::vector<Tensor> Gradients(const Tensor& gradient);

  const int64_t inputs_;
  const int64_t outputs_;
  const bool recurrent_;
  const float noise_;
  TensorList tensors_;
  struct Set {
    std::vector<Tensor> memory;
    std::vector<TensorView> views;
  };
  std::vector<Set> sets_;
  int set_ = 0;               // in use
  Tensor x_;                  // of the last Forward
  std::vector<Tensor> kept_;  // by Accumulate; none, or as Gradients
  std::vector<uint64_t> seeds_;
  std::vector<float> first_states_;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TESTING_LINEAR_MODEL_H_
