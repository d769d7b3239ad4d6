#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "server/gradient_norms.h"
#include "server/optimizer.h"

// Ours beside libtorch's optimizers, over many steps of the same gradients.
namespace codistill {
namespace {

constexpr int64_t kElements = 4099;
constexpr int kSteps = 100;
constexpr double kRate = 0.01, kDecay = 0.05, kEpsilon = 1e-8;

using TorchOptimizer = std::unique_ptr<torch::optim::Optimizer>;
using MakeTorch = TorchOptimizer (*)(std::vector<torch::Tensor>);

struct Case {
  OptimizerConfig::Kind kind;
  double clip_norm;
  MakeTorch make;
};

TorchOptimizer Sgd(std::vector<torch::Tensor> p) {
  return std::make_unique<torch::optim::SGD>(p,
                                             torch::optim::SGDOptions(kRate).weight_decay(kDecay));
}
TorchOptimizer Momentum(std::vector<torch::Tensor> p) {
  return std::make_unique<torch::optim::SGD>(
      p, torch::optim::SGDOptions(kRate).weight_decay(kDecay).momentum(0.9));
}
TorchOptimizer Nesterov(std::vector<torch::Tensor> p) {
  return std::make_unique<torch::optim::SGD>(
      p, torch::optim::SGDOptions(kRate).weight_decay(kDecay).momentum(0.9).nesterov(true));
}
TorchOptimizer Adagrad(std::vector<torch::Tensor> p) {
  return std::make_unique<torch::optim::Adagrad>(
      p,
      torch::optim::AdagradOptions(kRate).weight_decay(kDecay).initial_accumulator_value(0.1).eps(
          kEpsilon));
}
TorchOptimizer Adam(std::vector<torch::Tensor> p) {
  return std::make_unique<torch::optim::Adam>(
      p, torch::optim::AdamOptions(kRate).weight_decay(kDecay).eps(kEpsilon));
}
TorchOptimizer AdamW(std::vector<torch::Tensor> p) {
  return std::make_unique<torch::optim::AdamW>(
      p, torch::optim::AdamWOptions(kRate).weight_decay(kDecay).eps(kEpsilon));
}

class BesideTorch : public testing::TestWithParam<Case> {};

TEST_P(BesideTorch, StaysWithIt) {
  torch::set_num_threads(1);
  torch::manual_seed(3);
  OptimizerConfig config;
  config.set_kind(GetParam().kind);
  config.set_initial_accumulator(0.1f);
  config.set_clip_norm(GetParam().clip_norm);
  const Optimizer optimizer(config);

  // Torch computes in double, so that what differs is ours.
  torch::Tensor parameter = torch::randn({kElements}, torch::kDouble);
  const torch::Tensor start = parameter.to(torch::kFloat).contiguous();
  parameter = start.to(torch::kDouble).clone().set_requires_grad(true);
  const TorchOptimizer theirs = GetParam().make({parameter});

  std::vector<float> weights(start.data_ptr<float>(), start.data_ptr<float>() + kElements);
  std::vector<std::vector<float>> slots(
      optimizer.SlotNames().size(), std::vector<float>(kElements, optimizer.InitialSlotValue()));
  std::vector<float*> to;
  for (auto& slot : slots) to.push_back(slot.data());
  const std::vector<const float*> from(to.begin(), to.end());

  for (int step = 1; step <= kSteps; ++step) {
    const torch::Tensor gradient = torch::randn({kElements}, torch::kFloat);
    parameter.mutable_grad() = gradient.to(torch::kDouble);
    double norm = 0;
    for (int64_t i = 0; i < kElements; ++i) {
      norm += std::pow(static_cast<double>(gradient.data_ptr<float>()[i]), 2);
    }
    if (GetParam().clip_norm > 0) {
      torch::nn::utils::clip_grad_norm_({parameter}, GetParam().clip_norm);
    }
    theirs->step();
    optimizer.Apply({kRate, kDecay, step, ClipScale(config, std::sqrt(norm))}, weights,
                    absl::MakeConstSpan(gradient.data_ptr<float>(), kElements), from,
                    weights.data(), to);
  }
  const torch::Tensor end = parameter.detach();
  for (int64_t i = 0; i < kElements; ++i) {
    const double expected = end.data_ptr<double>()[i];
    ASSERT_NEAR(weights[i], expected, 2e-5 * std::max(1.0, std::abs(expected))) << i;
  }
  EXPECT_GT((end - start.to(torch::kDouble)).abs().max().item<double>(), 0.01);
}

INSTANTIATE_TEST_SUITE_P(Kinds, BesideTorch,
                         testing::Values(Case{OptimizerConfig::SGD, 0, Sgd},
                                         Case{OptimizerConfig::SGD, 20, Sgd},
                                         Case{OptimizerConfig::SGD, 1000, Sgd},
                                         Case{OptimizerConfig::MOMENTUM, 0, Momentum},
                                         Case{OptimizerConfig::NESTEROV, 20, Nesterov},
                                         Case{OptimizerConfig::ADAGRAD, 0, Adagrad},
                                         Case{OptimizerConfig::ADAM, 0, Adam},
                                         Case{OptimizerConfig::ADAM, 20, Adam},
                                         Case{OptimizerConfig::ADAMW, 0, AdamW}),
                         [](const auto& info) {
                           return OptimizerConfig::Kind_Name(info.param.kind) + "_clip_" +
                                  std::to_string(static_cast<int>(info.param.clip_norm));
                         });

}  // namespace
}  // namespace codistill
