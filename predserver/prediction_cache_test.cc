#include "predserver/prediction_cache.h"

#include <limits>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "predserver/cached_rows.h"

namespace codistill {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using Next = CachedRows::Next;
using Origin = PredictionCache::Origin;

const absl::Time kLoaded = absl::UnixEpoch() + absl::Hours(1);

std::vector<float> Row(int64_t id, int64_t step, size_t floats = 4) {
  std::vector<float> row(floats);
  for (size_t i = 0; i < floats; ++i) row[i] = static_cast<float>(id * 1000 + step * 10 + i);
  return row;
}

void Insert(PredictionCache* cache, int64_t id, uint64_t generation, int64_t step) {
  cache->Insert({id, generation}, {step, kLoaded}, Row(id, step).data(), 4);
}

// The step of the row found, checked against what Insert put there; -1: none.
int64_t Find(PredictionCache* cache, int64_t id, uint64_t generation, int64_t least_step = 0) {
  std::vector<float> row(4);
  Origin origin;
  if (!cache->Find({id, generation}, least_step, row.data(), &origin)) return -1;
  EXPECT_EQ(row, Row(id, origin.step));
  EXPECT_EQ(origin.loaded_at, kLoaded);
  return origin.step;
}

TEST(PredictionCacheTest, KeysAreTheWholeKey) {
  PredictionCache cache(1 << 20);
  EXPECT_EQ(cache.row_floats(), 0);
  Insert(&cache, 7, 1, 10);
  Insert(&cache, -7, 1, 11);
  Insert(&cache, 7, 2, 12);
  EXPECT_EQ(cache.row_floats(), 4);
  EXPECT_EQ(Find(&cache, 7, 1), 10);
  EXPECT_EQ(Find(&cache, -7, 1), 11);
  EXPECT_EQ(Find(&cache, 7, 2), 12);
  EXPECT_EQ(Find(&cache, 8, 1), -1);
  EXPECT_EQ(Find(&cache, 7, 3), -1);
}

TEST(PredictionCacheTest, OldRowsDoNotAnswerAndNewerOnesTakeTheirPlace) {
  PredictionCache cache(1 << 20);
  Insert(&cache, 7, 1, 10);
  EXPECT_EQ(Find(&cache, 7, 1, 10), 10);
  EXPECT_EQ(Find(&cache, 7, 1, 11), -1);
  Insert(&cache, 7, 1, 20);
  const int64_t bytes = cache.bytes();
  Insert(&cache, 7, 1, 15);  // late
  EXPECT_EQ(Find(&cache, 7, 1, 11), 20);
  EXPECT_EQ(cache.bytes(), bytes);
  cache.Insert({8, 1}, {20, kLoaded}, Row(8, 20, 5).data(), 5);  // another size
  EXPECT_EQ(Find(&cache, 8, 1), -1);
}

TEST(PredictionCacheTest, NeverHasMoreThanItsLimitAndKeepsWhatIsWanted) {
  constexpr int64_t kLimit = 256 << 10;
  PredictionCache cache(kLimit);
  int64_t most = 0;
  for (int64_t id = 0; id < 8000; ++id) {
    Insert(&cache, id, 1, 1);
    for (int64_t wanted = 0; wanted < 100 && wanted <= id; ++wanted) {
      ASSERT_EQ(Find(&cache, wanted, 1), 1) << id;
    }
    most = std::max(most, cache.bytes());
  }
  EXPECT_LE(most, kLimit);
  EXPECT_GE(most, kLimit / 2);
  int64_t kept = 0;
  for (int64_t id = 0; id < 8000; ++id) kept += Find(&cache, id, 1) >= 0;
  EXPECT_GT(kept, 1000);
  EXPECT_LT(kept * 4 * static_cast<int64_t>(sizeof(float)), kLimit);
}

TEST(PredictionCacheTest, ARowThatDoesNotFitIsNotKept) {
  PredictionCache cache(1000);
  cache.Insert({1, 1}, {1, kLoaded}, Row(1, 1, 1000).data(), 1000);
  std::vector<float> row(1000);
  Origin origin;
  EXPECT_FALSE(cache.Find({1, 1}, 0, row.data(), &origin));
  EXPECT_LE(cache.bytes(), 1000);
}

TEST(PredictionCacheTest, OneClaimsAndOthersWait) {
  PredictionCache cache(1 << 20);
  int a = 0, b = 0, told = 0;
  EXPECT_TRUE(cache.Claim({1, 1}, &a));
  EXPECT_TRUE(cache.Claim({2, 1}, &a));
  EXPECT_TRUE(cache.Claim({1, 1}, &a));
  EXPECT_FALSE(cache.Claim({1, 1}, &b));
  EXPECT_TRUE(cache.Claim({1, 2}, &b));
  auto waiter = std::make_shared<PredictionCache::Waiter>([&] { ++told; });
  EXPECT_TRUE(cache.Wait({1, 1}, waiter));
  EXPECT_TRUE(cache.Wait({2, 1}, waiter));
  EXPECT_FALSE(cache.Wait({3, 1}, waiter));
  waiter->Start();
  cache.Release({{1, 1}, {2, 1}}, &b);  // are not its own
  cache.Release({{1, 1}}, &a);
  EXPECT_EQ(told, 0);
  cache.Release({{2, 1}}, &a);
  EXPECT_EQ(told, 1);
  EXPECT_TRUE(cache.Claim({1, 1}, &b));
  auto nothing = std::make_shared<PredictionCache::Waiter>([&] { ++told; });
  EXPECT_FALSE(cache.Wait({2, 1}, nothing));
  nothing->Start();
  EXPECT_EQ(told, 2);
}

TEST(PredictionCacheTest, ManyThreads) {
  PredictionCache cache(64 << 10);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&cache, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 20000; ++i) {
        const int64_t id = random() % 1000;
        if (random() % 2 == 0) {
          Insert(&cache, id, 1, i);
        } else {
          Find(&cache, id, 1);
        }
        const PredictionCache::Key key{id, 1};
        if (cache.Claim(key, &random)) cache.Release({key}, &random);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(cache.bytes(), 64 << 10);
}

// Rows of two labels each of two columns.
class CachedRowsTest : public testing::Test {
 protected:
  Next Look(CachedRows* rows, uint64_t generation = 1, int64_t least = 0) {
    return rows->Look(generation, least, &hits_, &misses_);
  }
  static Version At(int64_t step, uint64_t generation = 1) {
    Version version;
    version.set_generation(generation);
    version.set_step(step);
    return version;
  }
  // What a pass gives for these ids.
  static Tensor Logits(const std::vector<int64_t>& ids, int64_t step) {
    Tensor logits = Tensor::Allocate(DT_FLOAT, {2 * static_cast<int64_t>(ids.size()), 2});
    float* to = logits.As<float>().data();
    for (const int64_t id : ids) {
      for (const float value : Row(id, step)) *to++ = value;
    }
    return logits;
  }
  static void ExpectRows(const CachedRows& rows, const std::vector<std::vector<float>>& want) {
    std::vector<float> all;
    for (const auto& row : want) all.insert(all.end(), row.begin(), row.end());
    EXPECT_THAT(rows.logits().As<float>(), testing::ElementsAreArray(all));
    EXPECT_THAT(rows.logits().shape(), ElementsAre(2 * want.size(), 2));
  }

