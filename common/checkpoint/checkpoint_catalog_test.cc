#include "common/checkpoint/checkpoint_catalog.h"

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/fault_injecting_file_system.h"
#include "common/checkpoint/manifest.h"
#include "common/checkpoint/shard_file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::UnorderedElementsAre;

class CheckpointCatalogTest : public testing::Test {
 protected:
  void SetUp() override {
    path_ = JoinPath(testing::TempDir(), "checkpoints",
                     testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(RemoveAll(path_).ok());
    Open();
  }

  void Open() {
    directory_.reset();
    auto directory = CheckpointCatalog::Claim(path_);
    ASSERT_TRUE(directory.ok()) << directory.status();
    directory_ = *std::move(directory);
  }

  // A whole checkpoint of one shard.
  void Save(uint64_t generation, int64_t step, int keep = 10) {
    Save(generation, step, CheckpointCatalog::Retention{keep}, 0);
  }
  void Save(uint64_t generation, int64_t step, const CheckpointCatalog::Retention& retention,
            int64_t created_unix_ms) {
    CheckpointShardHeader identity;
    identity.mutable_version()->set_generation(generation);
    identity.mutable_version()->set_step(step);
    ShardFileData data;
    data.entry.set_dtype(DT_FLOAT);
    const float value = static_cast<float>(step);
    data.data = &value;
    data.bytes = sizeof(value);
    const auto file = WriteShardFile(path_, ShardFileName(0, 1, identity.version(), 0), identity,
                                     absl::MakeConstSpan(&data, 1));
    ASSERT_TRUE(file.ok()) << file.status();
    CheckpointManifest manifest;
    manifest.set_format_version(1);
    *manifest.mutable_version() = identity.version();
    manifest.mutable_shard_map()->set_num_shards(1);
    manifest.set_created_unix_ms(created_unix_ms);
    *manifest.add_files() = *file;
    const absl::Status status = directory_->Commit(manifest, retention);
    ASSERT_TRUE(status.ok()) << status;
  }

  void Damage(const std::string& name) {
    auto bytes = ReadFile(JoinPath(path_, name), 1 << 20);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    bytes->back() ^= 1;
    ASSERT_TRUE(WriteFileAtomically(JoinPath(path_, name), *bytes).ok());
  }

  std::vector<std::string> Names() { return FileSystem::Real()->ListDir(path_).value(); }

  std::string path_;
  std::unique_ptr<CheckpointCatalog> directory_;
};

TEST_F(CheckpointCatalogTest, TheNewerLeaderTakesTheDirectory) {
  std::unique_ptr<CheckpointCatalog> second;
  std::thread newer([&] {  // waits for the older to let go
    auto claimed = CheckpointCatalog::Claim(path_);
    ASSERT_TRUE(claimed.ok()) << claimed.status();
    second = *std::move(claimed);
  });
  while (directory_->CheckClaim().ok()) absl::SleepFor(absl::Milliseconds(1));
  const absl::Status lost = directory_->BeginGeneration(4);
  EXPECT_EQ(lost.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(lost.message()), HasSubstr("a newer process has taken this one's place"));
  EXPECT_EQ(directory_->Commit(CheckpointManifest(), {1}).code(),
            absl::StatusCode::kFailedPrecondition);
  directory_->LetGo();
  newer.join();
  EXPECT_TRUE(second->BeginGeneration(4).ok());
  EXPECT_GT(second->claim_number(), directory_->claim_number());
}

TEST_F(CheckpointCatalogTest, AnOlderLeaderThatHangsIsNotWaitedFor) {
  const auto second = CheckpointCatalog::Claim(path_);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_TRUE((*second)->CheckClaim().ok());
  EXPECT_FALSE(directory_->CheckClaim().ok());
}

TEST_F(CheckpointCatalogTest, GenerationsGrow) {
  EXPECT_EQ(directory_->LastGeneration().value(), 0u);
  ASSERT_TRUE(directory_->BeginGeneration(4).ok());
  Open();
  EXPECT_EQ(directory_->LastGeneration().value(), 4u);
  Save(9, 1);
  EXPECT_EQ(directory_->LastGeneration().value(), 9u);
  ASSERT_TRUE(WriteFileAtomically(JoinPath(path_, "GENERATION"), "four").ok());
  EXPECT_EQ(directory_->LastGeneration().status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(CheckpointCatalogTest, FindsTheNewestWholeOne) {
  EXPECT_EQ(directory_->FindNewest()->manifest, nullptr);
  Save(1, 10);
  Save(1, 20);
  Save(2, 15);
  auto newest = directory_->FindNewest();
  ASSERT_TRUE(newest.ok()) << newest.status();
  EXPECT_EQ(newest->manifest->version().generation(), 2u);
  EXPECT_TRUE(newest->refused.empty());

  Damage("shard-0-of-1-2-15-0");
  Damage("MANIFEST-1-20");
  newest = directory_->FindNewest();
  ASSERT_TRUE(newest.ok()) << newest.status();
  EXPECT_EQ(newest->manifest->version().step(), 10);
  ASSERT_EQ(newest->refused.size(), 2u);
  EXPECT_THAT(std::string(newest->refused[0].message()), HasSubstr("shard-0-of-1-2-15-0"));
  EXPECT_THAT(std::string(newest->refused[1].message()), HasSubstr("MANIFEST-1-20"));

  ASSERT_TRUE(FileSystem::Real()->RemoveFile(JoinPath(path_, "shard-0-of-1-1-10-0")).ok());
  newest = directory_->FindNewest();
  EXPECT_EQ(newest.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(newest.status().message()), HasSubstr("shard-0-of-1-1-10-0"));
}

TEST_F(CheckpointCatalogTest, PassesOverWhatAShardCouldNotLoad) {
  Save(1, 10);
  Save(1, 20);
  Version bad;
  bad.set_generation(1);
  bad.set_step(20);
  const auto newest = directory_->FindNewest({bad});
  ASSERT_TRUE(newest.ok()) << newest.status();
  EXPECT_EQ(newest->manifest->version().step(), 10);
  EXPECT_EQ(newest->refused.size(), 1u);
}

TEST_F(CheckpointCatalogTest, KeepsOnlySoMany) {
  for (int64_t step = 1; step <= 4; ++step) Save(1, step, /*keep=*/2);
  EXPECT_THAT(Names(), UnorderedElementsAre("CLAIM", "CLAIM-1", "MANIFEST-1-3", "MANIFEST-1-4",
                                            "shard-0-of-1-1-3-0", "shard-0-of-1-1-4-0"));
}

TEST_F(CheckpointCatalogTest, RemovesOldOnesButNeverTheNewest) {
  CheckpointCatalog::Retention retention;
  retention.keep = 10;
  retention.max_age = absl::Seconds(100);
  retention.now = absl::FromUnixSeconds(1000);
  Save(1, 1, retention, 0);           // does not say when
  Save(1, 2, retention, 850 * 1000);  // 150 s old: the newest, so it stays for now
  EXPECT_THAT(Names(), Contains("MANIFEST-1-2"));
  Save(1, 3, retention, 950 * 1000);
  EXPECT_THAT(Names(), Not(Contains("MANIFEST-1-2")));
  EXPECT_THAT(Names(), Not(Contains("shard-0-of-1-1-2-0")));
  retention.now = absl::FromUnixSeconds(2000);
  Save(1, 4, retention, 2000 * 1000);
  EXPECT_THAT(Names(), UnorderedElementsAre("CLAIM", "CLAIM-1", "MANIFEST-1-1", "MANIFEST-1-4",
                                            "shard-0-of-1-1-1-0", "shard-0-of-1-1-4-0"));
}

TEST_F(CheckpointCatalogTest, SweepsWhatNoManifestNames) {
  Save(1, 10);
  Save(1, 20);
  Damage("MANIFEST-1-20");
  for (const char* name : {"shard-0-of-1-1-30-0", "MANIFEST-1-30.tmp-77", "notes.txt"}) {
    ASSERT_TRUE(WriteFileAtomically(JoinPath(path_, name), "x").ok());
  }
  EXPECT_EQ(directory_->SweepOrphans().value(), 2);
  EXPECT_THAT(Names(),
              UnorderedElementsAre("CLAIM", "CLAIM-1", "MANIFEST-1-10", "MANIFEST-1-20",
                                   "notes.txt", "shard-0-of-1-1-10-0", "shard-0-of-1-1-20-0"));
}

}  // namespace
}  // namespace codistill
