#include "common/checkpoint/checkpoint_tensors.h"

#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "common/base/file.h"
#include "common/checkpoint/checkpoint_catalog.h"
#include "common/checkpoint/manifest.h"
#include "common/config/shard_map.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

TensorSpec Spec(const std::string& name, std::vector<int64_t> shape, DataType dtype,
                TensorSpec::Role role) {
  TensorSpec spec;
  spec.set_name(name);
  for (int64_t size : shape) spec.add_shape(size);
  spec.set_dtype(dtype);
  spec.set_role(role);
  return spec;
}

TensorList Tensors() {
  TensorList list;
  *list.add_tensors() = Spec("w", {300, 128}, DT_FLOAT, TensorSpec::PARAMETER);  // cut
  *list.add_tensors() = Spec("b", {128}, DT_FLOAT, TensorSpec::PARAMETER);
  *list.add_tensors() = Spec("count", {}, DT_INT64, TensorSpec::BUFFER);
  TensorSpec tied = Spec("w2", {300, 128}, DT_FLOAT, TensorSpec::TIED);
  tied.set_tied_to("w");
  *list.add_tensors() = tied;
  return list;
}

float Value(int tensor, const std::string& slot, int64_t i) {
  return static_cast<float>(i) * 0.5f + static_cast<float>(tensor) * 1e5f +
         (slot.empty() ? 0.0f : 0.25f);
}

class CheckpointTensorsTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = JoinPath(testing::TempDir(), "tensors",
                          testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
  }

  // As a SYNC group of so many shards writes it: values, and momentum of the parameters.
  CheckpointManifest Write(int num_shards, bool sync = true) {
    CheckpointManifest manifest;
    manifest.set_format_version(1);
    manifest.set_job("job");
    manifest.set_group("north");
    manifest.set_optimizer("MOMENTUM");
    manifest.mutable_version()->set_generation(3);
    manifest.mutable_version()->set_step(70);
    *manifest.mutable_shard_map() = BuildShardMap(Tensors(), num_shards).value();
    manifest.set_shard_map_digest(ShardMapDigest(manifest.shard_map()));
    manifest.set_next_example(4242);
    for (int shard = 0; shard < num_shards; ++shard) {
      if (!sync) manifest.mutable_version()->add_shard_steps(70 + shard);
    }
    for (int shard = 0; shard < num_shards; ++shard) {
      std::vector<std::string> bytes;
      std::vector<ShardFileData> data;
      for (const Piece& piece : manifest.shard_map().pieces()) {
        if (piece.shard() != shard) continue;
        const int tensor = static_cast<int>(piece.tensor());
        const TensorSpec& spec = manifest.shard_map().tensors(tensor);
        for (const std::string slot : {"", "momentum"}) {
          if (!slot.empty() && spec.role() != TensorSpec::PARAMETER) continue;
          std::string values;
          for (int64_t i = piece.begin(); i < piece.begin() + piece.count(); ++i) {
            if (spec.dtype() == DT_INT64) {
              const int64_t value = 77;
              values.append(reinterpret_cast<const char*>(&value), 8);
            } else {
              const float value = Value(tensor, slot, i);
              values.append(reinterpret_cast<const char*>(&value), 4);
            }
          }
          bytes.push_back(values);
          ShardFileData item;
          *item.entry.mutable_piece() = piece;
          item.entry.set_dtype(spec.dtype());
          item.entry.set_slot(slot);
          item.bytes = values.size();
          data.push_back(item);
        }
      }
      for (size_t i = 0; i < data.size(); ++i) data[i].data = bytes[i].data();
      CheckpointShardHeader identity;
      identity.set_group("north");
      identity.set_shard(shard);
      identity.set_shard_map_digest(manifest.shard_map_digest());
      *identity.mutable_version() = manifest.version();
      *manifest.add_files() =
          WriteShardFile(directory_, ShardFileName(shard, num_shards, manifest.version(), 0),
                         identity, data)
              .value();
    }
    EXPECT_TRUE(WriteManifest(directory_, manifest).ok());
    return manifest;
  }

  static void CheckValues(CheckpointTensors* tensors) {
    for (int t : {0, 1}) {
      ASSERT_EQ(tensors->Slots(t), std::vector<std::string>({"", "momentum"}));
      const int64_t count = t == 0 ? 300 * 128 : 128;
      for (const std::string slot : {"", "momentum"}) {
        std::vector<float> values(count);
        ASSERT_TRUE(tensors->Read(t, slot, 0, count, values.data()).ok());
        for (int64_t i = 0; i < count; ++i) ASSERT_EQ(values[i], Value(t, slot, i)) << t << slot;
      }
    }
    int64_t count = 0;
    ASSERT_TRUE(tensors->Read(2, "", 0, 1, &count).ok());
    EXPECT_EQ(count, 77);
    EXPECT_TRUE(tensors->Slots(3).empty());
  }

  std::string directory_;
};

