#include "tests/benchmarks/torch_loss.h"

#include <torch/torch.h>

#include <algorithm>

namespace codistill {
namespace {

torch::Tensor View(const float* data, int64_t rows, int64_t classes) {
  return torch::from_blob(const_cast<float*>(data), {rows, classes}, torch::kFloat32);
}

}  // namespace

void SetTorchThreads(int threads) { at::set_num_threads(threads); }

double TorchLoss(const TorchLossInputs& inputs, int64_t chunk, float* gradient) {
  const int64_t classes = inputs.classes;
  const double temperature = inputs.temperature;
  double loss = 0;
  for (int64_t begin = 0; begin < inputs.rows; begin += chunk) {
    const int64_t rows = std::min(chunk, inputs.rows - begin);
    torch::Tensor logits = View(inputs.logits + begin * classes, rows, classes);
    logits.requires_grad_(true);
    const torch::Tensor labels =
        torch::from_blob(const_cast<int64_t*>(inputs.labels + begin), {rows}, torch::kInt64);
    const torch::Tensor teacher = View(inputs.teacher + begin * classes, rows, classes);
    // At temperature 1 one softmax serves both terms.
    const torch::Tensor log_p = torch::log_softmax(logits, 1);
    const torch::Tensor warm =
        temperature == 1 ? log_p : torch::log_softmax(logits / temperature, 1);
    torch::Tensor q = teacher;
    if (!inputs.probabilities) {
      const torch::NoGradGuard no_gradient;
      q = torch::softmax(temperature == 1 ? teacher : teacher / temperature, 1);
    }
    const torch::Tensor sum = (torch::nll_loss(log_p, labels, {}, at::Reduction::Sum) -
                               temperature * temperature * (q * warm).sum()) /
                              static_cast<double>(inputs.rows);
    const torch::Tensor slope = torch::autograd::grad({sum}, {logits})[0];
    loss += sum.item<double>();
    if (gradient != nullptr) View(gradient + begin * classes, rows, classes).copy_(slope);
  }
  return loss;
}

}  // namespace codistill
