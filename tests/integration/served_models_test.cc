// Real prediction servers of models whose answers tell which weights gave them: hot swaps under
// load, versions named by requests, frozen models of a checkpoint directory, ensembles, several
// groups in one process.

#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/config/job.h"
#include "common/config/shard_map.h"
#include "common/model/testing/checkpoint_files.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "control/child_process.h"
#include "control/daemon_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "proto/open_inference.grpc.pb.h"
#include "tests/benchmarks/known_group.h"
#include "tests/benchmarks/known_load.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

using testing::HasSubstr;

KnownModel SmallModel() {
  KnownModel model;
  model.inputs = 64;
  model.hidden = 64;
  model.outputs = 16;
  return model;
}

// A prediction server of this build.
class Server {
 public:
  Server(const std::string& directory, std::vector<std::string> flags) {
    static int servers = 0;
    const std::string ready = JoinPath(directory, absl::StrCat("server", servers++, ".ready"));
    std::vector<std::string> argv = {RunfilesPath("predserver/prediction_server"), "--port=0",
                                     absl::StrCat("--ready_file=", ready)};
    argv.insert(argv.end(), flags.begin(), flags.end());
    auto child = ChildProcess::Start(argv, ready + ".log");
    EXPECT_TRUE(child.ok()) << child.status();
    child_ = *std::move(child);
    const absl::Time limit = absl::Now() + kPatience;
    while (access(ready.c_str(), R_OK) != 0 && !child_.Poll() && absl::Now() < limit) {
      absl::SleepFor(absl::Milliseconds(10));
    }
    const auto text = ReadFile(ready, 1 << 16);
    EXPECT_TRUE(text.ok()) << TailOfFile(ready + ".log", 20);
    if (text.ok()) address_ = nlohmann::json::parse(*text).value("address", "");
  }
  ~Server() {
    child_.Signal(SIGTERM);
    const absl::Time limit = absl::Now() + kPatience;
    while (child_.running() && !child_.Poll() && absl::Now() < limit) {
      absl::SleepFor(absl::Milliseconds(5));
    }
    EXPECT_TRUE(child_.Poll() && child_.Poll()->clean())
        << (child_.Poll() ? child_.Poll()->ToString() : "still runs");
  }

  const std::string& address() const { return address_; }
  DaemonStatus Status() const {
    auto status = GetDaemonStatus(address_, kPatience);
    EXPECT_TRUE(status.ok()) << status.status();
    return status.ok() ? *std::move(status) : DaemonStatus();
  }
  // Waits until the model answers with this version.
  ServedModelStatus WaitFor(const std::string& version) const {
    ServedModelStatus model;
    for (const absl::Time limit = absl::Now() + kPatience; absl::Now() < limit;) {
      model = Status().models(0);
      if (absl::StrCat(model.version().generation(), ".", model.version().step()) == version) {
        return model;
      }
      absl::SleepFor(absl::Milliseconds(10));
    }
    ADD_FAILURE() << "never at " << version << ": " << model.ShortDebugString();
    return model;
  }

 private:
  ChildProcess child_;
  std::string address_;
};

// One question of ones to `version` of a model, empty: any.
absl::StatusOr<inference::ModelInferResponse> Ask(const Server& server, const KnownModel& model,
                                                  const std::string& name,
                                                  const std::string& version = "") {
  inference::ModelInferRequest request;
  request.set_model_name(name);
  request.set_model_version(version);
  auto* const input = request.add_inputs();
  input->set_name("x");
  input->set_datatype("FP32");
  input->add_shape(1);
  input->add_shape(model.inputs);
  for (int64_t i = 0; i < model.inputs; ++i) input->mutable_contents()->add_fp32_contents(1);
  inference::ModelInferResponse response;
  const auto stub = inference::GRPCInferenceService::NewStub(
      MakeChannel(server.address(), ChannelUse::kPrediction));
  const auto context = MakeContext(absl::Now() + kPatience);
  const grpc::Status status = stub->ModelInfer(context.get(), request, &response);
  if (!status.ok()) return FromGrpcStatus(status);
  return response;
}

std::vector<float> LogitsOf(const inference::ModelInferResponse& response) {
  const std::string& raw = response.raw_output_contents(0);
  std::vector<float> logits(raw.size() / sizeof(float));
  std::memcpy(logits.data(), raw.data(), raw.size());
  return logits;
}

