// Checkpoints after the run: listed, verified, exported, and taken up by another number of shards.

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/base/file.h"
#include "common/base/status.h"
#include "gtest/gtest.h"
#include "tests/integration/ctl_harness.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/weights.h"

namespace codistill {
namespace {

JobConfig Job(const std::string& name, int shards, int64_t steps) {
  JobConfig job = MlpJob(name, 1);
  job.mutable_groups(0)->set_num_shards(shards);
  job.mutable_stop()->set_steps(steps);
  job.mutable_checkpoint()->set_every_steps(20);
  job.mutable_checkpoint()->set_keep(2);
  job.mutable_training()->mutable_optimizer()->set_kind(OptimizerConfig::ADAM);
  job.mutable_training()->mutable_optimizer()->set_learning_rate(1e-3);
  return job;
}

void CopyFiles(const std::string& from, const std::string& to) {
  ASSERT_TRUE(FileSystem::Real()->MakeDirs(to).ok());
  const auto names = FileSystem::Real()->ListDir(from);
  ASSERT_TRUE(names.ok()) << names.status();
  for (const std::string& name : *names) {
    const auto bytes = ReadFile(JoinPath(from, name), size_t{1} << 28);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    ASSERT_TRUE(WriteFileAtomically(JoinPath(to, name), *bytes).ok());
  }
}

// 40 steps on two shards, then to 60 on `shards`, straight from the files or resharded before.
absl::StatusOr<Weights> GoOnWith(int shards, bool reshard, const std::string& checkpoints) {
  JobHarness harness(Job("on", shards, 60));
  const std::string here = JoinPath(harness.directory().checkpoints(), "alpha");
  if (reshard) {
    const CommandResult result = Ctl(
        {"checkpoint", "reshard", checkpoints, "--shards", std::to_string(shards), "--out", here});
    EXPECT_EQ(result.exit.exit_code, 0) << result.err;
  } else {
    CopyFiles(checkpoints, here);
  }
  CODISTILL_RETURN_IF_ERROR(harness.Start());
  CODISTILL_RETURN_IF_ERROR(harness.WaitUntilDone());
  const auto history = harness.History(0);
  // It went on; it did not begin anew.
  EXPECT_EQ(history->examples(), 60 * 32);
  EXPECT_GT(history->training(0).step(), 0);
  absl::StatusOr<Weights> weights = harness.NewestCut(0);
  CODISTILL_RETURN_IF_ERROR(harness.Drain());
  return weights;
}

class CheckpointTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    JobHarness straight(Job("straight", 2, 60));
    auto weights = straight.TrainToEnd();
    ASSERT_TRUE(weights.ok()) << weights.status();
    expected_ = new Weights(*std::move(weights));
    JobHarness first(Job("first", 2, 40));
    const auto at40 = first.TrainToEnd();
    ASSERT_TRUE(at40.ok()) << at40.status();
    at40_ = new Weights(*at40);
    checkpoints_ = new std::string(JoinPath(first.directory().checkpoints(), "alpha"));
    archive_ = new std::string(JoinPath(first.job().model().archive_dir(), "alpha.pt"));
  }
  void SetUp() override { ASSERT_NE(archive_, nullptr); }

  static Weights* expected_;
  static Weights* at40_;
  static std::string* checkpoints_;
  static std::string* archive_;
};

Weights* CheckpointTest::expected_ = nullptr;
Weights* CheckpointTest::at40_ = nullptr;
std::string* CheckpointTest::checkpoints_ = nullptr;
std::string* CheckpointTest::archive_ = nullptr;

TEST_F(CheckpointTest, AnotherNumberOfShardsGoesOnToTheSameBits) {
  for (const bool reshard : {false, true}) {
    for (const int shards : {1, 3}) {
      SCOPED_TRACE(testing::Message() << shards << " shards, resharded before: " << reshard);
      const auto weights = GoOnWith(shards, reshard, *checkpoints_);
      ASSERT_TRUE(weights.ok()) << weights.status();
      EXPECT_EQ(FirstBitDifference(*expected_, *weights), "");
    }
  }
}

