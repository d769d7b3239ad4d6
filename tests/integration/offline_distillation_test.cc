// Students of teachers that no group of their job trains: frozen models and their averages.

#include <unistd.h>

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/config/job.h"
#include "control/fleet.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/ctl_harness.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/weights.h"

namespace codistill {
namespace {

constexpr int kSteps = 60;
constexpr int kBurnIn = 10;

// Two groups that have trained a little, shared by the tests.
class OfflineDistillationTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    JobConfig job = MlpJob("teachers", 2);
    job.mutable_codistillation()->set_enabled(false);
    job.mutable_stop()->set_steps(200);
    JobHarness harness(job);
    absl::Status status = harness.Start();
    ASSERT_TRUE(status.ok()) << status;
    status = harness.WaitUntilDone();
    ASSERT_TRUE(status.ok()) << status;
    status = harness.Drain();
    ASSERT_TRUE(status.ok()) << status;
    archives_ = new std::string(harness.job().model().archive_dir());
    checkpoints_ = new std::string(harness.directory().checkpoints());
  }
  static void TearDownTestSuite() {
    delete archives_;
    delete checkpoints_;
  }

  // One student, smaller than its teachers: `old`, of a checkpoint; `raw`, of an archive as it was
  // before training; and `both`, the average of the trained two.
  static JobConfig StudentJob(const std::string& name) {
    JobConfig job = MlpJob(name, 1);
    ModelExport* model = job.mutable_model()->mutable_export_();
    for (ModelExport::Option& option : *model->mutable_options()) {
      if (option.key() == "hidden") option.set_value("24");
    }
    for (const char* group : {"alpha", "beta"}) {
      TeacherConfig* teacher = job.add_teachers();
      teacher->set_name(absl::StrCat("old-", group));
      teacher->mutable_frozen()->set_archive(absl::StrCat(*archives_, "/", group, ".pt"));
      teacher->mutable_frozen()->set_checkpoint(absl::StrCat(*checkpoints_, "/", group));
    }
    TeacherConfig* both = job.add_teachers();
    both->set_name("both");
    both->mutable_ensemble()->add_members("old-alpha");
    both->mutable_ensemble()->add_members("old-beta");
    job.mutable_codistillation()->set_burn_in_steps(kBurnIn);
    job.mutable_codistillation()->set_max_staleness_steps(0);
    job.mutable_stop()->set_steps(kSteps);
    return job;
  }

  // Every step after burn-in has used `teachers` teachers, which are never stale.
  static void ExpectTaught(const WorkerCounters& totals, int teachers) {
    EXPECT_EQ(totals.first_step_used(), kBurnIn + 1);
    EXPECT_EQ(totals.teacher_used_steps(), kSteps - kBurnIn);
    EXPECT_EQ(totals.teacher_skipped_steps(), 0);
    EXPECT_EQ(totals.max_staleness_steps(), 0);
    ASSERT_EQ(totals.teachers_size(), teachers);
    for (const TeacherCounters& teacher : totals.teachers()) {
      EXPECT_GE(teacher.requests(), kSteps - kBurnIn) << teacher.name();
    }
  }

  static std::string* archives_;
  static std::string* checkpoints_;
};

std::string* OfflineDistillationTest::archives_ = nullptr;
std::string* OfflineDistillationTest::checkpoints_ = nullptr;

TEST_F(OfflineDistillationTest, AStudentComputesItsFrozenTeachersItselfBitForBit) {
  JobConfig job = StudentJob("local");
  job.mutable_codistillation()->set_mode(CodistillationConfig::CHECKPOINTS);
  std::vector<Weights> weights;
  for (int run = 0; run < 2; ++run) {
    JobHarness harness(job);
    absl::Status status = harness.Start();
    ASSERT_TRUE(status.ok()) << status;
    status = harness.WaitUntilDone();
    ASSERT_TRUE(status.ok()) << status;
    const auto history = harness.History(0);
    ASSERT_TRUE(history.ok()) << history.status();
    ExpectTaught(history->totals(), 3);
    auto cut = harness.NewestCut(0);
    ASSERT_TRUE(cut.ok()) << cut.status();
    weights.push_back(*std::move(cut));
    status = harness.Drain();
    EXPECT_TRUE(status.ok()) << status;
  }
  EXPECT_EQ(FirstBitDifference(weights[0], weights[1]), "");
  job.mutable_codistillation()->set_enabled(false);
  JobHarness alone(job);
  const auto without = alone.TrainToEnd();
  ASSERT_TRUE(without.ok()) << without.status();
  EXPECT_GT(RelativeDifference(weights[0], *without), 1e-3) << "the teachers have taught nothing";
}

