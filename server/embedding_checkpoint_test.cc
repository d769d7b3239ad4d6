#include "server/embedding_checkpoint.h"

#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/base/random.h"
#include "common/checkpoint/table_file.h"
#include "common/embedding/row_placement.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

constexpr int kDim = 3;
constexpr uint64_t kKeys = 3000;

std::string Directory() { return std::getenv("TEST_TMPDIR"); }

std::unique_ptr<EmbeddingTable> NewTable(int64_t min_count = 1) {
  EmbeddingTable::Options options;
  options.name = "t";
  options.dim = kDim;
  options.init = {5, 0.5f};
  options.min_count = min_count;
  options.optimizer.kind = RowOptimizer::Kind::kAdagrad;
  options.optimizer.initial_accumulator = 0.1f;
  auto table = EmbeddingTable::Create(options);
  EXPECT_TRUE(table.ok()) << table.status();
  return *std::move(table);
}

// A shard with one table, and the updates it gets: of the keys that are its own.
struct Shard {
  Shard(int index, int count, int64_t min_count = 1)
      : index(index),
        count(count),
        table(NewTable(min_count)),
        checkpoint({table.get()}, {"ADAGRAD"}) {}

  void Update(int64_t step, uint64_t first, uint64_t keys) {
    std::vector<uint64_t> own;
    for (uint64_t key = first; key < first + keys; ++key) {
      if (ShardOfKey(key, count) == index) own.push_back(key);
    }
    std::vector<float> gradients;
    for (const uint64_t key : own) {
      for (int d = 0; d < kDim; ++d) {
        gradients.push_back(static_cast<float>(UniformDouble(Mix(key, step, d))) - 0.5f);
      }
    }
    table->Apply({step, 0.1}, own, gradients);
  }

  std::vector<CheckpointFile> Save(int64_t step) {
    checkpoint.Snapshot(step);
    TableFileHeader identity;
    identity.set_group("g");
    identity.set_shard(index);
    identity.set_num_shards(count);
    Version version;
    version.set_generation(1);
    version.set_step(step);
    auto files = checkpoint.Write(step, Directory(), TableFileName(index, count, version, 0),
                                  identity, FileSystem::Real());
    EXPECT_TRUE(files.ok()) << files.status();
    return files.ok() ? *files : std::vector<CheckpointFile>();
  }

  absl::Status Load(int64_t step, const std::vector<std::vector<CheckpointFile>>& files) {
    CheckpointManifest manifest;
    manifest.set_group("g");
    for (const auto& of_shard : files) {
      ShardTables* const tables = manifest.add_tables();
      for (const CheckpointFile& file : of_shard) *tables->add_files() = file;
    }
    return checkpoint.Load(step, Directory(), manifest, index, count, FileSystem::Real());
  }

  std::map<uint64_t, std::vector<float>> Rows() const {
    std::map<uint64_t, std::vector<float>> rows;
    for (uint64_t key = 0; key < kKeys; ++key) {
      std::vector<float> row(kDim);
      uint8_t present = 0;
      table->Read({key}, absl::MakeSpan(row), absl::MakeSpan(&present, 1));
      if (present != 0) rows[key] = row;
    }
    return rows;
  }

  const int index, count;
  const std::unique_ptr<EmbeddingTable> table;
  EmbeddingCheckpoint checkpoint;
};

TEST(EmbeddingCheckpoint, ComesBackFromABaseAndItsDeltas) {
  Shard shard(0, 1);
  shard.Update(1, 0, 1000);
  std::vector<CheckpointFile> files = shard.Save(1);
  EXPECT_THAT(files, SizeIs(1));
  const uint64_t base = files[0].bytes();
  shard.Update(2, 50, 60);
  shard.Update(3, 1500, 10);
  files = shard.Save(3);
  ASSERT_THAT(files, SizeIs(2));
  EXPECT_LT(files[1].bytes(), base / 5);
  // Evicted: all but what was touched after step 2, and then some again.
  EXPECT_GT(shard.table->Evict(1, 0), 0);
  shard.Update(4, 990, 20);
  files = shard.Save(4);
  ASSERT_THAT(files, SizeIs(3));

  Shard back(0, 1);
  back.Update(1, 2000, 5);  // whatever was there goes
  ASSERT_TRUE(back.Load(4, {files}).ok());
  EXPECT_EQ(back.table->step(), 4);
  EXPECT_EQ(back.Rows(), shard.Rows());
  // Slots too: both go on alike.
  for (int64_t step = 5; step < 8; ++step) {
    shard.Update(step, 0, 1600);
    back.Update(step, 0, 1600);
  }
  EXPECT_EQ(back.Rows(), shard.Rows());
  // After a restore a base comes first.
  EXPECT_THAT(back.Save(7), SizeIs(1));
}