TEST_F(CheckpointTest, AreListedAndVerified) {
  const nlohmann::json list = ParseJson(Ctl({"checkpoint", "list", *checkpoints_, "--json"}).out);
  ASSERT_EQ(list.size(), 2u);
  EXPECT_EQ(list[0]["step"], 40);
  EXPECT_EQ(list[1]["step"], 20);
  EXPECT_EQ(list[0]["shards"], 2);
  EXPECT_EQ(list[0]["optimizer"], "ADAM");
  EXPECT_GT(list[0]["created_unix_ms"].get<int64_t>(), 1600000000000);

  const CommandResult whole = Ctl({"checkpoint", "verify", *checkpoints_});
  EXPECT_EQ(whole.exit.exit_code, 0) << whole.err;
  EXPECT_NE(whole.out.find("whole"), std::string::npos);

  const std::string copy = JoinPath(NewDirectory("damaged"), "alpha");
  CopyFiles(*checkpoints_, copy);
  std::string victim;
  const std::vector<std::string> names = FileSystem::Real()->ListDir(copy).value();
  for (const std::string& name : names) {
    if (name.find("shard-1-") == 0 && name.find("-40-") != std::string::npos) victim = name;
  }
  ASSERT_FALSE(victim.empty());
  std::string bytes = ReadFile(JoinPath(copy, victim), size_t{1} << 28).value();
  bytes[bytes.size() / 2] ^= 1;
  ASSERT_TRUE(WriteFileAtomically(JoinPath(copy, victim), bytes).ok());
  const CommandResult damaged = Ctl({"checkpoint", "verify", copy});
  EXPECT_EQ(damaged.exit.exit_code, 1);
  EXPECT_NE(damaged.out.find("DAMAGED"), std::string::npos) << damaged.out;
  EXPECT_NE(damaged.out.find(victim), std::string::npos) << damaged.out;
  // The one before it is whole.
  EXPECT_EQ(Ctl({"checkpoint", "verify", copy, "--step", "20"}).exit.exit_code, 0);
}

TEST_F(CheckpointTest, AreExportedForOthers) {
  const std::string directory = NewDirectory("export");
  const std::string weights = JoinPath(directory, "w.safetensors");
  CommandResult result = Ctl({"checkpoint", "export", *checkpoints_, "--out", weights});
  ASSERT_EQ(result.exit.exit_code, 0) << result.err;
  const auto read = ReadSafetensors(weights);
  ASSERT_TRUE(read.ok()) << read.status();
  for (const NamedTensor& tensor : at40_->tensors) {
    const Tensor* const exported = read->Find(tensor.name);
    ASSERT_NE(exported, nullptr) << tensor.name;
    EXPECT_EQ(std::string(static_cast<const char*>(exported->data()), exported->bytes()),
              std::string(static_cast<const char*>(tensor.tensor.data()), tensor.tensor.bytes()))
        << tensor.name;
  }

  const std::string archive = JoinPath(directory, "trained.pt");
  result = Ctl({"checkpoint", "export", *checkpoints_, "--out", archive, "--archive", *archive_});
  ASSERT_EQ(result.exit.exit_code, 0) << result.err;
  // PyTorch loads it and finds the very same values.
  const std::string script = WriteText("check.py", R"(
import sys
sys.path.insert(0, sys.argv[1])
import torch
from models import tensor_files
model = torch.jit.load(sys.argv[2])
assert not model.training
weights = tensor_files.read_safetensors(sys.argv[3])
specs = tensor_files.tensor_specs(model)
assert len(specs) == len(weights) > 0
for spec in specs:
    assert tensor_files.tensor_bytes(spec.tensor) == weights[spec.name][2], spec.name
assert model(torch.zeros(2, 32)).shape == (2, 8)
)");
  setenv("PYTHONDONTWRITEBYTECODE", "1", 1);
  Command check({"/usr/bin/python3", script, RunfilesPath("."), archive, weights});
  const CommandResult checked = check.Wait();
  EXPECT_EQ(checked.exit.exit_code, 0) << checked.err;

  result = Ctl({"checkpoint", "export", *checkpoints_, "--out", JoinPath(directory, "w.bin")});
  EXPECT_EQ(result.exit.exit_code, 2);
  EXPECT_NE(result.err.find(".safetensors"), std::string::npos) << result.err;
  result = Ctl({"checkpoint", "export", *checkpoints_, "--out", weights, "--step", "30"});
  EXPECT_NE(result.exit.exit_code, 0);
  EXPECT_NE(result.err.find("there are: 40, 20"), std::string::npos) << result.err;
}

}  // namespace
}  // namespace codistill
