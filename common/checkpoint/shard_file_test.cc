#include "common/checkpoint/shard_file.h"

#include <cstring>
#include <string>
#include <vector>

#include "common/base/fault_injecting_file_system.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

class ShardFileTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ =
        JoinPath(testing::TempDir(), testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
  }

  absl::StatusOr<CheckpointFile> Write(FileSystem* file_system = FileSystem::Real()) {
    CheckpointShardHeader identity;
    identity.set_group("alpha");
    identity.set_shard(1);
    identity.mutable_version()->set_generation(3);
    identity.mutable_version()->set_step(40);
    identity.set_shard_map_digest(99);
    std::vector<ShardFileData> data(3);
    data[0].entry.mutable_piece()->set_count(5);
    data[0].entry.set_dtype(DT_FLOAT);
    data[0].data = weights_.data();
    data[0].bytes = weights_.size() * sizeof(float);
    data[1] = data[0];
    data[1].entry.set_slot("momentum");
    data[1].data = slots_.data();
    if (parts_) {
      const char* const first = static_cast<const char*>(data[0].data);
      data[0].parts = {{first, 3}, {first + 3, 1}, {first + 4, 16}};
      data[0].data = nullptr;
    }
    data[2].entry.mutable_piece()->set_tensor(7);  // an empty tensor
    data[2].entry.set_dtype(DT_INT64);
    return WriteShardFile(directory_, ShardFileName(1, 2, identity.version(), 0), identity, data,
                          file_system);
  }

  absl::Status ReadBack(const std::string& path) {
    auto reader = ShardFileReader::Open(path);
    if (!reader.ok()) return reader.status();
    return (*reader)->VerifyAll();
  }

  std::string directory_;
  bool parts_ = false;  // give the data in several places
  const std::vector<float> weights_ = {1, 2, 3, 4, 5};
  const std::vector<float> slots_ = {6, 7, 8, 9, 10};
};

TEST_F(ShardFileTest, ReadsWhatWasWritten) {
  const auto file = Write();
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->name(), "shard-1-of-2-3-40-0");
  auto reader = ShardFileReader::Open(JoinPath(directory_, file->name()));
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ((*reader)->header().group(), "alpha");
  EXPECT_EQ((*reader)->header().version().step(), 40);
  ASSERT_EQ((*reader)->header().entries_size(), 3);
  std::vector<float> values(5);
  ASSERT_TRUE((*reader)->Read(1, values.data()).ok());
  EXPECT_EQ(values, slots_);
  EXPECT_EQ((*reader)->header().entries(1).slot(), "momentum");
  EXPECT_TRUE((*reader)->VerifyAll().ok());
  EXPECT_TRUE(VerifyCheckpointFile(directory_, *file).ok());
}

TEST_F(ShardFileTest, DataInPartsMakesTheSameFile) {
  const auto whole = Write();
  ASSERT_TRUE(whole.ok()) << whole.status();
  const auto bytes = ReadFile(JoinPath(directory_, whole->name()), 1 << 20);
  parts_ = true;
  const auto file = Write();
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->crc32c(), whole->crc32c());
  EXPECT_EQ(*ReadFile(JoinPath(directory_, file->name()), 1 << 20), *bytes);
  EXPECT_TRUE(VerifyCheckpointFile(directory_, *file).ok());

  const auto reader = ShardFileReader::Open(JoinPath(directory_, file->name())).value();
  std::vector<char> a(7), b(13);
  const std::vector<absl::Span<char>> parts = {absl::MakeSpan(a), absl::MakeSpan(b)};
  ASSERT_TRUE(reader->ReadParts(1, parts).ok());
  std::vector<float> values(5);
  std::memcpy(values.data(), a.data(), 7);
  std::memcpy(reinterpret_cast<char*>(values.data()) + 7, b.data(), 13);
  EXPECT_EQ(values, slots_);
  EXPECT_EQ(reader->ReadParts(1, absl::MakeConstSpan(parts).subspan(0, 1)).code(),
            absl::StatusCode::kInternal);
}

TEST_F(ShardFileTest, EveryFlippedByteIsFound) {
  const auto file = Write();
  ASSERT_TRUE(file.ok()) << file.status();
  const std::string path = JoinPath(directory_, file->name());
  const auto bytes = ReadFile(path, 1 << 20);
  ASSERT_TRUE(bytes.ok());
  const std::string damaged_path = JoinPath(directory_, "damaged");
  for (size_t i = 0; i < bytes->size(); ++i) {
    std::string damaged = *bytes;
    damaged[i] ^= 0x10;
    ASSERT_TRUE(WriteFileAtomically(damaged_path, damaged).ok());
    const absl::Status status = ReadBack(damaged_path);
    ASSERT_EQ(status.code(), absl::StatusCode::kDataLoss) << "byte " << i << ": " << status;
    ASSERT_THAT(std::string(status.message()), HasSubstr(damaged_path));
    CheckpointFile expected = *file;
    expected.set_name("damaged");
    ASSERT_EQ(VerifyCheckpointFile(directory_, expected).code(), absl::StatusCode::kDataLoss) << i;
  }
}

TEST_F(ShardFileTest, EveryLengthButTheRightOneIsRefused) {
  const auto file = Write();
  ASSERT_TRUE(file.ok()) << file.status();
  const auto bytes = ReadFile(JoinPath(directory_, file->name()), 1 << 20);
  ASSERT_TRUE(bytes.ok());
  const std::string cut_path = JoinPath(directory_, "cut");
  for (size_t n = 0; n < bytes->size(); ++n) {
    ASSERT_TRUE(WriteFileAtomically(cut_path, bytes->substr(0, n)).ok());
    const absl::Status status = ReadBack(cut_path);
    ASSERT_EQ(status.code(), absl::StatusCode::kDataLoss) << n << " bytes: " << status;
    ASSERT_THAT(std::string(status.message()), HasSubstr(cut_path));
  }
  ASSERT_TRUE(WriteFileAtomically(cut_path, *bytes + '\0').ok());
  EXPECT_EQ(ReadBack(cut_path).code(), absl::StatusCode::kDataLoss);
}

TEST_F(ShardFileTest, DamageIsNamedByPlace) {
  const auto file = Write();
  ASSERT_TRUE(file.ok()) << file.status();
  const std::string path = JoinPath(directory_, file->name());
  auto bytes = ReadFile(path, 1 << 20);
  ASSERT_TRUE(bytes.ok());
  (*bytes)[bytes->size() - 60] ^= 1;  // in the last block of 64: the data of the slot
  ASSERT_TRUE(WriteFileAtomically(path, *bytes).ok());
  EXPECT_THAT(std::string(VerifyCheckpointFile(directory_, *file).message()),
              HasSubstr("slot momentum"));
}

TEST_F(ShardFileTest, FullDiskLeavesNothingBehind) {
  FaultInjectingFileSystem disk;
  disk.FailWritesAfter(100);
  const auto file = Write(&disk);
  EXPECT_EQ(file.status().code(), absl::StatusCode::kResourceExhausted) << file.status();
  EXPECT_THAT(std::string(file.status().message()), HasSubstr("shard-1-of-2-3-40-0"));
  EXPECT_TRUE(FileSystem::Real()->ListDir(directory_)->empty());
}

}  // namespace
}  // namespace codistill
