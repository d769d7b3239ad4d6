#include "server/embedding/row_optimizer.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "common/base/random.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;
using Kind = RowOptimizer::Kind;

// The formulas of row_optimizer.h, in double, one element at a time.
struct Element {
  double w = 0, a = 0, b = 0;  // weight and slots
};
void Reference(const RowOptimizer::Options& o, double lr, int64_t t, double gradient, Element* e) {
  const double g = gradient + static_cast<double>(o.weight_decay) * e->w;
  switch (o.kind) {
    case Kind::kSgd:
      e->w -= lr * g;
      return;
    case Kind::kMomentum:
      e->a = static_cast<double>(o.momentum) * e->a + g;
      e->w -= lr * e->a;
      return;
    case Kind::kAdagrad:
      e->a += g * g;
      e->w -= lr * g / (std::sqrt(e->a) + o.epsilon);
      return;
    case Kind::kAdam: {
      const double b1 = o.beta1, b2 = o.beta2;
      e->a = b1 * e->a + (1 - b1) * g;
      e->b = b2 * e->b + (1 - b2) * g * g;
      const double m = e->a / (1 - std::pow(b1, t)), v = e->b / (1 - std::pow(b2, t));
      e->w -= lr * m / (std::sqrt(v) + o.epsilon);
      return;
    }
    case Kind::kFtrl: {
      const double sigma = (std::sqrt(e->b + g * g) - std::sqrt(e->b)) / lr;
      e->a += g - sigma * e->w;
      e->b += g * g;
      const double l1 = o.l1;
      e->w = std::abs(e->a) <= l1 ? 0
                                  : -(e->a - std::copysign(l1, e->a)) /
                                        ((o.ftrl_beta + std::sqrt(e->b)) / lr + o.l2);
      return;
    }
  }
}

struct Case {
  const char* name;
  RowOptimizer::Options options;
};
class Formulas : public ::testing::TestWithParam<Case> {};

