#include "common/model/frozen_model.h"

#include <atomic>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/base/fault_injecting_file_system.h"
#include "common/checkpoint/manifest.h"
#include "common/checkpoint/safetensors.h"
#include "common/checkpoint/table_file.h"
#include "common/config/shard_map.h"
#include "common/model/test_archive.h"
#include "common/model/testing/checkpoint_files.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::HasSubstr;
using testing::Not;
using Snapshot = std::shared_ptr<const FollowedModel::Snapshot>;

constexpr int kShards = 2;

template <typename T>
std::string Bytes(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// Calls a function before a file is opened.
class HookedFileSystem final : public FaultInjectingFileSystem {
 public:
  absl::StatusOr<std::unique_ptr<ReadableFile>> OpenForRead(const std::string& path) override {
    if (before_open != nullptr) before_open(path);
    return FaultInjectingFileSystem::OpenForRead(path);
  }
  absl::StatusOr<std::vector<std::string>> ListDir(const std::string& path) override {
    auto names = FaultInjectingFileSystem::ListDir(path);
    ++listings;
    return names;
  }
  std::atomic<int> listings{0};
  std::function<void(const std::string& path)> before_open;
};

// A linear model of one output, whose bias is what it answers to zeros.
class FrozenModelTest : public testing::Test {
 protected:
  FrozenModelTest()
      : list_(*LoadTensorList(Folder() + "/alpha.tensors.textproto")),
        map_(*BuildShardMap(list_, kShards)),
        directory_(JoinPath(testing::TempDir(), "frozen",
                            testing::UnitTest::GetInstance()->current_test_info()->name())) {
    EXPECT_TRUE(RemoveAll(directory_).ok());
    EXPECT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
    options_.name = "old";
    options_.archive = Folder() + "/alpha.pt";
    options_.poll_interval = absl::Milliseconds(5);
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
        "inputs { name: 'x' shape: 2 } num_outputs: 1 label_loss: SQUARED_ERROR", &options_.model));
  }

  static std::string Folder() {
    static const std::string folder =
        ExportForTest("alpha", "mlp", {"in_features=2", "hidden=", "num_classes=1"});
    return folder;
  }

  void Load() {
    auto model = LoadFrozenModel(options_);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
  }
  std::string LoadError() {
    const auto model = LoadFrozenModel(options_);
    EXPECT_FALSE(model.ok());
    return std::string(model.status().message());
  }

  void Save(uint64_t generation, int64_t step, float bias) {
    const auto manifest = WriteCheckpointFiles(directory_, map_, generation, step,
                                               {Bytes<float>({1, 1}), Bytes<float>({bias})});
    ASSERT_TRUE(manifest.ok()) << manifest.status();
  }
  std::string FileOf(int shard, int64_t step) const {
    return absl::StrCat(directory_, "/shard-", shard, "-of-", kShards, "-1-", step, "-0");
  }
  static void Damage(const std::string& path) {
    auto bytes = ReadFile(path, 1 << 20);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    bytes->back() ^= 1;
    ASSERT_TRUE(WriteFileAtomically(path, *bytes).ok());
  }

  Snapshot WaitFor(uint64_t generation, int64_t step) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (absl::Now() < deadline) {
      const auto held = model_->Get();
      if (held.ok() && (*held)->version.generation() == generation &&
          (*held)->version.step() == step) {
        return *held;
      }
      absl::SleepFor(absl::Milliseconds(1));
    }
    ADD_FAILURE() << "never held " << generation << "." << step << ": " << model_->Get().status()
                  << "; " << model_->counters().last_load_error;
    return nullptr;
  }
  void WaitForFailedLoads(int64_t count) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (model_->counters().failed_loads < count && absl::Now() < deadline) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    ASSERT_EQ(model_->counters().failed_loads, count);
  }
  // Until the directory, as it is now, has been looked at so many times, from beginning to end.
  void WaitForLooks(int count) {
    const int enough = files_.listings + count + 1;
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (files_.listings < enough && absl::Now() < deadline) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    ASSERT_GE(files_.listings, enough);
  }
  std::string HeldVersionNames() const {
    return absl::StrJoin(model_->Held(), " ", [](std::string* out, const Snapshot& snapshot) {
      absl::StrAppend(out, snapshot->version.generation(), ".", snapshot->version.step());
    });
  }

  static float Answer(const Snapshot& snapshot) {
    const auto logits = snapshot->model->Predict({Tensor::Zeros(DT_FLOAT, {1, 2})}, nullptr);
    EXPECT_TRUE(logits.ok()) << logits.status();
    return logits->values.As<float>()[0];
  }
  float Answer() const { return Answer(*model_->Get()); }

  const TensorList list_;
  const ShardMap map_;
  const std::string directory_;
  HookedFileSystem files_;
  FrozenModelOptions options_;
  std::unique_ptr<FollowedModel> model_;
};

