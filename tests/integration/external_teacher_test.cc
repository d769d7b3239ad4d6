// Teachers that are somebody else's servers of the Open Inference Protocol: those of another job of
// ours, under other names, and one that has nothing of ours at all.

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"
#include "worker/testing/scripted_inference_server.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

// One group whose model is another one and calls its input "features".
JobConfig StudentJob(const std::string& name) {
  const std::string module = absl::StrCat(NewDirectory("module"), "/student.py");
  const absl::Status written = WriteFileAtomically(module, R"(
import torch
from torch import nn


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(32, 24)
        self.output = nn.Linear(24, 8)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.hidden(features)))


def build(options):
    return Student()
)");
  EXPECT_TRUE(written.ok()) << written;
  JobConfig job = MlpJob(name, 1);
  job.mutable_model()->mutable_export_()->set_module(module);
  job.mutable_model()->mutable_export_()->clear_options();
  ModelInput* input = job.mutable_model()->mutable_inputs(0);
  input->set_name("features");
  input->set_field("x");
  return job;
}

ExternalTeacher* AddTeacher(const std::string& name, const std::string& address, JobConfig* job) {
  TeacherConfig* teacher = job->add_teachers();
  teacher->set_name(name);
  teacher->add_prediction_servers()->set_address(address);
  return teacher->mutable_external();
}

void MapInput(const std::string& there, ExternalTeacher* teacher) {
  auto* input = teacher->add_inputs();
  input->set_input("features");
  input->set_server(there);
}

TEST(ExternalTeacherTest, ServersOfAnotherJobAndOfSomebodyElse) {
  // A job of ours that has been trained, with servers that stay.
  JobHarness other(MlpJob("other-job", 2));
  absl::Status status = other.Start();
  ASSERT_TRUE(status.ok()) << status;
  status = other.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  // A server that knows the protocol and nothing else: typed contents, no parameters.
  auto theirs =
      ScriptedInferenceServer::Start([](const inference::ModelInferRequest& request,
                                        inference::ModelInferResponse* response) -> absl::Status {
        if (request.model_name() != "mlp_prod" || !request.parameters().empty() ||
            request.inputs_size() != 1 || request.inputs(0).name() != "INPUT__0") {
          return absl::InvalidArgumentError(request.ShortDebugString().substr(0, 200));
        }
        const int64_t rows = request.inputs(0).shape(0);
        auto* output = response->add_outputs();
        output->set_name("OUTPUT__0");
        output->set_datatype("FP32");
        output->add_shape(rows);
        output->add_shape(8);
        for (int64_t i = 0; i < rows * 8; ++i) {
          output->mutable_contents()->add_fp32_contents(i % 8 == 3 ? 0.65f : 0.05f);
        }
        response->set_model_version("7");
        return absl::OkStatus();
      });

  JobConfig job = StudentJob("student");
  ExternalTeacher* teacher = AddTeacher("sibling", other.member("beta.prediction.0").address, &job);
  teacher->set_model("beta");
  teacher->set_codistill_server(true);
  MapInput("x", teacher);
  // The same servers as if they were anybody's.
  teacher = AddTeacher("anybody", other.member("alpha.prediction.0").address, &job);
  teacher->set_model("alpha");
  MapInput("x", teacher);
  teacher = AddTeacher("theirs", theirs->address(), &job);
  teacher->set_model("mlp_prod");
  teacher->set_version("7");
  teacher->set_output("OUTPUT__0");
  teacher->set_kind(ExternalTeacher::PROBABILITIES);
  MapInput("INPUT__0", teacher);

  JobHarness harness(job);
  status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  const auto history = harness.History(0);
  ASSERT_TRUE(history.ok()) << history.status();
  const WorkerCounters& totals = history->totals();
  EXPECT_EQ(totals.teacher_used_steps(), 100);
  EXPECT_EQ(totals.teacher_skipped_steps(), 0);
  EXPECT_EQ(totals.teacher_failures(), 0);
  EXPECT_EQ(totals.max_staleness_steps(), 0) << "the other job has finished";
  ASSERT_EQ(totals.teachers_size(), 3);
  for (const TeacherCounters& counters : totals.teachers()) {
    EXPECT_EQ(counters.requests(), 100) << counters.name();
  }
  EXPECT_EQ(theirs->calls(), 100);
  // What the three say is part of the loss to the last step.
  ASSERT_GT(history->training_size(), 0);
  EXPECT_GT(history->training(history->training_size() - 1).teacher_loss(), 0);
  EXPECT_TRUE(harness.Drain().ok());
  EXPECT_TRUE(other.Drain().ok());
}

TEST(ExternalTeacherTest, AWrongNameIsToldByWhoMissesIt) {
  JobHarness other(MlpJob("other-job", 2));
  absl::Status status = other.Start();
  ASSERT_TRUE(status.ok()) << status;
  status = other.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  JobConfig job = StudentJob("mistaken");
  job.mutable_codistillation()->set_on_teacher_loss(CodistillationConfig::FAIL);
  job.mutable_codistillation()->set_teacher_wait_ms(10000);
  ExternalTeacher* teacher = AddTeacher("sibling", other.member("beta.prediction.0").address, &job);
  teacher->set_model("beta");
  MapInput("image", teacher);
  JobHarness harness(job);
  status = harness.Start();
  if (status.ok()) status = harness.WaitUntilDone();
  ASSERT_FALSE(status.ok());
  EXPECT_THAT(status.ToString(), HasSubstr("sibling"));
  EXPECT_THAT(status.ToString(), HasSubstr("image"));
  EXPECT_TRUE(other.Drain().ok());
}

}  // namespace
}  // namespace codistill