TEST_P(Formulas, AreThoseOfThePapers) {
  const RowOptimizer::Options& options = GetParam().options;
  ASSERT_TRUE(RowOptimizer::Check(options).ok());
  for (const int dim : {1, 7, 16, 33}) {
    const RowOptimizer optimizer(options, dim);
    EXPECT_EQ(optimizer.row_floats(), dim * (1 + static_cast<int>(optimizer.SlotNames().size())));
    RandomStream random(dim);
    constexpr int kRows = 5;
    std::vector<std::vector<float>> rows(kRows, std::vector<float>(optimizer.row_floats()));
    std::vector<std::vector<Element>> wanted(kRows, std::vector<Element>(dim));
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < dim; ++i) {
        // Some weights begin at zero.
        rows[r][i] = i % 3 == 2 ? 0 : static_cast<float>(random.Normal());
        wanted[r][i].w = rows[r][i];
      }
      optimizer.InitSlots(optimizer.MakeStep(0.1, 1), rows[r].data());
      for (int i = 0; i < dim && optimizer.num_slots() > 0; ++i) {
        wanted[r][i].a = rows[r][dim + i];
        if (optimizer.num_slots() > 1) wanted[r][i].b = rows[r][2 * dim + i];
      }
    }
    for (int64_t t = 1; t <= 40; ++t) {
      const float rate = t < 20 ? 0.1f : 0.05f;
      std::vector<std::vector<float>> gradients(kRows, std::vector<float>(dim));
      std::vector<float*> to;
      std::vector<const float*> from;
      for (int r = 0; r < kRows; ++r) {
        for (float& g : gradients[r]) g = static_cast<float>(random.Normal());
        if (t % 5 == 0) gradients[r][0] = 0;
        to.push_back(rows[r].data());
        from.push_back(gradients[r].data());
      }
      optimizer.Apply(optimizer.MakeStep(rate, t), to, from);
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < dim; ++i) Reference(options, rate, t, gradients[r][i], &wanted[r][i]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < dim; ++i) {
        const double want = wanted[r][i].w;
        ASSERT_NEAR(rows[r][i], want, 2e-5 * std::max(1.0, std::abs(want)))
            << "dim " << dim << ", row " << r << ", element " << i;
      }
    }
  }
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, Kind kind, auto change) {
    RowOptimizer::Options options;
    options.kind = kind;
    change(&options);
    cases.push_back({name, options});
  };
  add("Sgd", Kind::kSgd, [](auto*) {});
  add("SgdDecay", Kind::kSgd, [](auto* o) { o->weight_decay = 0.01f; });
  add("Momentum", Kind::kMomentum, [](auto* o) { o->weight_decay = 0.01f; });
  add("Adagrad", Kind::kAdagrad, [](auto* o) { o->initial_accumulator = 0.1f; });
  add("AdagradFromZero", Kind::kAdagrad, [](auto* o) { o->weight_decay = 0.001f; });
  add("Adam", Kind::kAdam, [](auto*) {});
  add("Ftrl", Kind::kFtrl, [](auto*) {});
  add("FtrlRegularised", Kind::kFtrl, [](auto* o) {
    o->l1 = 0.3f;
    o->l2 = 0.1f;
    o->initial_accumulator = 0.1f;
  });
  return cases;
}
INSTANTIATE_TEST_SUITE_P(RowOptimizer, Formulas, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

TEST(RowOptimizer, FtrlBeginsAtTheWeightItIsGiven) {
  RowOptimizer::Options options;
  options.kind = Kind::kFtrl;
  options.l1 = 0.2f;
  options.l2 = 0.5f;
  const RowOptimizer optimizer(options, 3);
  std::vector<float> row = {0.5f, -0.25f, 0, 0, 0, 0, 0, 0, 0};
  const auto step = optimizer.MakeStep(0.1, 1);
  optimizer.InitSlots(step, row.data());
  const std::vector<float> zero(3, 0.0f);
  optimizer.Apply(step, {row.data()}, {zero.data()});
  EXPECT_NEAR(row[0], 0.5, 1e-6);
  EXPECT_NEAR(row[1], -0.25, 1e-6);
  EXPECT_EQ(row[2], 0);
}

TEST(RowOptimizer, FtrlIsSparse) {
  RowOptimizer::Options options;
  options.kind = Kind::kFtrl;
  options.l1 = 10;
  const RowOptimizer optimizer(options, 1);
  std::vector<float> row(3, 0.0f);
  const float gradient = 1;
  for (int64_t t = 1; t <= 5; ++t) {
    optimizer.Apply(optimizer.MakeStep(0.1, t), {row.data()}, {&gradient});
    EXPECT_EQ(row[0], 0);
  }
}

TEST(RowOptimizer, NamesBadOptions) {
  const auto error = [](Kind kind, auto change) {
    RowOptimizer::Options options;
    options.kind = kind;
    change(&options);
    return std::string(RowOptimizer::Check(options).message());
  };
  EXPECT_THAT(error(Kind::kSgd, [](auto* o) { o->weight_decay = -1; }), HasSubstr("weight_decay"));
  EXPECT_THAT(error(Kind::kFtrl, [](auto* o) { o->weight_decay = 0.1f; }), HasSubstr("l2"));
  EXPECT_THAT(error(Kind::kAdagrad, [](auto* o) { o->epsilon = 0; }), HasSubstr("epsilon"));
  EXPECT_THAT(error(Kind::kAdam, [](auto* o) { o->beta2 = 1; }), HasSubstr("beta2"));
  EXPECT_THAT(error(Kind::kFtrl, [](auto* o) { o->l1 = NAN; }), HasSubstr("l1"));
}

TEST(AllFinite, FindsWhatIsNot) {
  for (const int n : {0, 1, 15, 16, 100}) {
    std::vector<float> x(n, std::numeric_limits<float>::max());
    EXPECT_TRUE(AllFinite(x.data(), n));
    for (int i = 0; i < n; ++i) {
      for (const float bad :
           {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
        const float good = x[i];
        x[i] = bad;
        EXPECT_FALSE(AllFinite(x.data(), n)) << n << " " << i;
        x[i] = good;
      }
    }
  }
}

}  // namespace
}  // namespace codistill