TEST_F(FrozenModelTest, ATeacherHasNoDropout) {
  const auto predict = [this](const std::string& dropout) {
    options_.archive =
        ExportForTest("alpha", "mlp", {"in_features=2", "hidden=64", "num_classes=1", dropout}) +
        "/alpha.pt";
    Load();
    std::vector<float> answers;
    for (int pass = 0; pass < 2; ++pass) {
      const auto held = model_->Get();
      EXPECT_TRUE(held.ok()) << held.status();
      if (!held.ok()) return answers;
      const auto logits = (*held)->model->Predict({RandomFloats({4, 2}, 1)}, nullptr);
      EXPECT_TRUE(logits.ok()) << logits.status();
      if (!logits.ok()) return answers;
      const auto values = logits->values.As<float>();
      answers.insert(answers.end(), values.begin(), values.end());
    }
    return answers;
  };
  const std::vector<float> without = predict("dropout=0");
  ASSERT_EQ(without.size(), 8u);
  EXPECT_NE(without[0], without[1]);
  EXPECT_EQ(predict("dropout=0.5"), without);
}

TEST_F(FrozenModelTest, AnArchiveHasItsOwnWeights) {
  Load();
  const Snapshot snapshot = *model_->Get();
  EXPECT_EQ(snapshot->version.generation(), 1u);
  EXPECT_EQ(snapshot->version.step(), 0);
  EXPECT_EQ(snapshot->precision, DT_FLOAT);
  const auto reader = *SafetensorsReader::Open(Folder() + "/alpha.safetensors");
  float bias = 0;
  ASSERT_TRUE(reader->Read("fc1.bias", 0, sizeof(bias), &bias).ok());
  EXPECT_EQ(Answer(), bias);
  EXPECT_EQ(model_->Held().size(), 1u);
  EXPECT_EQ(model_->group_step(), 0);  // never stale
  EXPECT_EQ(model_->group_silence(), absl::ZeroDuration());
  EXPECT_EQ(model_->group_state().phase(), GroupState::FINISHED);
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      model_->WaitForNewer(snapshot->version, absl::Now() + absl::Milliseconds(20)).status()));
}

