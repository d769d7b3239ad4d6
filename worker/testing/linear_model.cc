#include "worker/testing/linear_model.h"

#include <cstring>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "common/base/random.h"
#include "common/base/status.h"

namespace codistill {

LinearModel::LinearModel(int64_t inputs, int64_t outputs, bool recurrent, float noise,
                         int weight_sets)
    : inputs_(inputs), outputs_(outputs), recurrent_(recurrent), noise_(noise), sets_(weight_sets) {
  auto add = [this](const std::string& name, DataType dtype, TensorSpec::Role role,
                    std::vector<int64_t> shape) {
    TensorSpec* spec = tensors_.add_tensors();
    spec->set_name(name);
    spec->set_dtype(dtype);
    spec->set_role(role);
    for (int64_t dimension : shape) spec->add_shape(dimension);
    for (Set& set : sets_) {
      set.memory.push_back(Tensor::Zeros(dtype, shape));
      set.views.push_back({name, dtype, shape, set.memory.back().data()});
    }
  };
  add("w", DT_FLOAT, TensorSpec::PARAMETER, {inputs, outputs});
  add("b", DT_FLOAT, TensorSpec::PARAMETER, {outputs});
  add("seen", DT_INT64, TensorSpec::BUFFER, {1});
}

absl::StatusOr<Model::Logits> LinearModel::Run(const Tensor& x, States* states) const {
  const int64_t rows = x.shape()[0];
  Logits logits;
  logits.rows = rows;
  logits.values = Tensor::Allocate(DT_FLOAT, {rows, outputs_});
  const std::vector<Tensor>& memory = sets_[set_].memory;
  const absl::Span<const float> w = memory[0].As<float>(), b = memory[1].As<float>();
  const absl::Span<const float> in = x.As<float>();
  const absl::Span<float> out = logits.values.As<float>();
  Tensor next;
  if (recurrent_) {
    if (states == nullptr) return absl::InvalidArgumentError("no states");
    next = Tensor::Zeros(DT_FLOAT, {1, rows, 1});
    if (!states->empty()) std::memcpy(next.data(), (*states)[0].data(), next.bytes());
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outputs_; ++o) {
      float sum = b[o];
      for (int64_t i = 0; i < inputs_; ++i) sum += in[r * inputs_ + i] * w[i * outputs_ + o];
      // Not the same for all outputs: a softmax would not see it.
      if (recurrent_) sum += next.As<float>()[r] * static_cast<float>(o) * 0.01f;
      out[r * outputs_ + o] = sum;
    }
  }
  if (recurrent_) {
    for (float& value : next.As<float>()) value += 1;
    *states = {next};
  }
  return logits;
}

absl::StatusOr<Model::Logits> LinearModel::Predict(absl::Span<const Tensor> inputs,
                                                   States* states) const {
  return Run(inputs[0], states);
}

absl::StatusOr<Model::Logits> LinearModel::Forward(absl::Span<const Tensor> inputs, States* states,
                                                   uint64_t seed) {
  seeds_.push_back(seed);
  first_states_.push_back(states == nullptr || states->empty() ? 0 : (*states)[0].As<float>()[0]);
  x_ = Tensor::Allocate(DT_FLOAT, inputs[0].shape());
  std::memcpy(x_.data(), inputs[0].data(), x_.bytes());
  RandomStream random(seed);
  for (float& value : x_.As<float>()) value += noise_ * static_cast<float>(random.Normal());
  ++sets_[set_].memory[2].As<int64_t>()[0];
  return Run(x_, states);
}

std::vector<Tensor> LinearModel::Gradients(const Tensor& gradient) {
  const int64_t rows = x_.shape()[0];
  std::vector<Tensor> sums = std::move(kept_);
  kept_.clear();
  if (sums.empty()) {
    sums = {Tensor::Zeros(DT_FLOAT, {inputs_, outputs_}), Tensor::Zeros(DT_FLOAT, {outputs_})};
  }
  const absl::Span<float> dw = sums[0].As<float>(), db = sums[1].As<float>();
  const absl::Span<const float> g = gradient.As<float>();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outputs_; ++o) {
      db[o] += g[r * outputs_ + o];
      for (int64_t i = 0; i < inputs_; ++i) {
        dw[i * outputs_ + o] += x_.As<float>()[r * inputs_ + i] * g[r * outputs_ + o];
      }
    }
  }
  return sums;
}

absl::Status LinearModel::Backward(const Tensor& gradient, const OnGradient& on_gradient) {
  const std::vector<Tensor> sums = Gradients(gradient);
  on_gradient(1, sums[1].As<float>().data(), sums[1].owner());
  on_gradient(0, sums[0].As<float>().data(), sums[0].owner());
  return absl::OkStatus();
}

absl::Status LinearModel::Accumulate(const Tensor& gradient) {
  kept_ = Gradients(gradient);
  return absl::OkStatus();
}

}  // namespace codistill