// A checkpoint of the model at `step`; `spoilt`: with a NaN.
void WriteCheckpoint(const KnownModel& model, const std::string& archive,
                     const std::string& directory, int64_t step, bool spoilt = false) {
  const TensorList list = *LoadTensorList(archive + ".tensors.textproto");
  std::vector<float> weights = model.Weights(step);
  if (spoilt) weights.back() = std::numeric_limits<float>::quiet_NaN();
  std::vector<std::string> values;
  const char* at = reinterpret_cast<const char*>(weights.data());
  for (const TensorSpec& spec : list.tensors()) {
    size_t bytes = sizeof(float);
    for (const int64_t d : spec.shape()) bytes *= d;
    values.emplace_back(at, bytes);
    at += bytes;
  }
  const auto written = WriteCheckpointFiles(directory, *BuildShardMap(list, 2), 1, step, values);
  ASSERT_TRUE(written.ok()) << written.status();
}

class ServedModelsTest : public testing::Test {
 protected:
  ServedModelsTest() : model_(SmallModel()), directory_(NewDirectory("served")) {}

  void StartGroup() {
    KnownGroup::Options options;
    options.model = model_;
    options.directory = directory_;
    options.core = 0;
    auto group = KnownGroup::Start(std::move(options));
    ASSERT_TRUE(group.ok()) << group.status();
    group_ = *std::move(group);
    job_ = group_->job();
  }
  // Of the group at a step.
  std::string VersionOf(int64_t step) const {
    return absl::StrCat(group_->generation(), ".", step);
  }
  std::string Save() {
    const std::string path = JoinPath(directory_, "served.textproto");
    const absl::Status saved = SaveJob(job_, path);
    EXPECT_TRUE(saved.ok()) << saved;
    return absl::StrCat("--job=", path);
  }

  const KnownModel model_;
  const std::string directory_;
  std::unique_ptr<KnownGroup> group_;
  JobConfig job_;
};

TEST_F(ServedModelsTest, EveryAnswerOfASwappingServerIsOneVersions) {
  StartGroup();
  job_.mutable_prediction()->set_held_versions(2);
  job_.mutable_prediction()->set_compute_threads(2);
  const Server server(directory_, {Save(), "--group=alpha"});
  server.WaitFor(VersionOf(0));
  KnownLoad::Options options;
  options.model = model_;
  options.address = server.address();
  options.name = "alpha";
  options.rows = 3;
  KnownLoad load(options);
  constexpr int kSwaps = 40;
  int64_t step = 0;
  for (int i = 0; i < kSwaps; ++i) {
    const auto published = group_->Publish();
    ASSERT_TRUE(published.ok()) << published.status();
    step = *published;
    const int64_t answers = load.answers();
    const absl::Time limit = absl::Now() + kPatience;
    while ((load.newest_step() < step || load.answers() < answers + 20) && absl::Now() < limit) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    ASSERT_EQ(load.newest_step(), step);
  }
  const KnownLoad::Result result = load.Stop();
  EXPECT_EQ(result.failed, 0) << result.error;
  EXPECT_EQ(result.wrong, 0) << result.error;
  EXPECT_GE(result.answered.size(), kSwaps * 20u);

  const ServedModelStatus status = server.WaitFor(VersionOf(step));
  EXPECT_EQ(status.swaps(), kSwaps + 1);
  EXPECT_EQ(status.failed_loads(), 0);
  EXPECT_EQ(status.precision(), "FP32");
  ASSERT_EQ(status.held_size(), 2);
  // The version before answers who names it, one that is gone does not.
  const auto older = Ask(server, model_, "alpha", VersionOf(step - 1));
  ASSERT_TRUE(older.ok()) << older.status();
  EXPECT_TRUE(model_.Check(step - 1, LogitsOf(*older).data(), 1).ok());
  EXPECT_FALSE(model_.Check(step, LogitsOf(*older).data(), 1).ok());
  EXPECT_TRUE(absl::IsNotFound(Ask(server, model_, "alpha", VersionOf(step - 2)).status()));
}

