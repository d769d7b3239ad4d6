// The jobs of deploy/jobs: valid, and, where the real data are at hand, in agreement with them.

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/config/embedding.h"
#include "common/config/job.h"
#include "common/config/teachers.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/data/dataset.h"
#include "worker/data/test_files.h"

namespace codistill {
namespace {

constexpr char kJobs[] = "deploy/jobs";

std::vector<std::string> JobFiles() {
  const auto names = FileSystem::Real()->ListDir(kJobs);
  std::vector<std::string> files;
  for (const std::string& name : names.ok() ? *names : std::vector<std::string>()) {
    if (absl::EndsWith(name, ".textproto")) files.push_back(name);
  }
  return files;
}

class Jobs : public testing::TestWithParam<std::string> {
 protected:
  JobConfig Load() const {
    auto job = LoadJob(JoinPath(kJobs, GetParam()));
    EXPECT_TRUE(job.ok()) << job.status();
    return job.ok() ? *std::move(job) : JobConfig();
  }
};

TEST_P(Jobs, AreValidAndNamedAsTheirFiles) {
  const JobConfig job = Load();
  EXPECT_EQ(absl::StrCat(job.name(), ".textproto"), GetParam());
  // Somebody learns from somebody else, on one side or on both.
  EXPECT_TRUE(HasTeachers(job));
}

TEST_P(Jobs, SayWhatTheyAre) {
  const auto text = ReadFile(JoinPath(kJobs, GetParam()), 1 << 20);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_TRUE(absl::StartsWith(*text, "# proto-file: proto/job.proto\n"));
  EXPECT_THAT(*text, testing::HasSubstr("# Data: "));
  EXPECT_THAT(*text, testing::HasSubstr(absl::StrCat("codistillctl run deploy/jobs/", GetParam())));
}

TEST_P(Jobs, AgreeWithTheirData) {
  const JobConfig job = Load();
  std::string data_dir;
  if (!job.data().train().has_synthetic()) {
    data_dir = RealData(job.name());
    if (data_dir.empty()) {
      GTEST_SKIP() << "no folder " << job.name()
                   << " with the real data: set --test_env=CODISTILL_DATA=/path/to/the/data";
    }
  }
  const int last = job.groups_size() - 1;
  for (const bool training : {true, false}) {
    DatasetOptions options;
    options.job = &job;
    options.training = training;
    options.group = training ? last : 0;
    options.data_dir = data_dir;
    options.threads = 2;
    const auto dataset = CreateDataset(options);
    ASSERT_TRUE(dataset.ok()) << dataset.status();
    std::cout << (*dataset)->summary() << "\n";
    Batch batch;
    const ExampleOrder order = TrainingOrder(job, last, **dataset);
    const absl::Status status =
        (*dataset)->Fill(order.Range(0, job.training().batch_size()), &batch);
    ASSERT_TRUE(status.ok()) << status;
    for (const ModelInput& input : job.model().inputs()) {
      EXPECT_NE(batch.field(InputField(input)), nullptr) << input.name();
    }
    // The network's tables are as large as the columns' indices.
    for (const ModelExport::Option& option : job.model().export_().options()) {
      if (option.key() != "cardinalities") continue;
      EXPECT_THAT((*dataset)->summary(),
                  testing::EndsWith("categorical indices: " + option.value()));
    }
    // Steps between evaluations see more than a single batch, and no more than there is.
    EXPECT_LE(job.evaluation().max_examples(), (*dataset)->size());
  }
}

INSTANTIATE_TEST_SUITE_P(All, Jobs, testing::ValuesIn(JobFiles()),
                         [](const testing::TestParamInfo<std::string>& info) {
                           return info.param.substr(0, info.param.find('.'));
                         });

TEST(JobFiles, AreThere) {
  EXPECT_THAT(JobFiles(), testing::IsSupersetOf({"adult.textproto", "cifar10.textproto",
                                                 "offline_distillation.textproto",
                                                 "quickstart.textproto", "wikitext2.textproto"}));
}

}  // namespace
}  // namespace codistill
