#include "server/optimizer.h"

#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr size_t kElements = 1003;  // no multiple of any vector width
constexpr int kSteps = 50;

std::vector<float> Normal(std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(kElements);
  for (float& value : values) value = normal(*random);
  return values;
}

// The textbook update of one element in double precision.
struct Reference {
  const OptimizerConfig config;
  double w, v1 = 0, v2 = 0;

  void Apply(double g, double lr, double decay, int t) {
    g += decay * w;
    switch (config.kind()) {
      case OptimizerConfig::SGD:
        w -= lr * g;
        break;
      case OptimizerConfig::MOMENTUM:
        v1 = config.momentum() * v1 + g;
        w -= lr * v1;
        break;
      case OptimizerConfig::ADAM: {
        const double b1 = config.beta1(), b2 = config.beta2();
        v1 = b1 * v1 + (1 - b1) * g;
        v2 = b2 * v2 + (1 - b2) * g * g;
        w -= lr * (v1 / (1 - std::pow(b1, t))) /
             (std::sqrt(v2 / (1 - std::pow(b2, t))) + config.epsilon());
        break;
      }
      default:
        FAIL() << config.kind();
    }
  }
};

// In place.
void Apply(const Optimizer& optimizer, const Optimizer::Step& step, absl::Span<float> weights,
           absl::Span<const float> gradient, const std::vector<float*>& slots) {
  const std::vector<const float*> from(slots.begin(), slots.end());
  optimizer.Apply(step, weights, gradient, from, weights.data(), slots);
}

class OptimizerTest : public testing::TestWithParam<OptimizerConfig::Kind> {};

TEST_P(OptimizerTest, FollowsTheFormulaInDoublePrecision) {
  OptimizerConfig config;
  config.set_kind(GetParam());
  const Optimizer optimizer(config);
  std::mt19937 random(7);
  std::vector<float> weights = Normal(&random);
  std::vector<Reference> references;
  for (float w : weights) references.push_back({config, w});
  std::vector<std::vector<float>> slots(optimizer.SlotNames().size(),
                                        std::vector<float>(kElements, 0.0f));
  std::vector<float*> slot_pointers;
  for (auto& slot : slots) slot_pointers.push_back(slot.data());

  for (int t = 1; t <= kSteps; ++t) {
    const std::vector<float> gradient = Normal(&random);
    const double lr = 0.01 / t, decay = t % 2 == 0 ? 0.1 : 0.0;
    Apply(optimizer, {lr, decay, t}, absl::MakeSpan(weights), gradient, slot_pointers);
    for (size_t i = 0; i < kElements; ++i) references[i].Apply(gradient[i], lr, decay, t);
  }
  for (size_t i = 0; i < kElements; ++i) {
    ASSERT_NEAR(weights[i], references[i].w, 2e-5 + 2e-5 * std::abs(references[i].w)) << i;
  }
}

TEST_P(OptimizerTest, CuttingARangeChangesNothing) {
  OptimizerConfig config;
  config.set_kind(GetParam());
  const Optimizer optimizer(config);
  std::mt19937 random(8);
  std::vector<float> whole = Normal(&random), cut = whole;
  std::vector<std::vector<float>> whole_slots(optimizer.SlotNames().size(),
                                              std::vector<float>(kElements, 0.0f));
  auto cut_slots = whole_slots;
  for (int t = 1; t <= 3; ++t) {
    const std::vector<float> gradient = Normal(&random);
    const Optimizer::Step step = {0.1, 0.01, t};
    const auto apply = [&](std::vector<float>* w, std::vector<std::vector<float>>* s, size_t begin,
                           size_t end) {
      std::vector<float*> pointers;
      for (auto& slot : *s) pointers.push_back(slot.data() + begin);
      Apply(optimizer, step, absl::MakeSpan(*w).subspan(begin, end - begin),
            absl::MakeConstSpan(gradient).subspan(begin, end - begin), pointers);
    };
    apply(&whole, &whole_slots, 0, kElements);
    apply(&cut, &cut_slots, 512, kElements);  // cuts lie on multiples of 16 elements
    apply(&cut, &cut_slots, 0, 512);
  }
  for (size_t i = 0; i < kElements; ++i) ASSERT_EQ(whole[i], cut[i]) << i;
}

TEST_P(OptimizerTest, OutOfPlaceIsInPlace) {
  OptimizerConfig config;
  config.set_kind(GetParam());
  const Optimizer optimizer(config);
  std::mt19937 random(9);
  std::vector<float> weights = Normal(&random), to(kElements);
  const size_t num_slots = optimizer.SlotNames().size();
  std::vector<std::vector<float>> slots, new_slots(num_slots, std::vector<float>(kElements));
  for (size_t s = 0; s < num_slots; ++s) slots.push_back(std::vector<float>(kElements, 0.25f));
  const std::vector<float> gradient = Normal(&random), before = weights;
  const auto slots_before = slots;
  std::vector<const float*> from;
  std::vector<float*> in_place, out;
  for (size_t s = 0; s < num_slots; ++s) {
    from.push_back(slots[s].data());
    in_place.push_back(slots[s].data());
    out.push_back(new_slots[s].data());
  }
  optimizer.Apply({0.1, 0.01, 3}, weights, gradient, from, to.data(), out);
  EXPECT_EQ(weights, before);
  EXPECT_EQ(slots, slots_before);
  Apply(optimizer, {0.1, 0.01, 3}, absl::MakeSpan(weights), gradient, in_place);
  EXPECT_EQ(weights, to);
  EXPECT_EQ(slots, new_slots);
  EXPECT_NE(weights, before);
}

INSTANTIATE_TEST_SUITE_P(Kinds, OptimizerTest,
                         testing::Values(OptimizerConfig::SGD, OptimizerConfig::MOMENTUM,
                                         OptimizerConfig::ADAM),
                         [](const auto& info) { return OptimizerConfig::Kind_Name(info.param); });

TEST(OptimizerTest, SlotNamesAreThoseOfCheckpoints) {
  OptimizerConfig config;
  EXPECT_TRUE(Optimizer(config).SlotNames().empty());
  config.set_kind(OptimizerConfig::MOMENTUM);
  EXPECT_EQ(Optimizer(config).SlotNames(), std::vector<std::string>{"momentum"});
  config.set_kind(OptimizerConfig::ADAM);
  EXPECT_EQ(Optimizer(config).SlotNames(), (std::vector<std::string>{"m", "v"}));
  EXPECT_EQ(Optimizer(config).KindName(), "ADAM");
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
