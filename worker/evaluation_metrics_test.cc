#include "worker/evaluation_metrics.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The definition, pair by pair.
double AucByPairs(const std::vector<ScoredLabel>& examples) {
  double ordered = 0;
  double pairs = 0;
  for (const ScoredLabel& a : examples) {
    for (const ScoredLabel& b : examples) {
      if (!a.positive || b.positive) continue;
      pairs += 1;
      if (a.score > b.score) ordered += 1;
      if (a.score == b.score) ordered += 0.5;
    }
  }
  return ordered / pairs;
}

TEST(AreaUnderRocTest, HandComputed) {
  // Positives 0.35 and 0.8, negatives 0.1 and 0.4: three of four pairs are in order.
  EXPECT_DOUBLE_EQ(*AreaUnderRoc({{0.1f, false}, {0.4f, false}, {0.35f, true}, {0.8f, true}}),
                   0.75);
  EXPECT_DOUBLE_EQ(*AreaUnderRoc({{1, false}, {2, true}}), 1.0);
  EXPECT_DOUBLE_EQ(*AreaUnderRoc({{2, false}, {1, true}}), 0.0);
}

TEST(AreaUnderRocTest, TiesCountHalf) {
  EXPECT_DOUBLE_EQ(*AreaUnderRoc({{3, false}, {3, true}}), 0.5);
  EXPECT_DOUBLE_EQ(*AreaUnderRoc({{3, true}, {3, false}, {3, true}}), 0.5);
  // Positives {1, 2}, negatives {1, 0}: 0.5 + 1 + 1 + 1 of 4.
  EXPECT_DOUBLE_EQ(*AreaUnderRoc({{1, true}, {1, false}, {2, true}, {0, false}}), 0.875);
}

TEST(AreaUnderRocTest, InfiniteScoresAreOrderedAndTied) {
  EXPECT_DOUBLE_EQ(*AreaUnderRoc({{-kInfinity, false}, {0, true}, {kInfinity, true}}), 1.0);
  EXPECT_DOUBLE_EQ(*AreaUnderRoc({{kInfinity, false}, {kInfinity, true}}), 0.5);
}

TEST(AreaUnderRocTest, AbsentWithoutBothClassesOrWithNan) {
  EXPECT_FALSE(AreaUnderRoc({}).has_value());
  EXPECT_FALSE(AreaUnderRoc({{1, true}, {2, true}}).has_value());
  EXPECT_FALSE(AreaUnderRoc({{1, false}}).has_value());
  EXPECT_FALSE(AreaUnderRoc({{1, false}, {kNan, true}, {2, true}}).has_value());
}

TEST(AreaUnderRocTest, AgreesWithTheDefinitionOnRandomTiedScores) {
  std::mt19937 random(7);
  for (int round = 0; round < 50; ++round) {
    std::vector<ScoredLabel> examples(2 + random() % 60);
    for (ScoredLabel& example : examples) {
      example = {static_cast<float>(random() % 9) - 4, random() % 3 == 0};
    }
    examples[0].positive = true;
    examples[1].positive = false;
    ASSERT_NEAR(*AreaUnderRoc(examples), AucByPairs(examples), 1e-12) << "round " << round;
  }
}

TEST(SumOfDifferencesTest, AgreesWithAPlainLoop) {
  std::mt19937 random(5);
  for (size_t n : {0, 1, 15, 16, 17, 1023, 1024, 1025, 5000}) {
    std::vector<float> a(n), b(n);
    double expected = 0;
    for (size_t i = 0; i < n; ++i) {
      a[i] = static_cast<float>(random() % 1000) / 1000;
      b[i] = static_cast<float>(random() % 1000) / 1000;
      expected += std::abs(static_cast<double>(a[i]) - b[i]);
    }
    EXPECT_NEAR(SumOfDifferences(a, b), expected, 1e-6 * (1 + expected)) << n;
  }
}

TEST(CompensatedSumTest, KeepsSmallTerms) {
  CompensatedSum sum;
  sum.Add(1e16);
  for (int i = 0; i < 1000; ++i) sum.Add(1.0);
  sum.Add(-1e16);
  EXPECT_DOUBLE_EQ(sum.value(), 1000.0);
}

}  // namespace
}  // namespace codistill