TEST_F(FrozenModelTest, SafetensorsMustHaveExactlyTheModelsTensors) {
  const std::string path = directory_ + "/weights.safetensors";
  const auto write = [&](const std::string& bias_name, std::vector<int64_t> shape, float bias) {
    std::vector<SafetensorsItem> items = {{"fc1.weight", DT_FLOAT, {1, 2}, nullptr},
                                          {bias_name, DT_FLOAT, std::move(shape), nullptr}};
    for (SafetensorsItem& item : items) {
      const int64_t n = ElementCount(item.shape);
      item.read = [n, bias](char* to) {
        for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * sizeof(bias), &bias, sizeof(bias));
        return absl::OkStatus();
      };
    }
    ASSERT_TRUE(WriteSafetensors(path, items, {}).ok());
  };
  options_.checkpoint = path;
  EXPECT_THAT(LoadError(), HasSubstr("weights.safetensors: no such"));
  write("fc1.bias", {1}, 5);
  Load();
  EXPECT_EQ(Answer(), 5);
  EXPECT_EQ(HeldVersionNames(), "1.0");
  write("bias", {1}, 5);
  EXPECT_THAT(LoadError(), HasSubstr("fc1.bias: is missing"));
  EXPECT_THAT(LoadError(), HasSubstr("bias: is no tensor of the model"));
  write("fc1.bias", {2}, 5);
  EXPECT_THAT(LoadError(), HasSubstr("fc1.bias: is FP32 [2]; the model has FP32 [1]"));
  write("fc1.bias", {1}, std::numeric_limits<float>::infinity());
  EXPECT_THAT(LoadError(), HasSubstr("tensor fc1.weight has an infinity at element 0"));
  ASSERT_TRUE(WriteFileAtomically(path, "no weights").ok());
  EXPECT_THAT(LoadError(), HasSubstr(path));
}

TEST_F(FrozenModelTest, TakesTheNewestWholeCheckpointAndClaimsNothing) {
  options_.checkpoint = directory_;
  EXPECT_THAT(LoadError(), HasSubstr("no checkpoint in it"));
  Save(1, 9, 9);
  Save(1, 10, 10);
  Load();
  EXPECT_EQ(HeldVersionNames(), "1.10");
  EXPECT_EQ(Answer(), 10);
  EXPECT_EQ(model_->group_step(), 10);
  const std::vector<std::string> names = *FileSystem::Real()->ListDir(directory_);
  EXPECT_EQ(names.size(), 2u * (kShards + 1)) << absl::StrJoin(names, " ");

  Damage(FileOf(0, 10));
  Load();
  EXPECT_EQ(HeldVersionNames(), "1.9");
  EXPECT_THAT(model_->counters().last_load_error, HasSubstr(FileOf(0, 10)));
  Damage(directory_ + "/MANIFEST-1-9");
  const std::string error = LoadError();
  EXPECT_THAT(error, HasSubstr(FileOf(0, 10)));
  EXPECT_THAT(error, HasSubstr("MANIFEST-1-9"));
}

TEST_F(FrozenModelTest, AManifestNamesOneCheckpoint) {
  Save(1, 9, 9);
  Save(1, 10, 10);
  options_.checkpoint = directory_ + "/MANIFEST-1-9";
  Load();
  EXPECT_EQ(HeldVersionNames(), "1.9");
  EXPECT_EQ(Answer(), 9);
  ASSERT_TRUE(FileSystem::Real()->RemoveFile(FileOf(1, 9)).ok());
  EXPECT_THAT(LoadError(), HasSubstr(FileOf(1, 9)));
}

TEST_F(FrozenModelTest, RefusesTensorsOfAnotherModel) {
  ShardMap other = map_;
  other.mutable_tensors(1)->set_name("other");
  ASSERT_TRUE(
      WriteCheckpointFiles(directory_, other, 1, 1, {Bytes<float>({1, 1}), Bytes<float>({1})})
          .ok());
  options_.checkpoint = directory_;
  EXPECT_THAT(LoadError(), HasSubstr("tensors are not those of our archive: tensor 1 is fc1.bias"));
}

