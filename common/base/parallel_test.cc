#include "common/base/parallel.h"

#include <atomic>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(ParallelForTest, CoversEveryIndexOnce) {
  for (int threads : {0, 1, 2, 3, 7}) {
    for (int64_t n : {0, 1, 2, 5, 100, 1001}) {
      std::vector<std::atomic<int>> hits(n);
      ParallelFor(threads, n, 1, [&](int64_t begin, int64_t end) {
        ASSERT_LT(begin, end);
        for (int64_t i = begin; i < end; ++i) ++hits[i];
      });
      for (int64_t i = 0; i < n; ++i) ASSERT_EQ(hits[i], 1) << threads << " " << n << " " << i;
    }
  }
}

TEST(ParallelForTest, HonoursGrainAndThreads) {
  std::atomic<int> ranges{0};
  ParallelFor(8, 100, 40, [&](int64_t begin, int64_t end) {
    ++ranges;
    EXPECT_GE(end - begin, 40);
  });
  EXPECT_EQ(ranges, 2);
  ranges = 0;
  ParallelFor(3, 100, 1, [&](int64_t, int64_t) { ++ranges; });
  EXPECT_EQ(ranges, 3);
  ranges = 0;
  ParallelFor(3, 10, 100, [&](int64_t, int64_t) { ++ranges; });
  EXPECT_EQ(ranges, 1);
}

}  // namespace
}  // namespace codistill
