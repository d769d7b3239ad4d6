#include "tests/conformance/torch_loss.h"

#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace codistill {
namespace {

using torch::Tensor;

torch::ScalarType TypeOf(NumberFormat format) {
  switch (format) {
    case NumberFormat::kFloat16:
      return torch::kFloat16;
    case NumberFormat::kBfloat16:
      return torch::kBFloat16;
    case NumberFormat::kInt8:
      return torch::kInt8;
    case NumberFormat::kFloat32:
      break;
  }
  return torch::kFloat32;
}

Tensor View(const void* data, torch::IntArrayRef shape, torch::ScalarType type) {
  return torch::from_blob(const_cast<void*>(data), shape, type);
}

// The two outcomes of a binary decision in a new last dimension.
Tensor LogBinary(const Tensor& x) {
  return torch::stack({torch::log_sigmoid(x), torch::log_sigmoid(-x)}, -1);
}

// Sums over the classes, and for decisions over the outcomes and the mean over the classes.
Tensor PerRow(const Tensor& terms, bool binary) {
  return binary ? terms.sum(-1).mean(-1) : terms.sum(-1);
}

class Composite {
 public:
  Composite(const LossOptions& options, const LossInputs& inputs)
      : options_(options),
        inputs_(inputs),
        binary_(options.label_loss == LossOptions::kSigmoidCrossEntropy),
        shape_({inputs.rows, inputs.classes}) {}

  TorchLoss Compute() {
    const Tensor leaf =
        View(inputs_.logits, shape_, TypeOf(inputs_.logits_format)).clone().requires_grad_(true);
    const Tensor z = leaf.to(torch::kFloat32);
    const Tensor weight = Weights();
    const Tensor counts = weight > 0;
    const Tensor none = torch::zeros({inputs_.rows});
    const Tensor phi = torch::where(counts, LabelLoss(z), none) * weight;
    const Tensor psi =
        inputs_.teacher_weight > 0 ? torch::where(counts, TeacherLoss(z), none) * weight : none;
    const Tensor loss =
        (phi.sum() + inputs_.teacher_weight * psi.sum()) / weight.sum() * inputs_.gradient_scale;
    const Tensor slope = torch::autograd::grad({loss}, {leaf})[0].to(torch::kFloat32).contiguous();
    TorchLoss result;
    result.label_loss_sum = phi.to(torch::kFloat64).sum().item<double>();
    result.teacher_loss_sum = psi.to(torch::kFloat64).sum().item<double>();
    const float* const values = slope.data_ptr<float>();
    result.gradient.assign(values, values + slope.numel());
    return result;
  }

 private:
  Tensor Weights() const {
    Tensor weight = inputs_.row_weights == nullptr
                        ? torch::ones({inputs_.rows})
                        : View(inputs_.row_weights, {inputs_.rows}, torch::kFloat32);
    if (options_.ignored_label.has_value()) {
      weight = weight * (Labels() != *options_.ignored_label);
    }
    return weight;
  }

  Tensor Labels() const { return View(inputs_.labels, {inputs_.rows}, torch::kInt64); }

  Tensor LabelLoss(const Tensor& z) const {
    const double s = options_.label_smoothing;
    if (options_.label_loss == LossOptions::kSoftmaxCrossEntropy) {
      Tensor target = torch::zeros(shape_);
      // What is ignored may be no class.
      target.scatter_(1, Labels().clamp(0, inputs_.classes - 1).unsqueeze(1), 1);
      Tensor prior = torch::full({inputs_.classes}, 1.0 / static_cast<double>(inputs_.classes));
      if (inputs_.label_prior != nullptr) {
        prior = View(inputs_.label_prior, {inputs_.classes}, torch::kFloat32);
        prior = prior / prior.sum();
      }
      target = (1 - s) * target + s * prior;
      return -(target * torch::log_softmax(z, 1)).sum(1);
    }
    const Tensor y = View(inputs_.targets, shape_, torch::kFloat32);
    if (!binary_) return ((z - y).pow(2) / 2).mean(1);
    return torch::binary_cross_entropy_with_logits(z, (1 - s) * y + s / 2, {}, {},
                                                   at::Reduction::None)
        .mean(1);
  }

