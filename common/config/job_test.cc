#include "common/config/job.h"

#include <cstdlib>
#include <string>

#include "common/base/file.h"
#include "common/config/test_jobs.h"
#include "gmock/gmock.h"
#include "google/protobuf/util/message_differencer.h"
#include "gtest/gtest.h"

// Job files read and written, and what a job says of groups and files.
namespace codistill {
namespace {

using ::google::protobuf::util::MessageDifferencer;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(LoadJob, AcceptsGoodJobs) {
  for (const char* text : {kGood, kCsv, kText, kImage}) EXPECT_THAT(Mistakes(text), IsEmpty());
  const JobConfig job = Good();
  EXPECT_EQ(job.groups(1).name(), "beta");
  EXPECT_EQ(job.codistillation().prefetch(), 2);
  EXPECT_TRUE(ValidateJob(job).ok());
}

TEST(LoadJob, NamesAMissingFile) {
  const absl::Status status = LoadJob("/nonexistent/job.textproto").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nonexistent/job.textproto"));
}

TEST(LoadJob, FiveMistakesGiveFiveMessages) {
  EXPECT_THAT(
      Mistakes(R"pb(
        name: "job"
        model {
          export { module: "mlp" }
          inputs { name: "x" shape: 31 }
          num_outputs: 20
        }
        data {
          train { synthetic {} }
          validation { synthetic { stream: 1 } }
        }
        groups { name: "alpha" }
        groups { name: "alpha" }
        training {
          batch_size: 0
          optimizer { kind: ADAMM }
        }
        codistillation { burn_in: 5 }
        stop { steps: 100 }
      )pb"),
      ElementsAre(HasSubstr("training.optimizer.kind: wrong value (ADAMM)"),
                  HasSubstr("codistillation.burn_in: no field of this name"),
                  "model.inputs[0].shape: not that of the field ([31]); [32] would be right",
                  "groups[1].name: used twice (alpha); unique names would be right",
                  "training.batch_size: too small (0); at least 1 would be right"));
}

TEST(LoadJob, SaysNothingTwice) {
  // A misspelt required field is not missing as well, nor is one whose value was not understood.
  std::string text = kGood;
  text.replace(text.find("batch_size: 32"), 14, "batchsize: 32");
  text.replace(text.find("steps: 100"), 10, "steps: many");
  text.replace(text.find("num_outputs"), 11, "num_output");
  EXPECT_THAT(Mistakes(text), ElementsAre(HasSubstr("model.num_output: no field"),
                                          HasSubstr("training.batchsize: no field"),
                                          HasSubstr("stop.steps: wrong value (many)")));
}

TEST(LoadJob, ReportsNothingMissingFromHalfAFile) {
  EXPECT_THAT(Mistakes("name: 'job'\nmodel {\n  num_outputs: 2\n"),
              ElementsAre(HasSubstr("4:1: model: the file ends inside this message")));
}

TEST(LoadJob, AppliesOverridesBeforeValidation) {
  const auto job = LoadJob(
      WriteJob(kGood), {"stop.steps=50", "groups.num_workers=3", "training.optimizer.kind=ADAM"});
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->stop().steps(), 50);
  EXPECT_EQ(job->groups(1).num_workers(), 3);
  EXPECT_THAT(
      Mistakes(kGood, {"stop.steps=20", "nosuch=1", "seed=x"}),
      ElementsAre(HasSubstr("override nosuch=1: nosuch: no field"),
                  "override seed=x: seed: wrong value (x); it must be a 64-bit integer, not "
                  "negative",
                  HasSubstr("codistillation.burn_in_steps: no step would use a teacher (30)"
                            "; fewer than the 20 of stop.steps")));
}

TEST(SaveJob, WritesWhatLoadJobReads) {
  const JobConfig job = Good(kCsv);
  const std::string path = JoinPath(std::getenv("TEST_TMPDIR"), "saved.textproto");
  ASSERT_TRUE(SaveJob(job, path).ok());
  const auto read = LoadJob(path);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_TRUE(MessageDifferencer::Equals(job, *read));
  EXPECT_THAT(std::string(SaveJob(job, "/nonexistent/x").message()), HasSubstr("/nonexistent"));
}

TEST(Job, FindsGroups) {
  JobConfig job = Good();
  job.add_groups()->set_name("gamma");
  EXPECT_EQ(*FindGroup(job, "beta"), 1);
  const absl::Status status = FindGroup(job, "delta").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("alpha, beta, gamma"));
}

TEST(Job, NamesItsFiles) {
  JobConfig job = Good();
  job.mutable_model()->set_archive_dir("out/models");
  EXPECT_EQ(ArchivePath(job, 0), "out/models/alpha.pt");
  EXPECT_EQ(WeightsPath(job, 1), "out/models/beta.safetensors");
  EXPECT_EQ(TensorListPath(job, 1), "out/models/beta.tensors.textproto");
  EXPECT_EQ(CheckpointDirectory(job, 0), "");
  job.mutable_checkpoint()->set_directory("/ck");
  EXPECT_EQ(CheckpointDirectory(job, 0), "/ck/alpha");
  EXPECT_EQ(RunId(job), "job");
  job.set_run_id("run-1");
  EXPECT_EQ(RunId(job), "run-1");
}

}  // namespace
}  // namespace codistill