TEST_F(OfflineDistillationTest, PredictionServersAnswerForFrozenTeachersAndTheirAverage) {
  JobConfig job = StudentJob("served");
  job.mutable_teachers(0)->set_num_prediction_servers(2);
  job.mutable_groups(0)->add_teachers("both");
  job.mutable_groups(0)->add_teachers("old-alpha");
  JobHarness harness(job, /*restart=*/true);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  // "old-beta" is held by the servers of the ensemble, and nobody asks the student.
  std::vector<std::string> servers;
  for (const auto& member : harness.fleet().members()) {
    if (member->role == FleetMember::Role::kPredictionServer) servers.push_back(member->name);
  }
  EXPECT_THAT(servers,
              testing::UnorderedElementsAre("old-alpha.prediction.0", "old-alpha.prediction.1",
                                            "both.prediction.0"));
  const auto written = LoadJob(harness.directory().job());
  ASSERT_TRUE(written.ok()) << written.status();
  EXPECT_EQ(written->teachers(0).prediction_servers(1).address(),
            harness.member("old-alpha.prediction.1").address);
  EXPECT_TRUE(written->teachers(1).prediction_servers().empty());
  // One that is lost comes back where it was.
  harness.Kill("both.prediction.0");
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  const auto history = harness.History(0);
  ASSERT_TRUE(history.ok()) << history.status();
  ExpectTaught(history->totals(), 2);
  status = harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
}

// The way of a newcomer: `codistillctl run` with the teachers of another run.
TEST_F(OfflineDistillationTest, CodistillctlRunsItWithTheTeachersOfAnotherRun) {
  OrphanCatcher catcher;
  // As a run directory has them.
  const std::string run = NewDirectory("teachers");
  ASSERT_EQ(symlink(archives_->c_str(), (run + "/model").c_str()), 0);
  ASSERT_EQ(symlink(checkpoints_->c_str(), (run + "/checkpoints").c_str()), 0);
  JobConfig job = StudentJob("offline");
  for (int t = 0; t < 2; ++t) {
    FrozenTeacher* frozen = job.mutable_teachers(t)->mutable_frozen();
    frozen->set_archive(absl::StrCat("model/", BaseName(frozen->archive())));
    frozen->set_checkpoint(absl::StrCat("checkpoints/", BaseName(frozen->checkpoint())));
  }
  job.mutable_groups(0)->add_teachers("both");
  const std::string path = WriteJob(job);

  const CommandResult missing = Ctl({"run", path, "--out", NewDirectory("missing") + "/run"});
  EXPECT_EQ(missing.exit.exit_code, 2);
  EXPECT_THAT(missing.err, testing::HasSubstr("teachers[0].frozen.archive: there is no "));
  EXPECT_THAT(missing.err, testing::HasSubstr("teachers[1].frozen.checkpoint: there is no "));
  EXPECT_THAT(missing.err, testing::HasSubstr("--teachers_dir"));

  const std::string out = NewDirectory("offline") + "/run";
  Command command(CtlArgv({"run", path, "--out", out, "--teachers_dir", run}));
  bool seen = false;
  EXPECT_TRUE(WaitUntil([&] {
    const CommandResult status = Ctl({"status", out});
    seen = seen || absl::StrContains(status.out, "both.prediction.0");
    return seen || !command.running();
  }));
  const CommandResult result = command.Wait();
  EXPECT_TRUE(result.exit.clean()) << result.exit.ToString() << "\n" << result.err;
  EXPECT_TRUE(seen) << "status shows the servers of teachers";
  const nlohmann::json summary = ReadJson(out + "/summary.json");
  ASSERT_EQ(summary["groups"].size(), 1u);
  EXPECT_EQ(summary["groups"][0]["teachers"], nlohmann::json({"both"}));
  const nlohmann::json& teacher = summary["groups"][0]["teacher"];
  EXPECT_EQ(teacher["used_steps"], kSteps - kBurnIn);
  EXPECT_EQ(teacher["skipped_steps"], 0);
  EXPECT_EQ(teacher["first_step_used"], kBurnIn + 1);
  EXPECT_EQ(teacher["failures"], 0);
  EXPECT_EQ(teacher["teachers"][0]["name"], "both");
}

}  // namespace
}  // namespace codistill