TEST_F(CheckpointTensorsTest, ReadsAcrossFiles) {
  auto tensors = CheckpointTensors::Open(directory_, Write(3));
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  CheckValues(tensors->get());
  // Over the border of two shards' pieces.
  std::vector<float> some(200);
  ASSERT_TRUE((*tensors)->Read(0, "momentum", 12700, 200, some.data()).ok());
  for (int i = 0; i < 200; ++i) ASSERT_EQ(some[i], Value(0, "momentum", 12700 + i));
  const absl::Status none = (*tensors)->Read(1, "v", 0, 1, some.data());
  EXPECT_EQ(none.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(none.ToString(), HasSubstr("no v of tensor b"));
}

TEST_F(CheckpointTensorsTest, AnyNumberOfShardsBecomesAnyOther) {
  for (const auto& [from, to] : std::vector<std::pair<int, int>>{{1, 4}, {4, 1}, {2, 3}, {3, 2}}) {
    SCOPED_TRACE(absl::StrCat(from, " to ", to));
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
    const CheckpointManifest manifest = Write(from);
    auto tensors = CheckpointTensors::Open(directory_, manifest);
    ASSERT_TRUE(tensors.ok()) << tensors.status();
    const std::string other = JoinPath(directory_, "other");
    const auto resharded = ReshardCheckpoint(tensors->get(), to, other);
    ASSERT_TRUE(resharded.ok()) << resharded.status();
    EXPECT_EQ(resharded->files_size(), to);
    EXPECT_EQ(resharded->next_example(), 4242u);
    EXPECT_EQ(resharded->optimizer(), "MOMENTUM");
    const auto read = ReadManifest(JoinPath(other, ManifestName(manifest.version())));
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_TRUE(VerifyCheckpoint(other, *read).ok());
    EXPECT_EQ(read->shard_map_digest(), ShardMapDigest(BuildShardMap(Tensors(), to).value()));
    auto again = CheckpointTensors::Open(other, *read);
    ASSERT_TRUE(again.ok()) << again.status();
    CheckValues(again->get());
  }
}

TEST_F(CheckpointTensorsTest, AsyncShardsGoOnFromTheGroupsStep) {
  auto tensors = CheckpointTensors::Open(directory_, Write(2, /*sync=*/false));
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  const auto resharded = ReshardCheckpoint(tensors->get(), 3, JoinPath(directory_, "other"));
  ASSERT_TRUE(resharded.ok()) << resharded.status();
  EXPECT_THAT(resharded->version().shard_steps(), testing::ElementsAre(70, 70, 70));
}

TEST_F(CheckpointTensorsTest, WhatIsThereIsNotOverwritten) {
  auto tensors = CheckpointTensors::Open(directory_, Write(2));
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  const auto resharded = ReshardCheckpoint(tensors->get(), 3, directory_);
  EXPECT_EQ(resharded.status().code(), absl::StatusCode::kAlreadyExists);
}

TEST_F(CheckpointTensorsTest, AnyFlippedByteIsNoticed) {
  const CheckpointManifest manifest = Write(2);
  const std::string path = JoinPath(directory_, manifest.files(1).name());
  const std::string whole = ReadFile(path, size_t{1} << 24).value();
  for (size_t at = 0; at < whole.size(); at += 997) {
    std::string bytes = whole;
    bytes[at] ^= 0x10;
    ASSERT_TRUE(WriteFileAtomically(path, bytes).ok());
    absl::Status status;
    auto tensors = CheckpointTensors::Open(directory_, manifest);
    status = tensors.status();
    std::vector<float> values(300 * 128);
    for (int t = 0; status.ok() && t < 2; ++t) {
      for (const std::string slot : {"", "momentum"}) {
        if (status.ok()) {
          status = (*tensors)->Read(t, slot, 0, t == 0 ? 300 * 128 : 128, values.data());
        }
      }
    }
    int64_t count = 0;
    if (status.ok()) status = (*tensors)->Read(2, "", 0, 1, &count);
    // Padding is not part of any tensor; VerifyCheckpoint looks at that as well.
    if (status.ok()) status = VerifyCheckpoint(directory_, manifest);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << "byte " << at << ": " << status;
  }
}

TEST_F(CheckpointTensorsTest, FilesThatLeaveElementsOutAreRefused) {
  CheckpointManifest manifest = Write(2);
  manifest.mutable_files()->RemoveLast();
  const auto tensors = CheckpointTensors::Open(directory_, manifest);
  EXPECT_EQ(tensors.status().code(), absl::StatusCode::kDataLoss) << tensors.status();
}

// Files of the first format, kept as they were written: whatever comes later must read them.
TEST(OldFormatTest, Version1IsRead) {
  const std::string directory = "common/checkpoint/testdata/format-1";
  const auto manifest = ReadManifest(JoinPath(directory, "MANIFEST-3-70"));
  ASSERT_TRUE(manifest.ok()) << manifest.status();
  EXPECT_EQ(manifest->format_version(), 1u);
  EXPECT_EQ(manifest->optimizer(), "MOMENTUM");
  EXPECT_EQ(manifest->next_example(), 4242u);
  EXPECT_EQ(manifest->created_unix_ms(), 0);
  EXPECT_TRUE(VerifyCheckpoint(directory, *manifest).ok());
  auto tensors = CheckpointTensors::Open(directory, *manifest);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  for (int t : {0, 1}) {
    const int64_t count = t == 0 ? 24 : 4;
    for (const std::string slot : {"", "momentum"}) {
      std::vector<float> values(count);
      ASSERT_TRUE((*tensors)->Read(t, slot, 0, count, values.data()).ok());
      for (int64_t i = 0; i < count; ++i) EXPECT_EQ(values[i], Value(t, slot, i)) << t << slot;
    }
  }
  int64_t count = 0;
  ASSERT_TRUE((*tensors)->Read(2, "", 0, 1, &count).ok());
  EXPECT_EQ(count, 77);
}

}  // namespace
}  // namespace codistill
