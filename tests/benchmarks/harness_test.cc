#include "tests/benchmarks/harness.h"

#include <numeric>

#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(HarnessTest, MedianAndPercentileTakeTheMiddleAndTheNearestRank) {
  EXPECT_EQ(Median({3, 1, 2}), 2);
  EXPECT_EQ(Median({4, 1, 2, 3}), 2.5);
  std::vector<double> hundred(100);
  std::iota(hundred.begin(), hundred.end(), 1);
  EXPECT_EQ(Percentile(hundred, 0.95), 95);
  EXPECT_EQ(Percentile(hundred, 1.0), 100);
  EXPECT_EQ(Percentile(hundred, 0.0), 1);
}

TEST(HarnessTest, RoundsAlternateAndEveryBodyRunsOnceARound) {
  std::string order;
  const auto results = Alternate(3, {{"a",
                                      [&] {
                                        order += 'a';
                                        return 2.0;
                                      }},
                                     {"b", [&] {
                                        order += 'b';
                                        return 4.0;
                                      }}});
  EXPECT_EQ(order, "abbaab");
  EXPECT_EQ(MedianRatio(results.at("a"), results.at("b")), 0.5);
}

TEST(HarnessTest, TheListOfTensorsHasResNet50sParameters) {
  const std::vector<int64_t> sizes = ResNet50Sizes();
  EXPECT_EQ(sizes.size(), 161u);
  EXPECT_EQ(std::accumulate(sizes.begin(), sizes.end(), int64_t{0}), 25557032);
  const std::vector<int64_t> like = ResNet50LikeSizes(64 << 20);
  EXPECT_EQ(std::accumulate(like.begin(), like.end(), int64_t{0}), 64 << 20);
}

TEST(HarnessTest, TheBaselinesMoveTheBytesTheyCount) {
  PrefaultedArray from(100003), to(100003);
  for (size_t i = 0; i < from.size(); ++i) from.data()[i] = static_cast<float>(i);
  for (int threads : {1, 2, 3}) {
    std::fill(to.data(), to.data() + to.size(), 0.0f);
    EXPECT_GT(MemcpyGbps(&to, from, threads), 0);
    EXPECT_EQ(std::vector<float>(to.data(), to.data() + to.size()),
              std::vector<float>(from.data(), from.data() + from.size()));
  }
  EXPECT_GT(ScaleInPlaceGbps(&to, 2), 0);
  EXPECT_NE(to.data()[100002], from.data()[100002]);
}

}  // namespace
}  // namespace codistill
