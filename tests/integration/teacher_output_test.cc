// Groups that teach one another in fewer bytes, with real servers between them.

#include <cmath>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

struct Case {
  std::string name;
  CodistillationConfig::TeacherOutput output;
  DataType dtype;
};

class TeacherOutputTest : public ::testing::TestWithParam<Case> {};

INSTANTIATE_TEST_SUITE_P(
    Formats, TeacherOutputTest,
    ::testing::Values(Case{"TopK", CodistillationConfig::TOP_K, DT_FLOAT},
                      Case{"TopKHalf", CodistillationConfig::TOP_K, DT_HALF},
                      Case{"Bfloat16", CodistillationConfig::ALL_LOGITS, DT_BFLOAT16},
                      Case{"Int8", CodistillationConfig::ALL_LOGITS, DT_INT8}),
    [](const ::testing::TestParamInfo<Case>& info) { return info.param.name; });

TEST_P(TeacherOutputTest, EveryStepAfterBurnInUsesIt) {
  JobConfig job = MlpJob("output-" + GetParam().name, 2);
  CodistillationConfig& codistillation = *job.mutable_codistillation();
  codistillation.set_burn_in_steps(20);
  codistillation.set_teacher_output(GetParam().output);
  codistillation.set_top_k(4);
  codistillation.set_teacher_dtype(GetParam().dtype);
  codistillation.set_temperature(2);
  job.mutable_training()->set_publish_every_steps(10);
  job.mutable_stop()->set_steps(60);

  JobHarness harness(job);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  for (int group = 0; group < 2; ++group) {
    const auto history = harness.History(group);
    ASSERT_TRUE(history.ok()) << history.status();
    EXPECT_EQ(history->totals().teacher_used_steps(), 40);
    EXPECT_EQ(history->totals().teacher_skipped_steps(), 0);
    EXPECT_EQ(history->totals().first_step_used(), 21);
  }
  EXPECT_TRUE(harness.Drain().ok());
}

}  // namespace
}  // namespace codistill
