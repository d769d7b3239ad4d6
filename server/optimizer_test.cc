#include "server/optimizer.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "server/optimizer_reference.h"

namespace codistill {
namespace {

constexpr size_t kElements = 1003;  // no multiple of any vector width
constexpr int kSteps = 50;

using Kind = OptimizerConfig::Kind;

std::vector<float> Normal(std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(kElements);
  for (float& value : values) value = normal(*random);
  return values;
}

// A range of weights with its slots.
struct State {
  std::vector<float> weights;
  std::vector<std::vector<float>> slots;

  State(const Optimizer& optimizer, std::vector<float> initial)
      : weights(std::move(initial)),
        slots(optimizer.SlotNames().size(),
              std::vector<float>(weights.size(), optimizer.InitialSlotValue())) {}

  // In place, of elements [begin, end).
  void Apply(const Optimizer& optimizer, const Optimizer::Step& step,
             const std::vector<float>& gradient, size_t begin = 0, size_t end = kElements) {
    std::vector<float*> to;
    for (auto& slot : slots) to.push_back(slot.data() + begin);
    const std::vector<const float*> from(to.begin(), to.end());
    optimizer.Apply(step, absl::MakeConstSpan(weights).subspan(begin, end - begin),
                    absl::MakeConstSpan(gradient).subspan(begin, end - begin), from,
                    weights.data() + begin, to);
  }
};

class OptimizerTest : public testing::TestWithParam<Kind> {
 protected:
  OptimizerTest() {
    config_.set_kind(GetParam());
    config_.set_initial_accumulator(GetParam() == OptimizerConfig::ADAGRAD ? 0.1f : 0.0f);
  }
  static Optimizer::Step StepAt(int t) {
    return {0.01 / t, t % 2 == 0 ? 0.1 : 0.0, t, t % 3 == 0 ? 0.7 : 1.0, 1.0 + 0.1 * (t % 4)};
  }
  OptimizerConfig config_;
  std::mt19937 random_{7};
};

TEST_P(OptimizerTest, FollowsTheFormulaInDoublePrecision) {
  const Optimizer optimizer(config_);
  State state(optimizer, Normal(&random_));
  std::vector<ReferenceElement> references(kElements);
  for (size_t i = 0; i < kElements; ++i) {
    references[i].config = config_;
    references[i].w = state.weights[i];
    for (double& slot : references[i].slots) slot = optimizer.InitialSlotValue();
  }
  for (int t = 1; t <= kSteps; ++t) {
    const std::vector<float> gradient = Normal(&random_);
    state.Apply(optimizer, StepAt(t), gradient);
    for (size_t i = 0; i < kElements; ++i) references[i].Apply(gradient[i], StepAt(t));
  }
  for (size_t i = 0; i < kElements; ++i) {
    ASSERT_NEAR(state.weights[i], references[i].w, 2e-5 + 2e-5 * std::abs(references[i].w)) << i;
  }
}

TEST_P(OptimizerTest, OneStepIsWithinEightUlpsOfTheLargestTerm) {
  const Optimizer optimizer(config_);
  State state(optimizer, Normal(&random_));
  for (int t = 1; t <= 20; ++t) {
    // Gradients over many orders of magnitude, zeros among them.
    std::vector<float> gradient = Normal(&random_);
    for (size_t i = 0; i < kElements; ++i) {
      gradient[i] *= std::pow(10.0f, static_cast<float>(i % 9) - 4);
      if (i % 31 == 0) gradient[i] = 0;
    }
    std::vector<ReferenceElement> references(kElements);
    for (size_t i = 0; i < kElements; ++i) {
      references[i].config = config_;
      references[i].w = state.weights[i];
      for (size_t s = 0; s < state.slots.size(); ++s) references[i].slots[s] = state.slots[s][i];
      references[i].Apply(gradient[i], StepAt(t));
    }
    state.Apply(optimizer, StepAt(t), gradient);
    for (size_t i = 0; i < kElements; ++i) {
      const ReferenceElement& r = references[i];
      ASSERT_LE(UlpsApart(state.weights[i], r.w, r.largest_w), 8)
          << "step " << t << ", element " << i;
      for (size_t s = 0; s < state.slots.size(); ++s) {
        ASSERT_LE(UlpsApart(state.slots[s][i], r.slots[s], r.largest_slots[s]), 8)
            << "slot " << s << ", step " << t << ", element " << i;
      }
    }
  }
}

TEST_P(OptimizerTest, CuttingARangeChangesNothing) {
  const Optimizer optimizer(config_);
  State whole(optimizer, Normal(&random_));
  State cut = whole;
  for (int t = 1; t <= 3; ++t) {
    const std::vector<float> gradient = Normal(&random_);
    whole.Apply(optimizer, StepAt(t), gradient);
    // Wherever it is cut: what a vector computes a tail computes alike.
    cut.Apply(optimizer, StepAt(t), gradient, 511, kElements);
    cut.Apply(optimizer, StepAt(t), gradient, 0, 3);
    cut.Apply(optimizer, StepAt(t), gradient, 3, 511);
  }
  EXPECT_EQ(whole.weights, cut.weights);
  EXPECT_EQ(whole.slots, cut.slots);
}

TEST_P(OptimizerTest, OutOfPlaceIsInPlace) {
  const Optimizer optimizer(config_);
  State state(optimizer, Normal(&random_));
  const std::vector<float> gradient = Normal(&random_);
  state.Apply(optimizer, StepAt(1), gradient);
  const State before = state;
  // On a cache line, where stores may go past the caches, and off one.
  for (const size_t shift : {size_t{0}, size_t{3}}) {
    const auto aligned = [shift](std::vector<float>* buffer) {
      buffer->assign(kElements + 32, -1.0f);
      size_t first = 0;
      while (reinterpret_cast<uintptr_t>(buffer->data() + first) % 64 != 0) ++first;
      return buffer->data() + first + shift;
    };
    std::vector<float> room, slot_rooms[2];
    float* const to = aligned(&room);
    std::vector<const float*> from;
    std::vector<float*> out;
    for (size_t s = 0; s < before.slots.size(); ++s) {
      from.push_back(before.slots[s].data());
      out.push_back(aligned(&slot_rooms[s]));
    }
    optimizer.Apply(StepAt(2), before.weights, gradient, from, to, out);
    State in_place = before;
    in_place.Apply(optimizer, StepAt(2), gradient);
    EXPECT_NE(in_place.weights, before.weights);
    EXPECT_EQ(in_place.weights, std::vector<float>(to, to + kElements));
    EXPECT_EQ(to[kElements], -1.0f);
    for (size_t s = 0; s < out.size(); ++s) {
      EXPECT_EQ(in_place.slots[s], std::vector<float>(out[s], out[s] + kElements));
      EXPECT_EQ(out[s][kElements], -1.0f);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, OptimizerTest,
                         testing::Values(OptimizerConfig::SGD, OptimizerConfig::MOMENTUM,
                                         OptimizerConfig::NESTEROV, OptimizerConfig::ADAGRAD,
                                         OptimizerConfig::ADAM, OptimizerConfig::ADAMW,
                                         OptimizerConfig::LARS),
                         [](const auto& info) { return OptimizerConfig::Kind_Name(info.param); });

TEST(OptimizerTest, SlotNamesAreThoseOfCheckpoints) {
  const auto names = [](Kind kind) {
    OptimizerConfig config;
    config.set_kind(kind);
    EXPECT_EQ(Optimizer(config).KindName(), OptimizerConfig::Kind_Name(kind));
    return Optimizer(config).SlotNames();
  };
  using Names = std::vector<std::string>;
  EXPECT_EQ(names(OptimizerConfig::SGD), Names());
  EXPECT_EQ(names(OptimizerConfig::MOMENTUM), Names({"momentum"}));
  EXPECT_EQ(names(OptimizerConfig::NESTEROV), Names({"momentum"}));
  EXPECT_EQ(names(OptimizerConfig::LARS), Names({"momentum"}));
  EXPECT_EQ(names(OptimizerConfig::ADAGRAD), Names({"sum"}));
  EXPECT_EQ(names(OptimizerConfig::ADAM), Names({"m", "v"}));
  EXPECT_EQ(names(OptimizerConfig::ADAMW), Names({"m", "v"}));
}

TEST(OptimizerTest, AdamForgetsGradientsThatAreGone) {
  // Moments that die away must end as zeros and not stay the smallest denormal for ever.
  OptimizerConfig config;
  config.set_kind(OptimizerConfig::ADAM);
  const Optimizer optimizer(config);
  State state(optimizer, std::vector<float>(kElements, 1.0f));
  const std::vector<float> gradient(kElements, 1e-18f), zeros(kElements, 0.0f);
  state.Apply(optimizer, {0.001, 0, 1}, gradient);
  for (int t = 2; t < 1000; ++t) state.Apply(optimizer, {0.001, 0, t}, zeros);
  EXPECT_EQ(state.slots[0][0], 0.0f);
  EXPECT_TRUE(std::isfinite(state.weights[0]));
}

TEST(OptimizerTest, TrustRatioIsThatOfThePaper) {
  OptimizerConfig config;
  config.set_kind(OptimizerConfig::LARS);
  config.set_trust_coefficient(0.02f);
  const Optimizer optimizer(config);
  EXPECT_TRUE(optimizer.NeedsTensorNorms());
  EXPECT_NEAR(optimizer.TrustRatio(3, 0.5, 0.1), 0.02 * 3 / (0.5 + 0.1 * 3), 1e-8);
  EXPECT_EQ(optimizer.TrustRatio(0, 0.5, 0.1), 1);  // a bias that starts from zero
  EXPECT_EQ(optimizer.TrustRatio(3, 0, 0.1), 1);
}

TEST(OptimizerTest, WeightedSum) {
  const std::vector<float> a = {1, 2, 3}, b = {4, 8, 16};
  std::vector<float> sum(3);
  ScaleInto(0.25f, a, absl::MakeSpan(sum));
  AddScaled(0.75f, b, absl::MakeSpan(sum));
  EXPECT_EQ(sum, (std::vector<float>{3.25f, 6.5f, 12.75f}));
}

}  // namespace
}  // namespace codistill
