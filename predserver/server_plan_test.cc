#include "predserver/server_plan.h"

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/model/test_archive.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::string Write(const std::string& name, const std::string& text) {
  const std::string path = JoinPath(
      testing::TempDir(),
      absl::StrCat(testing::UnitTest::GetInstance()->current_test_info()->name(), ".", name));
  EXPECT_TRUE(WriteFileAtomically(path, text).ok());
  return path;
}

class ServerPlanTest : public testing::Test {
 protected:
  // Two archives of a linear model, of different seeds, in one folder.
  static const std::string& Folder() {
    static const std::string* const folder = [] {
      const std::vector<std::string> options = {"in_features=2", "hidden=", "num_classes=2"};
      auto* const first = new std::string(ExportForTest("old", "mlp", options, 1));
      const std::string second = ExportForTest("older", "mlp", options, 2);
      const auto bytes = ReadFile(second + "/older.pt", 1 << 20);
      EXPECT_TRUE(WriteFileAtomically(*first + "/older.pt", *bytes).ok());
      return first;
    }();
    return *folder;
  }

  static std::string Job() {
    return absl::StrCat(
        R"pb(
          name: "job"
          data {
            train { synthetic { inputs: 2 classes: 2 } }
            validation { synthetic { inputs: 2 classes: 2 stream: 1 } }
          }
          training { batch_size: 4 }
          stop { steps: 10 }
          prediction { weights: DT_BFLOAT16 held_versions: 2 compute_threads: 3 }
          groups {
            name: "alpha"
            shards { address: "127.0.0.1:1" }
            num_prediction_servers: 2
            prediction_servers { address: "127.0.0.1:5" }
            prediction_servers { address: "127.0.0.1:6" http_address: "127.0.0.1:7" }
          }
          groups {
            name: "beta"
            shards { address: "127.0.0.1:2" }
            num_prediction_servers: 2
            prediction_servers { address: "127.0.0.1:8" }
            prediction_servers { address: "127.0.0.1:6" http_address: "127.0.0.1:7" }
          }
          teachers {
            name: "both"
            ensemble { members: "old" members: "older" }
          }
          teachers {
            name: "theirs"
            external {}
            prediction_servers { address: "127.0.0.1:9" }
          }
        )pb",
        "teachers { name: 'old' frozen { archive: '", Folder(), "/old.pt' } }",
        "teachers { name: 'older' frozen { archive: '", Folder(), "/older.pt' } }",
        "model { archive_dir: '", Folder(), "' inputs { name: 'x' shape: 2 } num_outputs: 2 }");
  }

  std::string Error() const { return std::string(PlanServer(flags_).status().message()); }

  ServerFlags flags_;
};

TEST_F(ServerPlanTest, AllMistakesInTheFlagsAtOnce) {
  EXPECT_THAT(Error(), HasSubstr("nothing to serve; --group, --teacher or --archive"));
  flags_.group = "alpha";
  flags_.teacher = "old";
  flags_.checkpoint = "somewhere";
  flags_.index = -1;
  flags_.weights = "FP8";
  flags_.compute_threads = -2;
  flags_.spin_us = -1;
  flags_.held_versions = -1;
  flags_.device = "gpu";
  flags_.precision = "FP16";
  const std::string error = Error();
  for (const char* part :
       {"only one of --group, --teacher and --archive", "--job: missing",
        "--checkpoint: goes with --archive only", "--index: -1", "--weights: FP8",
        "--compute_threads: -2", "--held_versions: -1", "--spin_us: -1; from 0",
        "--device: unknown device (gpu); cpu or cuda:N", "--precision: FP16; FP32 or BF16"}) {
    EXPECT_THAT(error, HasSubstr(part));
  }
  flags_ = ServerFlags();
  flags_.archive = "a.pt";
  flags_.follow = true;
  EXPECT_THAT(Error(), HasSubstr("--model: missing"));
  EXPECT_THAT(Error(), HasSubstr("--follow: needs --checkpoint"));
  flags_.job = "j";
  flags_.model = "m";
  EXPECT_THAT(Error(), HasSubstr("one of --job and --model"));
}

TEST_F(ServerPlanTest, DevicesAndPrecisionAreTheJobsUnlessAFlagSaysOtherwise) {
  flags_.group = "alpha,beta";
  flags_.index = 1;
  flags_.job = Write("job", Job());
  EXPECT_EQ(PlanServer(flags_)->device, "cpu");
  EXPECT_EQ(PlanServer(flags_)->job.prediction().precision(), FP32);
  std::string text = Job();
  for (const std::string name : {"\"alpha\"", "\"beta\""}) {
    const size_t at = text.find(name) + name.size();
    text.insert(at, name == "\"alpha\"" ? " prediction_devices: ['cuda:0', 'cuda:1']"
                                        : " prediction_devices: ['cuda:0', 'cuda:3']");
  }
  flags_.job = Write("cuda", absl::StrCat(text, "teachers { name: 'mine' frozen { archive: '",
                                          Folder(), "/old.pt' } prediction_devices: 'cuda:2' }"));
  EXPECT_THAT(Error(), HasSubstr("have several devices (cuda:1, cuda:3)"));
  flags_.device = "cuda:1";
  EXPECT_EQ(PlanServer(flags_)->device, "cuda:1");
  flags_.device.clear();
  flags_.group = "beta";
  flags_.precision = "BF16";
  EXPECT_EQ(PlanServer(flags_)->device, "cuda:3");
  EXPECT_EQ(PlanServer(flags_)->job.prediction().precision(), BF16);
  flags_.group.clear();
  flags_.teacher = "mine";
  flags_.index = 0;
  const auto plan = PlanServer(flags_);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->device, "cuda:2");
}

