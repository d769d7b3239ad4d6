#include "common/model/followed_rows.h"

#include <map>
#include <vector>

#include "common/base/random.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;

constexpr RowInit kInit{7, 0.5f};

std::vector<float> Find(const FollowedRows& rows, uint64_t key) {
  std::vector<float> row(rows.dim());
  rows.Find({key}, row.data());
  return row;
}

std::vector<float> Default(uint64_t key, int64_t dim) {
  std::vector<float> row(dim);
  DefaultRow(kInit, key, absl::MakeSpan(row));
  return row;
}

TEST(FollowedRows, AnswersDefaultsWhereThereIsNoRow) {
  const auto rows = FollowedRows::Empty(3, kInit);
  EXPECT_EQ(rows->size(), 0);
  EXPECT_EQ(Find(*rows, 42), Default(42, 3));
  EXPECT_NE(Find(*rows, 42), Find(*rows, 43));
}

TEST(FollowedRows, AVersionIsUntouchedByTheNext) {
  const float a[] = {1, 2}, b[] = {3, 4}, c[] = {5, 6};
  FollowedRows::Builder first(FollowedRows::Empty(2, kInit));
  first.Put(10, a);
  first.Put(11, b);
  const auto one = first.Build();
  FollowedRows::Builder second(one);
  second.Put(10, c);
  second.Erase(11);
  second.Erase(12);
  const auto two = second.Build();
  EXPECT_EQ(one->size(), 2);
  EXPECT_THAT(Find(*one, 10), ElementsAre(1, 2));
  EXPECT_THAT(Find(*one, 11), ElementsAre(3, 4));
  EXPECT_EQ(two->size(), 1);
  EXPECT_THAT(Find(*two, 10), ElementsAre(5, 6));
  EXPECT_EQ(Find(*two, 11), Default(11, 2));
}

// Against a map, over versions that grow, change and shrink.
TEST(FollowedRows, HoldsWhatAMapHolds) {
  constexpr int64_t kDim = 5;
  RandomStream random(3);
  std::map<uint64_t, std::vector<float>> wanted;
  auto rows = FollowedRows::Empty(kDim, kInit);
  for (int version = 0; version < 12; ++version) {
    FollowedRows::Builder builder(rows);
    for (int i = 0; i < 3000; ++i) {
      const uint64_t key = Mix(random.Below(20000));
      if (random.Below(version < 8 ? 4 : 1) == 0) {
        builder.Erase(key);
        wanted.erase(key);
        continue;
      }
      std::vector<float> row(kDim);
      for (float& x : row) x = static_cast<float>(random.Uniform());
      builder.Put(key, row.data());
      wanted[key] = row;
    }
    const auto before = rows;
    const int64_t size_before = rows->size();
    rows = builder.Build();
    EXPECT_EQ(before->size(), size_before);
    ASSERT_EQ(rows->size(), static_cast<int64_t>(wanted.size()));
    for (const auto& [key, row] : wanted) ASSERT_EQ(Find(*rows, key), row);
    for (uint64_t i = 0; i < 20000; i += 7) {
      if (wanted.count(Mix(i)) > 0) continue;
      ASSERT_EQ(Find(*rows, Mix(i)), Default(Mix(i), kDim));
    }
    EXPECT_GE(rows->bytes(), wanted.size() * (kDim * sizeof(float) + sizeof(uint64_t)));
  }
}

TEST(FollowedRows, TakesLittleMoreMemoryThanItsRows) {
  constexpr int64_t kDim = 16;
  constexpr int64_t kRows = 100000;
  FollowedRows::Builder builder(FollowedRows::Empty(kDim, kInit));
  const std::vector<float> row(kDim, 1.0f);
  for (int64_t i = 0; i < kRows; ++i) builder.Put(Mix(i), row.data());
  const auto rows = builder.Build();
  EXPECT_LT(rows->bytes(), kRows * (kDim * sizeof(float) + sizeof(uint64_t)) * 2);
}

}  // namespace
}  // namespace codistill