  PredictionCache cache_{1 << 20};
  int64_t hits_ = 0, misses_ = 0;
};

TEST_F(CachedRowsTest, FirstComputedThenFound) {
  CachedRows first(&cache_, {5, 6, 5}, 2);
  ASSERT_EQ(Look(&first), Next::kCompute);
  EXPECT_THAT(first.compute(), IsEmpty());  // all
  EXPECT_EQ(misses_, 3);
  const Tensor logits = Logits({5, 6, 5}, 10);
  ASSERT_TRUE(first.Take(logits, At(10), kLoaded));
  EXPECT_TRUE(first.complete());
  EXPECT_EQ(first.logits().data(), logits.data());  // not a copy
  EXPECT_EQ(first.oldest().step, 10);

  CachedRows second(&cache_, {6, 5}, 2);
  ASSERT_EQ(Look(&second), Next::kAnswer);
  EXPECT_EQ(hits_, 2);
  ExpectRows(second, {Row(6, 10), Row(5, 10)});
  EXPECT_EQ(second.oldest().step, 10);
  EXPECT_EQ(second.oldest().loaded_at, kLoaded);
}

TEST_F(CachedRowsTest, OnlyWhatIsMissingIsComputed) {
  Insert(&cache_, 5, 1, 10);
  Insert(&cache_, 7, 1, 12);
  Insert(&cache_, 8, 1, 3);
  CachedRows rows(&cache_, {5, 6, 7, 8}, 2);
  ASSERT_EQ(Look(&rows, 1, 5), Next::kCompute);
  EXPECT_THAT(rows.compute(), ElementsAre(1, 3));
  EXPECT_EQ(hits_, 2);
  EXPECT_EQ(misses_, 2);
  ASSERT_TRUE(rows.Take(Logits({6, 8}, 20), At(20), kLoaded));
  ASSERT_TRUE(rows.complete());
  ExpectRows(rows, {Row(5, 10), Row(6, 20), Row(7, 12), Row(8, 20)});
  EXPECT_EQ(rows.oldest().step, 10);
  EXPECT_EQ(rows.generation(), 1u);
}

TEST_F(CachedRowsTest, GenerationsAreNeverMixed) {
  Insert(&cache_, 5, 1, 10);
  CachedRows rows(&cache_, {5, 6}, 2);
  ASSERT_EQ(Look(&rows, 1), Next::kCompute);
  // The group was restored before the pass.
  EXPECT_FALSE(rows.Take(Logits({6}, 4), At(4, 2), kLoaded));
  ASSERT_EQ(Look(&rows, 2), Next::kCompute);
  EXPECT_EQ(hits_, 1);  // 6, of the new generation
  EXPECT_THAT(rows.compute(), ElementsAre(0));
  ASSERT_TRUE(rows.Take(Logits({5}, 5), At(5, 2), kLoaded));
  ASSERT_TRUE(rows.complete());
  ExpectRows(rows, {Row(5, 5), Row(6, 4)});
}

TEST_F(CachedRowsTest, WhatOthersComputeIsWaitedFor) {
  CachedRows first(&cache_, {5, 6}, 2), second(&cache_, {6, 7}, 2), third(&cache_, {5, 6}, 2);
  ASSERT_EQ(Look(&first), Next::kCompute);
  ASSERT_EQ(Look(&second), Next::kCompute);
  EXPECT_THAT(second.compute(), ElementsAre(1));
  ASSERT_EQ(Look(&third), Next::kWait);
  int told = 0;
  third.Wait([&] { ++told; })->Start();
  ASSERT_TRUE(second.Take(Logits({7}, 10), At(10), kLoaded));
  second.GiveUp();
  EXPECT_FALSE(second.complete());
  ASSERT_EQ(Look(&second), Next::kWait);
  EXPECT_EQ(told, 0);
  ASSERT_TRUE(first.Take(Logits({5, 6}, 11), At(11), kLoaded));
  EXPECT_EQ(told, 0);
  first.GiveUp();
  EXPECT_EQ(told, 1);
  ASSERT_EQ(Look(&second), Next::kAnswer);
  ExpectRows(second, {Row(6, 11), Row(7, 10)});
  EXPECT_EQ(second.oldest().step, 10);
  ASSERT_EQ(Look(&third), Next::kAnswer);
  ExpectRows(third, {Row(5, 11), Row(6, 11)});
}

TEST_F(CachedRowsTest, WhatIsNotFiniteIsNotKept) {
  CachedRows first(&cache_, {5, 6, 7}, 2);
  ASSERT_EQ(Look(&first), Next::kCompute);
  Tensor logits = Logits({5, 6, 7}, 10);
  logits.As<float>()[1] = std::numeric_limits<float>::infinity();
  logits.As<float>()[11] = std::numeric_limits<float>::quiet_NaN();
  ASSERT_TRUE(first.Take(logits, At(10), kLoaded));
  first.GiveUp();
  EXPECT_EQ(first.logits().data(), logits.data());  // whoever asked is told
  CachedRows second(&cache_, {5, 6, 7}, 2);
  ASSERT_EQ(Look(&second), Next::kCompute);
  EXPECT_THAT(second.compute(), ElementsAre(0, 2));
}

TEST_F(CachedRowsTest, WhenTheOtherGivesUpOneComputesAndTheRestWaitAgain) {
  auto first = std::make_unique<CachedRows>(&cache_, std::vector<int64_t>{5}, 2);
  CachedRows second(&cache_, {5}, 2), third(&cache_, {5}, 2);
  ASSERT_EQ(Look(first.get()), Next::kCompute);
  ASSERT_EQ(Look(&second), Next::kWait);
  ASSERT_EQ(Look(&third), Next::kWait);
  int told = 0;
  second.Wait([&] { ++told; })->Start();
  third.Wait([&] { ++told; })->Start();
  first = nullptr;
  EXPECT_EQ(told, 2);
  EXPECT_EQ(Look(&second), Next::kCompute);
  EXPECT_EQ(Look(&third), Next::kWait);
  third.Wait([&] { ++told; })->Start();
  second.GiveUp();
  EXPECT_EQ(told, 3);
  // Not for ever.
  CachedRows failing(&cache_, {5}, 2);
  for (int i = 2; i < 4; ++i) {
    ASSERT_EQ(Look(&failing), Next::kCompute);
    ASSERT_EQ(Look(&third), Next::kWait);
    third.Wait([] {})->Start();
    failing.GiveUp();
  }
  ASSERT_EQ(Look(&failing), Next::kCompute);
  EXPECT_EQ(Look(&third), Next::kCompute);
}

}  // namespace
}  // namespace codistill
