// The stock client of another server, tritonclient from PyPI, against a group that is training.
// CODISTILL_TRITON_PYTHON names a Python interpreter that has it (tests/run.sh makes one).

#include <unistd.h>

#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/integration/ctl_harness.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

TEST(TritonClientTest, DrivesAGroupThatIsTraining) {
  const char* const python = std::getenv("CODISTILL_TRITON_PYTHON");
  if (python == nullptr || access(python, X_OK) != 0) {
    GTEST_SKIP() << "no Python with tritonclient: CODISTILL_TRITON_PYTHON is "
                 << (python == nullptr ? "not set" : python)
                 << " (tests/interop/install_tritonclient.sh makes one where PyPI can be reached)";
  }
  JobConfig job = MlpJob("tritonclient", 2);
  job.mutable_stop()->set_steps(100000000);
  job.mutable_training()->set_publish_every_steps(50);
  job.mutable_prediction()->set_held_versions(8);
  job.mutable_prediction()->set_max_queue(16);
  job.mutable_codistillation()->set_on_teacher_loss(CodistillationConfig::SKIP);
  JobHarness harness(job);
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  status = harness.WaitForStep(0, 100);
  ASSERT_TRUE(status.ok()) << status;

  Command check({python, RunfilesPath("tests/interop/tritonclient_check.py"),
                 harness.member("alpha.prediction.0").address, "alpha"});
  status = harness.WaitFor("the client's checks",
                           [&]() -> absl::StatusOr<bool> { return !check.running(); });
  EXPECT_TRUE(status.ok()) << status;
  const CommandResult result = check.Wait();
  EXPECT_TRUE(result.exit.clean()) << result.out << result.err;
  // It was all of the client that ran.
  EXPECT_NE(result.out.find("ok check_stream"), std::string::npos) << result.out;
}

}  // namespace
}  // namespace codistill