TEST_F(ServedModelsTest, AFrozenModelFollowsItsDirectoryPastDamage) {
  const std::string archive = JoinPath(directory_, "old");
  ASSERT_TRUE(model_.Export(directory_, "old").ok());
  const std::string checkpoints = JoinPath(directory_, "checkpoints");
  ASSERT_TRUE(FileSystem::Real()->MakeDirs(checkpoints).ok());
  ModelConfig config;
  model_.Describe(&config);
  const std::string model_file = JoinPath(directory_, "old.textproto");
  ASSERT_TRUE(WriteFileAtomically(model_file, config.DebugString()).ok());
  const Server server(
      directory_, {absl::StrCat("--archive=", archive, ".pt"), absl::StrCat("--model=", model_file),
                   absl::StrCat("--checkpoint=", checkpoints), "--follow"});
  EXPECT_TRUE(absl::IsUnavailable(Ask(server, model_, "old").status()));
  WriteCheckpoint(model_, archive, checkpoints, 10);
  server.WaitFor("1.10");
  const auto answer = Ask(server, model_, "old");
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_TRUE(model_.Check(10, LogitsOf(*answer).data(), 1).ok());
  EXPECT_EQ(answer->parameters().at("staleness_steps").int64_param(), 0);

  WriteCheckpoint(model_, archive, checkpoints, 20, /*spoilt=*/true);
  ServedModelStatus status;
  for (const absl::Time limit = absl::Now() + kPatience;
       status.failed_loads() == 0 && absl::Now() < limit;) {
    status = server.Status().models(0);
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_EQ(status.failed_loads(), 1);
  EXPECT_THAT(status.last_load_error(), HasSubstr("MANIFEST-1-20: tensor fc3.bias has a NaN"));
  const auto after = Ask(server, model_, "old");
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->model_version(), "1.10");
  EXPECT_TRUE(model_.Check(10, LogitsOf(*after).data(), 1).ok());
  EXPECT_EQ(after->parameters().at("staleness_steps").int64_param(), 0);
  WriteCheckpoint(model_, archive, checkpoints, 30);
  EXPECT_EQ(server.WaitFor("1.30").last_load_error(), "");
}

TEST_F(ServedModelsTest, AnEnsembleAveragesAGroupAndAFrozenTeacher) {
  StartGroup();
  const std::string archive = JoinPath(directory_, "old");
  ASSERT_TRUE(model_.Export(directory_, "old").ok());
  const std::string checkpoints = JoinPath(directory_, "checkpoints");
  ASSERT_TRUE(FileSystem::Real()->MakeDirs(checkpoints).ok());
  WriteCheckpoint(model_, archive, checkpoints, 6);
  TeacherConfig* const old = job_.add_teachers();
  old->set_name("old");
  old->mutable_frozen()->set_archive("old.pt");  // from the job file's directory
  old->mutable_frozen()->set_checkpoint("checkpoints");
  TeacherConfig* const both = job_.add_teachers();
  both->set_name("both");
  both->mutable_ensemble()->add_members("alpha");
  both->mutable_ensemble()->add_members("old");
  both->mutable_ensemble()->set_average(CodistillationConfig::LOGITS);
  const Server server(directory_, {Save(), "--teacher=both"});
  for (int64_t step = 0; step < 3; ++step) {
    if (step > 0) {
      ASSERT_TRUE(group_->Publish().ok());
    }
    // Sums of the members'.
    server.WaitFor(absl::StrCat(group_->generation() + 1, ".", step + 6));
    const auto answer = Ask(server, model_, "both");
    ASSERT_TRUE(answer.ok()) << answer.status();
    const std::vector<float> logits = LogitsOf(*answer);
    ASSERT_EQ(static_cast<int64_t>(logits.size()), model_.outputs);
    for (int64_t j = 0; j < model_.outputs; ++j) {
      EXPECT_EQ(logits[j], (KnownModel::Answer(step, j) + KnownModel::Answer(6, j)) / 2);
    }
  }
  EXPECT_TRUE(absl::IsNotFound(Ask(server, model_, "old").status()));
}

TEST_F(ServedModelsTest, SeveralGroupsInOneProcess) {
  StartGroup();
  ASSERT_TRUE(model_.Export(directory_, "beta").ok());
  GroupConfig* const beta = job_.add_groups();
  *beta = job_.groups(0);
  beta->set_name("beta");
  beta->mutable_shards(0)->set_address("127.0.0.1:1");  // nobody there
  const Server server(directory_, {Save(), "--group=alpha,beta"});
  server.WaitFor(VersionOf(0));
  const auto answer = Ask(server, model_, "alpha");
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_TRUE(model_.Check(0, LogitsOf(*answer).data(), 1).ok());
  const absl::Status other = Ask(server, model_, "beta").status();
  EXPECT_TRUE(absl::IsUnavailable(other)) << other;
  EXPECT_THAT(std::string(other.message()), HasSubstr("group beta"));
  const DaemonStatus status = server.Status();
  EXPECT_EQ(status.group(), "alpha,beta");
  ASSERT_EQ(status.models_size(), 2);
  EXPECT_EQ(status.models(1).model(), "beta");
}

}  // namespace
}  // namespace codistill
