#include "server/embedding/staged_rows.h"

#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/base/random.h"
#include "common/embedding/row_placement.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

absl::Status Add(StagedRows* rows, uint32_t table, uint32_t dim, const std::vector<uint64_t>& keys,
                 const std::vector<float>& gradients) {
  return rows->Add(table, dim, static_cast<int64_t>(keys.size()),
                   keys.size() * 8 + gradients.size() * 4, [&](void* to) {
                     std::memcpy(to, keys.data(), keys.size() * 8);
                     std::memcpy(static_cast<char*>(to) + keys.size() * 8, gradients.data(),
                                 gradients.size() * 4);
                   });
}

EmbeddingTable::Options TableOptions(int dim) {
  EmbeddingTable::Options options;
  options.name = "ads";
  options.dim = dim;
  return options;  // SGD from zeros
}

TEST(StagedRows, KeepsWhatCame) {
  const RowLayout layout({{"ads", 2}, {"wide", 1}}, 0, 1);
  StagedRows rows(&layout);
  EXPECT_TRUE(rows.empty());
  ASSERT_TRUE(Add(&rows, 0, 2, {7, 0}, {1, 2, 3, 4}).ok());
  ASSERT_TRUE(Add(&rows, 0, 2, {}, {}).ok());
  ASSERT_TRUE(Add(&rows, 0, 2, {9}, {5, 6}).ok());
  ASSERT_EQ(rows.parts(0).size(), 2u);
  EXPECT_EQ(rows.parts(0)[0].keys, (std::vector<uint64_t>{7, 0}));
  EXPECT_EQ(rows.parts(0)[1].gradients, (std::vector<float>{5, 6}));
  EXPECT_TRUE(rows.parts(1).empty());
  EXPECT_EQ(rows.bytes(), 48u);
  EXPECT_TRUE(rows.finite().ok());
}

TEST(StagedRows, NamesWhatIsWrong) {
  const RowLayout layout({{"ads", 2}}, 1, 3);
  StagedRows rows(&layout);
  uint64_t own = 0, other = 0;
  while (ShardOfKey(own, 3) != 1) ++own;
  while (ShardOfKey(other, 3) != 2) ++other;
  const auto error = [](const absl::Status& status) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(error(Add(&rows, 1, 2, {own}, {1, 2})), HasSubstr("embedding table 1"));
  EXPECT_THAT(error(Add(&rows, 0, 3, {own}, {1, 2, 3})), HasSubstr("2 would be right"));
  EXPECT_THAT(error(Add(&rows, 0, 2, {own}, {1})), HasSubstr("16 a key are right"));
  EXPECT_THAT(error(Add(&rows, 0, 2, {other}, {1, 2})), HasSubstr("belongs to shard 2"));
  EXPECT_TRUE(rows.empty());
  ASSERT_TRUE(Add(&rows, 0, 2, {own}, {1, NAN}).ok());
  EXPECT_THAT(error(rows.finite()), HasSubstr("key " + std::to_string(own)));
}

// Against doubles, key by key.
TEST(ApplyRows, TakesTheWeightedMeanOverRanks) {
  const int dim = 3;
  const RowLayout layout({{"ads", dim}}, 0, 1);
  RandomStream random(3);
  StagedRows pushes[3] = {StagedRows(&layout), StagedRows(&layout), StagedRows(&layout)};
  const double weights[3] = {0.5, 0.125, 0.375};
  std::map<uint64_t, std::vector<double>> want;
  for (int p = 0; p < 3; ++p) {
    for (int part = 0; part < 4; ++part) {
      std::map<uint64_t, int> unique;
      // Parts of one push share no key.
      while (unique.size() < 500) unique.emplace(random.Below(1500) * 4 + part, 0);
      std::vector<uint64_t> keys;
      std::vector<float> gradients;
      for (const auto& key : unique) {
        keys.push_back(key.first);
        std::vector<double>& sum = want[key.first];
        sum.resize(dim);
        for (int d = 0; d < dim; ++d) {
          gradients.push_back(static_cast<float>(random.Normal()));
          sum[d] += weights[p] * gradients.back();
        }
      }
      ASSERT_TRUE(Add(&pushes[p], 0, dim, keys, gradients).ok());
    }
  }
  auto table = EmbeddingTable::Create(TableOptions(dim)).value();
  const std::vector<RowContribution> contributions = {
      {&pushes[0], weights[0]}, {&pushes[1], weights[1]}, {&pushes[2], weights[2]}};
  const auto counts = ApplyRows({1, 1.0}, 0, contributions, table.get());
  EXPECT_EQ(counts.applied, static_cast<int64_t>(want.size()));
  for (const auto& item : want) {
    std::vector<float> row(dim);
    ASSERT_TRUE(table->Gather({item.first}, absl::MakeSpan(row)).ok());
    for (int d = 0; d < dim; ++d) ASSERT_NEAR(row[d], -item.second[d], 2e-6);
  }
}

TEST(ApplyRows, CountsAStepWithoutRows) {
  const RowLayout layout({{"ads", 1}}, 0, 1);
  StagedRows none(&layout);
  auto table = EmbeddingTable::Create(TableOptions(1)).value();
  ApplyRows({1, 1.0}, 0, {}, table.get());
  ApplyRows({2, 1.0}, 0, {{nullptr, 1}}, table.get());
  ApplyRows({3, 1.0}, 0, {{&none, 0.5}, {nullptr, 0.5}}, table.get());
  EXPECT_EQ(table->step(), 3);
  EXPECT_EQ(table->stats().rows, 0);
}

}  // namespace
}  // namespace codistill
