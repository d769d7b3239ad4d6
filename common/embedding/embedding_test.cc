#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/embedding/default_row.h"
#include "common/embedding/row_placement.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

std::vector<float> Row(const RowInit& init, uint64_t key, int dim) {
  std::vector<float> row(dim);
  DefaultRow(init, key, absl::MakeSpan(row));
  return row;
}

// Checkpoints hold no rows of keys that were never pushed: what they are must never change.
TEST(DefaultRow, StaysWhatItIs) {
  const RowInit init = {TableSeed(1, "a", "ads"), 0.5f};
  EXPECT_EQ(Row(init, 0, 3), (std::vector<float>{0.187589467f, -0.469496608f, 0.441156507f}));
  EXPECT_EQ(Row(init, std::numeric_limits<uint64_t>::max(), 2),
            (std::vector<float>{-0.346165836f, -0.0380627513f}));
}

TEST(DefaultRow, DependsOnSeedGroupTableAndKey) {
  const RowInit init = {TableSeed(1, "a", "ads"), 0.5f};
  EXPECT_NE(Row(init, 1, 4), Row(init, 2, 4));
  EXPECT_NE(Row(init, 1, 4), Row({TableSeed(2, "a", "ads"), 0.5f}, 1, 4));
  EXPECT_NE(Row(init, 1, 4), Row({TableSeed(1, "b", "ads"), 0.5f}, 1, 4));
  EXPECT_NE(Row(init, 1, 4), Row({TableSeed(1, "a", "users"), 0.5f}, 1, 4));
  EXPECT_EQ(Row({init.seed, 0}, 1, 4), std::vector<float>(4, 0.0f));
}

TEST(DefaultRow, IsUniform) {
  const float scale = 0.25f;
  double sum = 0, squares = 0, largest = 0;
  const int rows = 20000, dim = 5;
  for (int key = 0; key < rows; ++key) {
    for (const float x : Row({7, scale}, key, dim)) {
      ASSERT_GE(x, -scale);
      ASSERT_LT(x, scale);
      sum += x;
      squares += static_cast<double>(x) * x;
      largest = std::max(largest, static_cast<double>(x));
    }
  }
  const double n = rows * dim;
  EXPECT_NEAR(sum / n, 0, 4 * scale / std::sqrt(3 * n));
  EXPECT_NEAR(squares / n, scale * scale / 3, 0.001);
  EXPECT_GT(largest, 0.9999 * scale);
}

TEST(RowPlacement, GivesEveryShardAnEqualRangeOfHashes) {
  EXPECT_EQ(ShardOfHash(0, 3), 0);
  EXPECT_EQ(ShardOfHash(0x5555555555555555u, 3), 0);
  EXPECT_EQ(ShardOfHash(0x5555555555555556u, 3), 1);
  EXPECT_EQ(ShardOfHash(~uint64_t{0}, 3), 2);
  for (const int shards : {1, 2, 7}) {
    std::vector<int> count(shards);
    for (uint64_t key = 0; key < 70000; ++key) ++count[ShardOfKey(key, shards)];
    for (const int c : count) EXPECT_NEAR(c, 70000 / shards, 600);
  }
  // Part of what checkpoints rely on.
  EXPECT_EQ(KeyHash(0), 0x3564b439cd1e1f16u);
}

}  // namespace
}  // namespace codistill