TEST(EmbeddingCheckpoint, BeginsANewBaseWhenDeltasAreLarge) {
  Shard shard(0, 1);
  shard.Update(1, 0, 2000);
  size_t longest = 0;
  std::vector<CheckpointFile> files = shard.Save(1);
  bool again = false;
  for (int64_t step = 2; step < 20; ++step) {
    shard.Update(step, 100 * step, 300);
    files = shard.Save(step);
    longest = std::max(longest, files.size());
    again = again || files.size() == 1;
  }
  EXPECT_GT(longest, 2u);
  EXPECT_LT(longest, 8u);
  EXPECT_TRUE(again);
  Shard back(0, 1);
  ASSERT_TRUE(back.Load(19, {files}).ok());
  EXPECT_EQ(back.Rows(), shard.Rows());
}

TEST(EmbeddingCheckpoint, KeysThatWaitForAdmissionWaitOn) {
  Shard shard(0, 1, /*min_count=*/3);
  shard.Update(1, 0, 50);
  shard.Save(1);
  shard.Update(2, 0, 30);
  const auto files = shard.Save(2);
  ASSERT_THAT(files, SizeIs(2));
  Shard back(0, 1, 3);
  ASSERT_TRUE(back.Load(2, {files}).ok());
  EXPECT_EQ(back.table->stats().waiting, 50);
  shard.Update(3, 0, 50);
  back.Update(3, 0, 50);
  EXPECT_THAT(back.Rows(), SizeIs(30));
  EXPECT_EQ(back.Rows(), shard.Rows());
}

TEST(EmbeddingCheckpoint, OtherNumbersOfShardsTakeTheirOwnKeys) {
  std::vector<std::vector<CheckpointFile>> files;
  std::map<uint64_t, std::vector<float>> all;
  for (int s = 0; s < 2; ++s) {
    Shard shard(s, 2);
    shard.Update(1, 0, 900);
    shard.Save(1);
    shard.Update(2, 300, 100);
    files.push_back(shard.Save(2));
    const auto rows = shard.Rows();
    all.insert(rows.begin(), rows.end());
  }
  EXPECT_THAT(all, SizeIs(900));
  std::map<uint64_t, std::vector<float>> found;
  for (int s = 0; s < 3; ++s) {
    Shard shard(s, 3);
    ASSERT_TRUE(shard.Load(2, files).ok());
    for (const auto& [key, row] : shard.Rows()) {
      EXPECT_EQ(ShardOfKey(key, 3), s);
      EXPECT_TRUE(found.emplace(key, row).second);
    }
  }
  EXPECT_EQ(found, all);
}

TEST(EmbeddingCheckpoint, EveryDamagedByteIsFound) {
  Shard shard(0, 1);
  shard.Update(1, 0, 20);
  const auto files = shard.Save(1);
  ASSERT_THAT(files, SizeIs(1));
  const std::string path = JoinPath(Directory(), files[0].name());
  const auto whole = ReadFile(path, 1 << 20);
  ASSERT_TRUE(whole.ok());
  for (size_t i = 0; i < whole->size(); ++i) {
    std::string damaged = *whole;
    damaged[i] = static_cast<char>(damaged[i] ^ (1 << (i % 8)));
    ASSERT_TRUE(WriteFileAtomically(path, damaged).ok());
    Shard back(0, 1);
    const absl::Status status = back.Load(1, {files});
    ASSERT_FALSE(status.ok()) << "byte " << i;
    ASSERT_THAT(std::string(status.message()), HasSubstr(path)) << "byte " << i;
  }
  for (size_t length = 0; length < whole->size(); length += 7) {
    ASSERT_TRUE(WriteFileAtomically(path, whole->substr(0, length)).ok());
    Shard back(0, 1);
    ASSERT_FALSE(back.Load(1, {files}).ok()) << "cut to " << length;
  }
}

}  // namespace
}  // namespace codistill