TEST_F(FrozenModelTest, FollowsADirectoryPastWhatIsDamaged) {
  options_.checkpoint = directory_ + "/later";
  options_.follow = true;
  options_.file_system = &files_;
  options_.held_versions = 2;
  options_.low_priority = true;
  Load();
  EXPECT_TRUE(absl::IsUnavailable(model_->Get().status()));
  EXPECT_THAT(std::string(model_->Get().status().message()), HasSubstr("model old"));
  ASSERT_TRUE(FileSystem::Real()->MakeDirs(options_.checkpoint).ok());
  const auto save = [this](uint64_t generation, int64_t step, float bias) {
    ASSERT_TRUE(WriteCheckpointFiles(options_.checkpoint, map_, generation, step,
                                     {Bytes<float>({1, 1}), Bytes<float>({bias})})
                    .ok());
  };
  save(1, 10, 10);
  EXPECT_EQ(Answer(WaitFor(1, 10)), 10);
  EXPECT_EQ(model_->group_state().phase(), GroupState::TRAINING);
  EXPECT_LT(model_->group_silence(), absl::Seconds(20));

  // Weights that are not finite: the old version keeps serving, and the file is not read again and
  // again.
  save(1, 20, std::numeric_limits<float>::quiet_NaN());
  WaitForFailedLoads(1);
  EXPECT_EQ(HeldVersionNames(), "1.10");
  EXPECT_THAT(model_->counters().last_load_error, HasSubstr("MANIFEST-1-20"));
  EXPECT_THAT(model_->counters().last_load_error, HasSubstr("tensor fc1.bias has a NaN"));
  WaitForLooks(3);
  EXPECT_EQ(model_->counters().failed_loads, 1);
  EXPECT_EQ(model_->group_step(), 10);

  save(1, 30, 30);
  EXPECT_EQ(Answer(WaitFor(1, 30)), 30);
  EXPECT_EQ(HeldVersionNames(), "1.30 1.10");
  while (!model_->counters().last_load_error.empty()) absl::SleepFor(absl::Milliseconds(1));
  save(2, 5, 5);
  EXPECT_EQ(Answer(WaitFor(2, 5)), 5);
  EXPECT_EQ(HeldVersionNames(), "2.5");
  EXPECT_EQ(model_->counters().swaps, 3);
  // Older ones are not gone back to.
  save(1, 40, 40);
  WaitForLooks(3);
  EXPECT_EQ(HeldVersionNames(), "2.5");
  EXPECT_EQ(model_->counters().last_load_error, "");
}

TEST_F(FrozenModelTest, SaysThatARunWasStartedOver) {
  Save(1, 10, 10);
  options_.checkpoint = directory_;
  options_.follow = true;
  options_.file_system = &files_;
  Load();
  WaitFor(1, 10);
  ASSERT_TRUE(RemoveAll(directory_).ok());
  ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
  Save(1, 5, 5);
  WaitForLooks(3);
  EXPECT_EQ(HeldVersionNames(), "1.10");
  EXPECT_THAT(model_->counters().last_load_error,
              HasSubstr("its newest checkpoint is 1.5, older than the held 1.10"));
  Save(1, 20, 20);
  EXPECT_EQ(Answer(WaitFor(1, 20)), 20);
}

TEST_F(FrozenModelTest, AnOlderOneIsTakenWhereTheNewestIsDamaged) {
  Save(1, 10, 10);
  Save(1, 20, 20);
  Save(1, 30, 30);
  Damage(FileOf(1, 30));
  options_.checkpoint = directory_;
  options_.follow = true;
  Load();
  EXPECT_EQ(Answer(WaitFor(1, 20)), 20);
  EXPECT_EQ(model_->counters().failed_loads, 1);
  EXPECT_THAT(model_->counters().last_load_error, HasSubstr(FileOf(1, 30)));
}

