#include "common/checkpoint/manifest.h"

#include <string>

#include "common/base/fault_injecting_file_system.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

CheckpointManifest SomeManifest() {
  CheckpointManifest manifest;
  manifest.set_format_version(1);
  manifest.set_group("alpha");
  manifest.mutable_version()->set_generation(2);
  manifest.mutable_version()->set_step(300);
  manifest.mutable_shard_map()->set_num_shards(1);
  manifest.add_files()->set_name("shard-0-of-1-2-300-0");
  manifest.set_next_example(9600);
  return manifest;
}

class ManifestTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ =
        JoinPath(testing::TempDir(), testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
    path_ = JoinPath(directory_, "MANIFEST-2-300");
  }
  std::string directory_, path_;
};

TEST_F(ManifestTest, ReadsWhatWasWritten) {
  ASSERT_TRUE(WriteManifest(directory_, SomeManifest()).ok());
  const auto manifest = ReadManifest(path_);
  ASSERT_TRUE(manifest.ok()) << manifest.status();
  EXPECT_EQ(manifest->SerializeAsString(), SomeManifest().SerializeAsString());
}

TEST_F(ManifestTest, DamageAndTruncationAreFound) {
  ASSERT_TRUE(WriteManifest(directory_, SomeManifest()).ok());
  const auto bytes = ReadFile(path_, 1 << 20);
  ASSERT_TRUE(bytes.ok());
  for (size_t i = 0; i < bytes->size(); ++i) {
    std::string damaged = *bytes;
    damaged[i] ^= 0x01;
    ASSERT_TRUE(WriteFileAtomically(path_, damaged).ok());
    const absl::Status status = ReadManifest(path_).status();
    ASSERT_EQ(status.code(), absl::StatusCode::kDataLoss) << "byte " << i << ": " << status;
    ASSERT_THAT(std::string(status.message()), HasSubstr(path_));
    ASSERT_TRUE(WriteFileAtomically(path_, bytes->substr(0, i)).ok());
    ASSERT_EQ(ReadManifest(path_).status().code(), absl::StatusCode::kDataLoss) << i << " bytes";
  }
}

TEST_F(ManifestTest, AnotherNameIsRefused) {
  ASSERT_TRUE(WriteManifest(directory_, SomeManifest()).ok());
  const std::string other = JoinPath(directory_, "MANIFEST-2-301");
  ASSERT_TRUE(FileSystem::Real()->Rename(path_, other).ok());
  EXPECT_THAT(std::string(ReadManifest(other).status().message()), HasSubstr("MANIFEST-2-300"));
}

TEST_F(ManifestTest, FullDiskKeepsThePreviousOne) {
  ASSERT_TRUE(WriteManifest(directory_, SomeManifest()).ok());
  FaultInjectingFileSystem disk;
  disk.FailWritesAfter(10);
  EXPECT_EQ(WriteManifest(directory_, SomeManifest(), &disk).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(ReadManifest(path_).ok());
  EXPECT_EQ(FileSystem::Real()->ListDir(directory_)->size(), 1u);
}

TEST(ManifestNameTest, ParsesOnlyItsOwn) {
  Version version;
  EXPECT_TRUE(ParseManifestName("MANIFEST-12-345", &version));
  EXPECT_EQ(version.generation(), 12u);
  EXPECT_EQ(version.step(), 345);
  for (const char* name : {"MANIFEST-12", "MANIFEST-12-345.tmp-1", "MANIFEST-012-345", "CLAIM",
                           "MANIFEST-1--5", "MANIFEST-x-1"}) {
    EXPECT_FALSE(ParseManifestName(name, &version)) << name;
  }
}

}  // namespace
}  // namespace codistill
