// Students of teachers that no group of their job trains: frozen models and their averages.

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/config/job.h"
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

}  // namespace
}  // namespace codistill
