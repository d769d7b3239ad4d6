#include "control/run_command.h"

#include <unistd.h>

#include "common/base/file.h"
#include "control/exporter.h"
#include "control/progress.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::string FreshDirectory(const std::string& name) {
  const std::string path = JoinPath(::testing::TempDir(), name);
  EXPECT_TRUE(RemoveAll(path).ok());
  return path;
}

TEST(ClaimRunDirectoryTest, MakesAFreshOneAndLocksIt) {
  const std::string out = FreshDirectory("fresh/run");
  ASSERT_TRUE(ClaimRunDirectory(out, false).ok());
  // The lock is held by this process for as long as it lives.
  const absl::Status again = ClaimRunDirectory(out, false);
  EXPECT_EQ(again.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(again.message()), HasSubstr(out));
}

TEST(ClaimRunDirectoryTest, RefusesOneThatHoldsARun) {
  const std::string out = FreshDirectory("used");
  ASSERT_TRUE(FileSystem::Real()->MakeDirs(out).ok());
  ASSERT_TRUE(WriteFileAtomically(JoinPath(out, "job.textproto"), "name: \"x\"").ok());
  const absl::Status status = ClaimRunDirectory(out, false);
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(status.message()), HasSubstr("--resume"));
  EXPECT_TRUE(ClaimRunDirectory(out, true).ok());
}

TEST(ClaimRunDirectoryTest, ResumesOnlyARun) {
  const std::string out = FreshDirectory("nothing_here");
  const absl::Status status = ClaimRunDirectory(out, true);
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr(out));
}

// Stands in for the exporter: notes that it ran.
constexpr char kScript[] = R"(
while [ $# -gt 0 ]; do
  [ "$1" = --out ] && out=$2
  [ "$1" = --option ] && [ "$2" = width=bad ] && { echo "width: bad is no number"; exit 2; }
  shift
done
echo run >> "$out.runs"
)";

class ExportModelsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = FreshDirectory("models");
    ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
    script_ = JoinPath(::testing::TempDir(), "exporter.sh");
    ASSERT_TRUE(WriteFileAtomically(script_, kScript).ok());
    job_.add_groups()->set_name("alpha");
    job_.mutable_model()->mutable_export_()->set_module("mlp");
    option_ = job_.mutable_model()->mutable_export_()->add_options();
    option_->set_key("width");
    option_->set_value("8");
  }

  absl::Status Export(bool resume) {
    return ExportModels(job_, ".", "/bin/sh", script_, directory_, resume, nullptr);
  }

  int Runs() {
    const auto text = ReadFile(JoinPath(directory_, "alpha.runs"), 1000);
    return text.ok() ? static_cast<int>(text->size()) / 4 : 0;
  }

  std::string directory_, script_;
  JobConfig job_;
  ModelExport::Option* option_ = nullptr;
};

TEST_F(ExportModelsTest, KeepsWhatTheSameRecipeMade) {
  ASSERT_TRUE(Export(false).ok());
  ASSERT_TRUE(Export(true).ok());
  EXPECT_EQ(Runs(), 1);
  option_->set_value("16");
  ASSERT_TRUE(Export(false).ok());
  EXPECT_EQ(Runs(), 2);
}

TEST_F(ExportModelsTest, RefusesToResumeWithAnotherModel) {
  ASSERT_TRUE(Export(false).ok());
  job_.set_seed(7);
  const absl::Status status = Export(true);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("group alpha"));
  EXPECT_EQ(Runs(), 1);
}

TEST_F(ExportModelsTest, PassesTheExportersMessageOn) {
  option_->set_value("bad");
  const absl::Status status = Export(false);
  EXPECT_THAT(std::string(status.message()), HasSubstr("width: bad is no number"));
  EXPECT_EQ(Runs(), 0);
}

TEST(ProgressTest, ClockTime) {
  EXPECT_EQ(ClockTime(0), "0:00");
  EXPECT_EQ(ClockTime(95.4), "1:35");
  EXPECT_EQ(ClockTime(3665), "1:01:05");
  EXPECT_EQ(ClockTime(-1), "?");
  EXPECT_EQ(ClockTime(1.0 / 0.0), "?");
}

DaemonStatus Leader() {
  DaemonStatus leader;
  leader.set_group("alpha");
  leader.set_state("training");
  leader.set_rate(10);
  GroupState* state = leader.mutable_group_state();
  state->set_phase(GroupState::TRAINING);
  state->set_stop_steps(3000);
  state->mutable_version()->set_step(1200);
  leader.add_members()->mutable_counters()->set_examples_per_second(1000);
  leader.add_members()->mutable_counters()->set_examples_per_second(500);
  TrainingPoint* point = leader.mutable_history()->add_training();
  point->set_label_loss(1.2345);
  point->set_teacher_loss(2);
  return leader;
}

TEST(ProgressTest, OneLineAGroup) {
  DaemonStatus leader = Leader();
  EXPECT_EQ(ProgressLine(leader), "alpha    step 1200/3000  loss 1.234  1500 examples/s  ETA 3:00");
  leader.mutable_history()->mutable_training(0)->set_teacher_weight(1);
  EXPECT_THAT(ProgressLine(leader), HasSubstr("loss 1.234 + psi 2.000"));
}

TEST(ProgressTest, ShowsWhyAGroupWaits) {
  DaemonStatus leader = Leader();
  leader.mutable_group_state()->set_phase(GroupState::RESTORING);
  leader.set_state("restoring");
  leader.set_detail("shard 1 was restarted");
  EXPECT_THAT(ProgressLine(leader), HasSubstr("restoring (shard 1 was restarted)"));
}

TEST(ProgressTest, FinishedGroupHasNoTimeLeft) {
  DaemonStatus leader = Leader();
  leader.mutable_group_state()->set_phase(GroupState::FINISHED);
  leader.mutable_history()->set_training_seconds(61);
  EXPECT_THAT(ProgressLine(leader), HasSubstr("done in 1:01"));
  EXPECT_THAT(ProgressLine(leader), Not(HasSubstr("ETA")));
}

}  // namespace
}  // namespace codistill