TEST_F(ServerPlanTest, GroupsShareAProcess) {
  flags_.job = Write("job", Job());
  flags_.group = "alpha, beta";
  flags_.index = 1;
  const auto plan = PlanServer(flags_);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->names, ElementsAre("alpha", "beta"));
  EXPECT_EQ(plan->group, "alpha,beta");
  EXPECT_EQ(plan->endpoint.address(), "127.0.0.1:6");
  EXPECT_EQ(plan->endpoint.http_address(), "127.0.0.1:7");
  EXPECT_EQ(plan->job.prediction().weights(), DT_BFLOAT16);
  EXPECT_EQ(plan->job.prediction().compute_threads(), 3);

  flags_.index = 0;
  EXPECT_THAT(Error(), HasSubstr("have several addresses (127.0.0.1:5, 127.0.0.1:8)"));
  flags_.index = 2;
  EXPECT_THAT(Error(), HasSubstr("--index 2: group alpha has 2 prediction servers"));
  flags_.index = 1;
  flags_.group = "alpha,alpha";
  EXPECT_THAT(Error(), HasSubstr("alpha is named twice"));
  flags_.group = "gamma,old";
  EXPECT_THAT(Error(), HasSubstr("no group or teacher \"gamma\" in job job"));
  EXPECT_THAT(Error(), HasSubstr("--group old: is a teacher; --teacher would be right"));
}

TEST_F(ServerPlanTest, TeachersAreFrozenOrEnsembles) {
  flags_.job = Write("job", Job());
  flags_.teacher = "alpha";
  EXPECT_THAT(Error(), HasSubstr("--teacher alpha: is a group; --group would be right"));
  flags_.teacher = "theirs";
  EXPECT_THAT(Error(), HasSubstr("--teacher theirs: is external"));

  const std::vector<float> input = {0.5, -1.5};
  std::vector<std::vector<float>> probabilities;
  flags_.weights = "FP32";
  flags_.compute_threads = 1;
  for (const char* name : {"old", "older", "both"}) {
    flags_.teacher = name;
    flags_.optimize_passes = flags_.teacher != "older";
    const auto plan = PlanServer(flags_);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(plan->job.prediction().weights(), DT_FLOAT);
    EXPECT_EQ(plan->job.prediction().compute_threads(), 1);
    EXPECT_EQ(plan->job.prediction().held_versions(), 2);
    EXPECT_EQ(plan->optimize_passes, flags_.optimize_passes);
    const auto models = OpenModels(*plan);
    ASSERT_TRUE(models.ok()) << models.status();
    ASSERT_EQ(models->size(), 1u);
    EXPECT_EQ((*models)[0].name, name);
    EXPECT_EQ((*models)[0].config.num_outputs(), 2);
    const auto snapshot = (*models)[0].followed->Get();
    ASSERT_TRUE(snapshot.ok()) << snapshot.status();
    const auto logits =
        (*snapshot)->model->Predict({FloatTensor({1, 2}, {input[0], input[1]})}, nullptr);
    ASSERT_TRUE(logits.ok()) << logits.status();
    const auto z = logits->values.As<float>();
    probabilities.push_back({std::exp(z[0]) / (std::exp(z[0]) + std::exp(z[1]))});
  }
  EXPECT_GT(std::abs(probabilities[0][0] - probabilities[1][0]), 1e-3);
  EXPECT_NEAR(probabilities[2][0], (probabilities[0][0] + probabilities[1][0]) / 2, 1e-6);
}

TEST_F(ServerPlanTest, AnArchiveNeedsNoJob) {
  flags_.archive = Folder() + "/old.pt";
  flags_.model = Write("model", "inputs { name: 'x' shape: 2 } num_outputs: 2");
  auto plan = PlanServer(flags_);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->names, ElementsAre("old"));
  EXPECT_EQ(plan->job.name(), "old");
  auto models = OpenModels(*plan);
  ASSERT_TRUE(models.ok()) << models.status();
  EXPECT_TRUE((*models)[0].followed->Get().ok());

  // Or takes the model of one, for which it is nobody.
  flags_.model.clear();
  flags_.job = Write("job", Job());
  flags_.name = "mine";
  flags_.checkpoint = "/nowhere";
  plan = PlanServer(flags_);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->names, ElementsAre("mine"));
  EXPECT_EQ(plan->job.name(), "job");
  models = OpenModels(*plan);
  EXPECT_THAT(std::string(models.status().message()), HasSubstr("mine: /nowhere: no such"));

  flags_.job.clear();
  flags_.model = Write("bad", "inputs { nome: 'x' } num_outputs: 'two'");
  EXPECT_THAT(Error(), HasSubstr("nome"));
  EXPECT_THAT(Error(), HasSubstr("num_outputs"));
  flags_.model = Write("empty", "");
  EXPECT_THAT(Error(), HasSubstr("model.inputs"));
}

}  // namespace
}  // namespace codistill
