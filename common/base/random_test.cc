#include "common/base/random.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(MixTest, DependsOnEveryWordTheirOrderAndNumber) {
  const std::set<uint64_t> all = {Mix(1),       Mix(2),       Mix(1, 2), Mix(2, 1),
                                  Mix(1, 2, 3), Mix(1, 3, 2), Mix(0, 0), Mix(0)};
  EXPECT_EQ(all.size(), 8u);
  EXPECT_NE(HashString("g0"), HashString("g1"));
  EXPECT_NE(HashString(""), HashString(absl::string_view("\0", 1)));
}

TEST(MixTest, ValuesAreFixedForEver) {
  // A resumed job draws what the first run drew: these values may never change.
  EXPECT_EQ(Mix(0), 0xe220a8397b1dcdafu);  // SplitMix64's first output for seed 0
  EXPECT_EQ(Mix(1, 2, 3), Mix(Mix(Mix(1) ^ 2) ^ 3));
  EXPECT_EQ(PermutedIndex(42, 1000, 0), 608u);
  EXPECT_EQ(PermutedIndex(42, 1000, 999), 992u);
}

TEST(UniformTest, FillsTheUnitIntervalEvenly) {
  constexpr int kDraws = 100000, kBins = 10;
  std::vector<int> bins(kBins);
  for (int i = 0; i < kDraws; ++i) {
    const double u = UniformDouble(Mix(3, i));
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    ++bins[static_cast<int>(u * kBins)];
  }
  for (int count : bins) EXPECT_NEAR(count, kDraws / kBins, 500);  // five standard deviations
  EXPECT_LT(UniformDouble(~uint64_t{0}), 1.0);
}

TEST(NormalTest, HasTheRightMoments) {
  constexpr int kDraws = 200000;
  double sum = 0, squares = 0, fourths = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double x = NormalDouble(Mix(9, i));
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    squares += x * x;
    fourths += x * x * x * x;
  }
  EXPECT_NEAR(sum / kDraws, 0.0, 0.012);
  EXPECT_NEAR(squares / kDraws, 1.0, 0.016);
  EXPECT_NEAR(fourths / kDraws, 3.0, 0.12);
}

TEST(RandomStreamTest, IsAFunctionOfItsSeedWords) {
  RandomStream a(1, "g0", 5, 0), b(1, "g0", 5, 0);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(a.Next(), b.Next());
  const std::set<uint64_t> firsts = {
      RandomStream(1, "g0", 5, 0).Next(), RandomStream(2, "g0", 5, 0).Next(),
      RandomStream(1, "g1", 5, 0).Next(), RandomStream(1, "g0", 6, 0).Next(),
      RandomStream(1, "g0", 5, 1).Next()};
  EXPECT_EQ(firsts.size(), 5u);
}

TEST(RandomStreamTest, BelowIsInRangeAndEven) {
  RandomStream stream(11);
  std::vector<int> counts(6);
  for (int i = 0; i < 60000; ++i) ++counts[stream.Below(6)];
  for (int count : counts) EXPECT_NEAR(count, 10000, 500);
  EXPECT_EQ(stream.Below(1), 0u);
  const uint64_t large = (uint64_t{1} << 63) + 1;
  for (int i = 0; i < 100; ++i) EXPECT_LT(stream.Below(large), large);
  std::vector<int> items = {1, 2, 3, 4};
  std::shuffle(items.begin(), items.end(), stream);  // usable with the standard library
  EXPECT_EQ(std::set<int>(items.begin(), items.end()).size(), 4u);
}

TEST(PermutationTest, IsABijection) {
  for (uint64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 17, 64, 100, 1000, 4097, 65536, 100003}) {
    for (uint64_t seed : {0, 1, 12345}) {
      const Permutation permutation(seed, n);
      std::vector<bool> seen(n);
      for (uint64_t i = 0; i < n; ++i) {
        const uint64_t image = permutation(i);
        ASSERT_LT(image, n);
        ASSERT_FALSE(seen[image]) << "n " << n << " seed " << seed << " i " << i;
        seen[image] = true;
        if (i < 10) {
          ASSERT_EQ(PermutedIndex(seed, n, i), image);
        }
      }
    }
  }
}

TEST(PermutationTest, HandlesHugeDomains) {
  for (uint64_t n : {uint64_t{1} << 40, (uint64_t{1} << 63) + 12345, ~uint64_t{0}}) {
    std::set<uint64_t> images;
    for (uint64_t i = 0; i < 1000; ++i) images.insert(PermutedIndex(5, n, n - 1 - i));
    EXPECT_EQ(images.size(), 1000u);
    EXPECT_LT(*images.rbegin(), n);
  }
}

TEST(PermutationTest, DiffersBySeedAndLooksShuffled) {
  constexpr uint64_t n = 10000;
  const Permutation a(1, n), b(2, n);
  int same = 0, in_place = 0, ascending = 0;
  for (uint64_t i = 0; i < n; ++i) {
    same += a(i) == b(i);
    in_place += a(i) == i;
    if (i > 0) ascending += a(i) > a(i - 1);
  }
  EXPECT_LE(same, 10);  // one expected
  EXPECT_LE(in_place, 10);
  EXPECT_NEAR(ascending, n / 2, 150);  // a random permutation's deviation is 29
}

TEST(PermutationTest, EveryIndexGoesEverywhereOverSeeds) {
  for (uint64_t n : {2, 3, 5, 10}) {
    std::vector<std::vector<int>> counts(n, std::vector<int>(n));
    constexpr int kSeeds = 20000;
    for (int seed = 0; seed < kSeeds; ++seed) {
      const Permutation permutation(seed, n);
      for (uint64_t i = 0; i < n; ++i) ++counts[i][permutation(i)];
    }
    for (uint64_t i = 0; i < n; ++i) {
      for (uint64_t j = 0; j < n; ++j) {
        EXPECT_NEAR(counts[i][j], kSeeds / static_cast<double>(n), 0.1 * kSeeds / n)
            << "n " << n << ": " << i << " -> " << j;
      }
    }
  }
}

}  // namespace
}  // namespace codistill
