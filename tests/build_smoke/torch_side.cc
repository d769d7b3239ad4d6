#include "tests/build_smoke/torch_side.h"

#include <torch/torch.h>

namespace codistill {

float GradientOfSquare(float x) {
  torch::Tensor value = torch::full({1}, x, torch::requires_grad());
  (value * value).sum().backward();
  return value.grad().item<float>();
}

double LargestBlasError(int n) {
  torch::Tensor product = torch::mm(torch::ones({n, n}), torch::ones({n, n}));
  return (product - n).abs().max().item<double>();
}

}  // namespace codistill
