#include "server/embedding_cuts.h"

#include <map>
#include <memory>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::Contains;
using ::testing::SizeIs;

constexpr int kDim = 2;

std::unique_ptr<EmbeddingTable> NewTable(int64_t max_age_steps = 0) {
  EmbeddingTable::Options options;
  options.name = "t";
  options.dim = kDim;
  options.init = {5, 0.5f};
  options.max_age_steps = max_age_steps;
  auto table = EmbeddingTable::Create(options);
  EXPECT_TRUE(table.ok()) << table.status();
  return *std::move(table);
}

void Update(EmbeddingTable* table, int64_t step, const std::vector<uint64_t>& keys) {
  std::vector<float> gradients(keys.size() * kDim, static_cast<float>(step));
  table->Apply({step, 0.1}, keys, gradients);
}

// A follower of one table.
struct Copy {
  std::map<uint64_t, std::vector<float>> rows;
  int64_t erased = 0;

  // The chunks' keys, in all.
  int64_t Take(FollowReader* reader) {
    if (reader->whole()) rows.clear();
    int64_t keys = 0;
    FollowedChunk chunk;
    while (reader->Next(&chunk)) {
      for (const uint64_t key : chunk.evicted) erased += static_cast<int64_t>(rows.erase(key));
      for (size_t i = 0; i < chunk.keys.size(); ++i) {
        rows[chunk.keys[i]] = {chunk.rows[i * kDim], chunk.rows[i * kDim + 1]};
      }
      keys += static_cast<int64_t>(chunk.keys.size());
    }
    return keys;
  }
};

// What the table holds.
std::map<uint64_t, std::vector<float>> Now(const EmbeddingTable& table, uint64_t most = 5000) {
  std::map<uint64_t, std::vector<float>> rows;
  for (uint64_t key = 0; key < most; ++key) {
    std::vector<float> row(kDim);
    uint8_t present = 0;
    table.Read({key}, absl::MakeSpan(row), absl::MakeSpan(&present, 1));
    if (present != 0) rows[key] = row;
  }
  return rows;
}

std::unique_ptr<FollowReader> Read(EmbeddingCuts* cuts, int64_t label, int64_t since) {
  auto reader = cuts->Read(label, since);
  EXPECT_TRUE(reader.ok()) << reader.status();
  return reader.ok() ? *std::move(reader) : nullptr;
}

TEST(EmbeddingCuts, AFollowerTakesChangesFromCutToCut) {
  const auto table = NewTable();
  EmbeddingCuts cuts({table.get()}, {});
  cuts.Start(0);
  Copy copy;
  copy.Take(Read(&cuts, 0, -1).get());
  EXPECT_THAT(copy.rows, SizeIs(0));
  Update(table.get(), 1, {1, 2, 3});
  Update(table.get(), 2, {2});
  cuts.Publish(2);
  const auto at_two = Now(*table);
  // Beyond the cut; not part of it.
  Update(table.get(), 3, {3, 4});
  auto reader = Read(&cuts, 2, 0);
  EXPECT_FALSE(reader->whole());
  EXPECT_TRUE(reader->exact());
  EXPECT_EQ(copy.Take(reader.get()), 3);
  EXPECT_EQ(copy.rows, at_two);
  cuts.Publish(3);
  EXPECT_EQ(copy.Take(Read(&cuts, 3, 2).get()), 2);
  EXPECT_EQ(copy.rows, Now(*table));
  // Nothing has changed since itself; an older cut is still there for another follower.
  EXPECT_EQ(Copy().Take(Read(&cuts, 3, 3).get()), 0);
  Copy late;
  late.Take(Read(&cuts, 2, -1).get());
  EXPECT_EQ(late.rows, at_two);
  EXPECT_TRUE(absl::IsAborted(cuts.Read(4, 3).status()));
  EXPECT_TRUE(absl::IsAborted(cuts.Read(1, -1).status()));
}

TEST(EmbeddingCuts, TellsOfEvictions) {
  const auto table = NewTable();
  EmbeddingCuts cuts({table.get()}, {});
  cuts.Start(0);
  Update(table.get(), 1, {1, 2, 3});
  cuts.Publish(1);
  Copy copy;
  copy.Take(Read(&cuts, 1, -1).get());
  EXPECT_THAT(copy.rows, SizeIs(3));
  Update(table.get(), 5, {2});
  EXPECT_EQ(table->Evict(2, 0), 2);
  cuts.Publish(5);
  copy.Take(Read(&cuts, 5, 1).get());
  EXPECT_THAT(copy.rows, SizeIs(1));
  EXPECT_EQ(copy.erased, 2);
  EXPECT_EQ(copy.rows, Now(*table));
}

TEST(EmbeddingCuts, AWholeTableThatHasMovedOnBecomesTheNextCut) {
  const auto table = NewTable();
  for (int64_t step = 1; step <= 3; ++step) Update(table.get(), step, {1, 2, 3, 4, 5});
  EmbeddingCuts cuts({table.get()}, {});
  cuts.Start(3);  // as after a restore: the table has rows
  Copy copy;
  auto reader = Read(&cuts, 3, -1);
  EXPECT_TRUE(reader->whole());
  EXPECT_TRUE(reader->exact());
  copy.Take(reader.get());
  EXPECT_EQ(copy.rows, Now(*table));
  Update(table.get(), 4, {1, 6});
  reader = Read(&cuts, 3, -1);
  EXPECT_TRUE(reader->whole());
  EXPECT_FALSE(reader->exact());
  // Read while the table changes on.
  Update(table.get(), 5, {2, 7});
  copy.Take(reader.get());
  cuts.Publish(5);
  copy.Take(Read(&cuts, 5, 3).get());
  EXPECT_EQ(copy.rows, Now(*table));
}

TEST(EmbeddingCuts, ForgetsOldChangesAndMergesThem) {
  const auto table = NewTable();
  EmbeddingCuts::Options options;
  options.max_deltas = 4;
  EmbeddingCuts cuts({table.get()}, options);
  cuts.Start(0);
  Copy each, seldom;
  each.Take(Read(&cuts, 0, -1).get());
  seldom.Take(Read(&cuts, 0, -1).get());
  for (int64_t step = 1; step <= 40; ++step) {
    Update(table.get(), step, {static_cast<uint64_t>(step), static_cast<uint64_t>(step % 7)});
    cuts.Publish(step);
    each.Take(Read(&cuts, step, step - 1).get());
    ASSERT_EQ(each.rows, Now(*table, 100)) << step;
    if (step % 9 == 0) {
      seldom.Take(Read(&cuts, step, step - 9).get());
      ASSERT_EQ(seldom.rows, Now(*table, 100)) << step;
    }
  }
  // All that is kept is the rows once and a little.
  EXPECT_LT(cuts.bytes(), 100 * (sizeof(uint64_t) + kDim * sizeof(float)));
  // Without room for anything each follower takes the whole.
  options.max_bytes = 1;
  EmbeddingCuts poor({table.get()}, options);
  poor.Start(40);
  Update(table.get(), 41, {1, 2, 3});
  poor.Publish(41);
  EXPECT_EQ(poor.bytes(), 0u);
  const auto reader = Read(&poor, 41, 40);
  EXPECT_TRUE(reader->whole());
  Copy copy;
  copy.Take(reader.get());
  EXPECT_EQ(copy.rows, Now(*table, 100));
}

}  // namespace
}  // namespace codistill