TEST_F(FrozenModelTest, RetentionMayRemoveWhatIsBeingRead) {
  for (const bool follow : {false, true}) {
    Save(1, 10, 10);
    bool removed = false;
    // The leader commits another checkpoint and removes this one, manifest first.
    files_.before_open = [&](const std::string& path) {
      if (removed || path != FileOf(0, 10)) return;
      removed = true;
      Save(1, 20, 20);
      ASSERT_TRUE(FileSystem::Real()->RemoveFile(directory_ + "/MANIFEST-1-10").ok());
      for (int shard = 0; shard < kShards; ++shard) {
        ASSERT_TRUE(FileSystem::Real()->RemoveFile(FileOf(shard, 10)).ok());
      }
    };
    options_.checkpoint = directory_;
    options_.file_system = &files_;
    options_.follow = follow;
    Load();
    EXPECT_EQ(Answer(WaitFor(1, 20)), 20);
    EXPECT_TRUE(removed);
    EXPECT_EQ(model_->counters().failed_loads, 0);
    EXPECT_EQ(model_->counters().last_load_error, "");
    model_.reset();
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
  }
}

TEST_F(FrozenModelTest, ADirectoryThatCannotBeReadIsSilence) {
  Save(1, 10, 10);
  options_.checkpoint = directory_;
  options_.follow = true;
  Load();
  WaitFor(1, 10);
  ASSERT_TRUE(RemoveAll(directory_).ok());
  while (model_->counters().last_load_error.empty()) absl::SleepFor(absl::Milliseconds(1));
  const absl::Duration silence = model_->group_silence();
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_GE(model_->group_silence(), silence + absl::Milliseconds(20));
  EXPECT_EQ(Answer(), 10);
}

TEST_F(FrozenModelTest, WrongOptionsAreErrorsAtOnce) {
  options_.follow = true;
  EXPECT_THAT(LoadError(), HasSubstr("follow needs a checkpoint directory"));
  options_.checkpoint = options_.archive;
  EXPECT_THAT(LoadError(), HasSubstr("is a file"));
  options_.follow = false;
  options_.checkpoint.clear();
  options_.weights = DT_INT32;
  EXPECT_THAT(LoadError(), HasSubstr("prediction.weights: DT_INT32"));
  options_.weights = DT_FLOAT;
  options_.held_versions = 0;
  EXPECT_THAT(LoadError(), HasSubstr("prediction.held_versions is 0"));
  options_.held_versions = 1;
  options_.archive = "/nowhere.pt";
  EXPECT_THAT(LoadError(), HasSubstr("/nowhere.pt"));
}

// The same model, whose two inputs are one row of a table.
class FrozenTablesTest : public FrozenModelTest {
 protected:
  FrozenTablesTest() {
    options_.model.Clear();
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
        "inputs { name: 'x' dtype: DT_INT64 embedding_table: 'words' shared_keys: true }"
        "num_outputs: 1 label_loss: SQUARED_ERROR embedding_tables { name: 'words' dim: 2 }",
        &options_.model));
    options_.checkpoint = directory_;
    options_.follow = true;
  }

  struct Row {
    uint64_t key;
    uint32_t touched;
    float first;  // the second is zero, and so is a slot
  };
  CheckpointFile Tables(int shard, int64_t step, const std::vector<Row>& rows,
                        const std::vector<uint64_t>& removed,
                        const std::vector<uint64_t>& waiting) {
    TableFileHeader header;
    header.set_format_version(1);
    header.set_group("alpha");
    header.set_shard(shard);
    header.set_num_shards(kShards);
    header.mutable_version()->set_generation(1);
    header.mutable_version()->set_step(step);
    TableFileHeader::Table* const table = header.add_tables();
    table->set_name("words");
    table->set_dim(2);
    table->set_row_floats(3);
    const std::string name = TableFileName(shard, kShards, header.version(), 0);
    auto writer = *TableFileWriter::Create(directory_, name, header);
    TableRows record;
    std::vector<uint64_t> keys;
    std::vector<uint32_t> touched, count(waiting.size(), 1);
    std::vector<float> data;
    for (const Row& row : rows) {
      keys.push_back(row.key);
      touched.push_back(row.touched);
      data.insert(data.end(), {row.first, 0, 77});
    }
    record.set_keys(Bytes(keys));
    record.set_touched(Bytes(touched));
    record.set_data(Bytes(data));
    record.set_removed(Bytes(removed));
    record.set_waiting(Bytes(waiting));
    record.set_waiting_touched(Bytes(count));
    record.set_waiting_count(Bytes(count));
    EXPECT_TRUE(writer->Append(record).ok());
    return *writer->Finish();
  }
  void SaveWith(int64_t step, const std::vector<std::vector<CheckpointFile>>& tables) {
    ASSERT_TRUE(WriteCheckpointFiles(directory_, map_, 1, step,
                                     {Bytes<float>({1, 1}), Bytes<float>({0})}, tables)
                    .ok());
  }
  // What the rows of the keys begin with.
  static std::vector<float> Rows(const Snapshot& snapshot, const std::vector<int64_t>& keys) {
    const auto logits =
        snapshot->model->Predict({Int64Tensor({static_cast<int64_t>(keys.size())}, keys)}, nullptr);
    EXPECT_TRUE(logits.ok()) << logits.status();
    const auto values = logits->values.As<float>();
    return std::vector<float>(values.begin(), values.end());
  }
};