  // Logits or probabilities of a dense teacher.
  Tensor Said(const DenseTeacher& teacher) const {
    Tensor values = View(teacher.values, shape_, TypeOf(teacher.format)).to(torch::kFloat32);
    if (teacher.format == NumberFormat::kInt8) {
      values = values * View(teacher.scale, {inputs_.rows, 1}, torch::kFloat32);
    }
    return values;
  }

  Tensor LogSoftmax(const Tensor& logits) const {
    const Tensor warm = logits / options_.temperature;
    return binary_ ? LogBinary(warm) : torch::log_softmax(warm, 1);
  }

  Tensor LogProbabilities(const DenseTeacher& teacher) const {
    if (teacher.kind == DenseTeacher::kLogits) return LogSoftmax(Said(teacher));
    Tensor q = Said(teacher);
    q = binary_ ? torch::stack({q, 1 - q}, -1) : q / q.sum(1, /*keepdim=*/true);
    return q.clamp_min(std::numeric_limits<float>::min()).log();
  }

  Tensor MeanLogits() const {
    Tensor sum = torch::zeros(shape_);
    for (const DenseTeacher& teacher : inputs_.teachers) sum = sum + Said(teacher);
    return sum / static_cast<double>(inputs_.teachers.size());
  }

  // log of the average teacher.
  Tensor LogTeachers() const {
    if (options_.teacher_average == LossOptions::kLogits) return LogSoftmax(MeanLogits());
    std::vector<Tensor> all;
    for (const DenseTeacher& teacher : inputs_.teachers) all.push_back(LogProbabilities(teacher));
    return torch::logsumexp(torch::stack(all), 0) - std::log(static_cast<double>(all.size()));
  }

  Tensor TeacherLoss(const Tensor& z) const {
    if (options_.teacher_loss == LossOptions::kSquaredErrorLogits) {
      return ((z - MeanLogits()).pow(2) / 2).mean(1);
    }
    const double t2 = static_cast<double>(options_.temperature) * options_.temperature;
    const Tensor log_p = LogSoftmax(z);
    const double dense = static_cast<double>(inputs_.teachers.size());
    Tensor sum = torch::zeros({inputs_.rows});
    if (dense > 0) sum = sum + dense * Dense(log_p);
    for (const TopKTeacher& teacher : inputs_.topk_teachers) sum = sum + TopK(teacher, log_p);
    return t2 * sum / (dense + static_cast<double>(inputs_.topk_teachers.size()));
  }

  Tensor Dense(const Tensor& log_p) const {
    const Tensor log_q = LogTeachers(), q = log_q.exp();
    switch (options_.teacher_loss) {
      case LossOptions::kKlTeacherStudent:
        return PerRow(q * (log_q - log_p), binary_);
      case LossOptions::kKlStudentTeacher:
        return PerRow(log_p.exp() * (log_p - log_q), binary_);
      default:
        return PerRow(-q * log_p, binary_);
    }
  }

  Tensor TopK(const TopKTeacher& teacher, const Tensor& log_p) const {
    const Tensor index =
        View(teacher.index, {inputs_.rows, teacher.k}, torch::kInt32).to(torch::kInt64);
    Tensor q = View(teacher.value, {inputs_.rows, teacher.k}, torch::kFloat32);
    const bool all = teacher.k == inputs_.classes;
    Tensor tail = all ? torch::zeros({inputs_.rows})
                      : View(teacher.tail, {inputs_.rows}, torch::kFloat32).clone();
    const Tensor mass = q.sum(1) + tail;
    q = q / mass.unsqueeze(1);
    tail = tail / mass;
    Tensor psi = -(q * log_p.gather(1, index)).sum(1);
    if (!all) {
      const Tensor others =
          log_p.masked_fill(torch::zeros(shape_, torch::kBool).scatter(1, index, true),
                            -std::numeric_limits<float>::infinity());
      psi = psi - tail * torch::logsumexp(others, 1);
    }
    if (options_.teacher_loss == LossOptions::kKlTeacherStudent) {
      psi = psi + torch::xlogy(q, q).sum(1) + torch::xlogy(tail, tail);
    }
    return psi;
  }

  const LossOptions& options_;
  const LossInputs& inputs_;
  const bool binary_;
  const std::vector<int64_t> shape_;
};

}  // namespace

TorchLoss ComputeTorchLoss(const LossOptions& options, const LossInputs& inputs) {
  return Composite(options, inputs).Compute();
}

}  // namespace codistill