TEST_F(FrozenTablesTest, BasesAndDeltasMakeTheRows) {
  for (const int max_age : {0, 50}) {
    options_.model.mutable_embedding_tables(0)->set_evict_age_steps(max_age);
    const CheckpointFile base0 = Tables(0, 10, {{1, 10, 1}, {2, 10, 2}, {3, 10, 3}}, {}, {});
    const CheckpointFile base1 = Tables(1, 10, {{11, 10, 11}}, {}, {});
    SaveWith(10, {{base0}, {base1}});
    Load();
    Snapshot first = WaitFor(1, 10);
    EXPECT_EQ(Rows(first, {1, 2, 3, 11, 4}), (std::vector<float>{1, 2, 3, 11, 0}));

    const CheckpointFile delta0 = Tables(0, 20, {{1, 20, 100}, {4, 20, 4}}, {2}, {3});
    SaveWith(20, {{base0, delta0}, {base1}});
    const Snapshot second = WaitFor(1, 20);
    EXPECT_EQ(Rows(second, {1, 2, 3, 11, 4}), (std::vector<float>{100, 0, 0, 11, 4}));
    EXPECT_EQ(Rows(first, {1, 2, 3, 11, 4}), (std::vector<float>{1, 2, 3, 11, 0}));
    first.reset();

    // With an age, what was last touched at step 10 is gone at 61.
    const CheckpointFile delta1 = Tables(1, 61, {{12, 61, 12}}, {}, {});
    SaveWith(61, {{base0, delta0}, {base1, delta1}});
    EXPECT_EQ(Rows(WaitFor(1, 61), {1, 11, 12}),
              (std::vector<float>{100, max_age == 0 ? 11.0f : 0.0f, 12}));
    // A new base has nothing of the files before.
    SaveWith(62, {{Tables(0, 62, {{5, 62, 5}}, {}, {})}, {base1, delta1}});
    EXPECT_EQ(Rows(WaitFor(1, 62), {1, 5, 12}), (std::vector<float>{0, 5, 12}));
    model_.reset();
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
  }
}

TEST_F(FrozenTablesTest, RefusesCheckpointsWithoutTheTable) {
  SaveWith(10, {});
  options_.follow = false;
  EXPECT_THAT(LoadError(),
              HasSubstr("the checkpoint has no embedding tables; the model has words"));
  SaveWith(11, {{Tables(0, 11, {}, {}, {})}, {Tables(1, 11, {}, {}, {})}});
  options_.model.mutable_embedding_tables(0)->set_name("others");
  options_.model.mutable_inputs(0)->set_embedding_table("others");
  EXPECT_THAT(LoadError(), HasSubstr("has no embedding table others of dim 2"));
  options_.checkpoint.clear();
  EXPECT_THAT(LoadError(), HasSubstr("the rows of embedding table others come from a directory"));
}

}  // namespace
}  // namespace codistill
