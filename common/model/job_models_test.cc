#include "common/model/job_models.h"

#include <string>
#include <utility>

#include "common/model/test_archive.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::HasSubstr;

// Two archives, `old` twice as a teacher, their average, and a teacher elsewhere.
JobModels::Options Job() {
  static const std::string* const folder = new std::string(
      ExportForTest("old", "mlp", {"in_features=2", "hidden=", "num_classes=3"}, 1));
  static const std::string* const other = new std::string(
      ExportForTest("older", "mlp", {"in_features=2", "hidden=4", "num_classes=3"}, 2));
  JobModels::Options options;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
      R"pb(model {
             inputs { name: "x" shape: 2 }
             num_outputs: 3
           }
           groups { name: "student" }
           teachers {
             name: "old"
             frozen {}
           }
           teachers {
             name: "older"
             frozen {}
           }
           teachers {
             name: "both"
             ensemble { members: "old" members: "older" average: LOGITS }
           }
           teachers {
             name: "far"
             external {}
           })pb",
      &options.job));
  options.job.mutable_teachers(0)->mutable_frozen()->set_archive(*folder + "/old.pt");
  options.job.mutable_teachers(1)->mutable_frozen()->set_archive(*other + "/older.pt");
  return options;
}

TEST(JobModelsTest, AnEnsembleAveragesWhatItsMembersSay) {
  const JobModels::Options options = Job();
  JobModels models(options);
  const Tensor x = FloatTensor({2, 2}, {1, -2, 0.5, 3});
  std::vector<Tensor> logits;
  for (const char* name : {"old", "older", "both"}) {
    const auto model = models.Follow(*FindModel(options.job, name));
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_EQ(*models.Follow(*FindModel(options.job, name)), *model) << "it is loaded once";
    const auto snapshot = (*model)->Get();
    ASSERT_TRUE(snapshot.ok()) << snapshot.status();
    auto said = (*snapshot)->model->Predict({x}, nullptr);
    ASSERT_TRUE(said.ok()) << said.status();
    ASSERT_EQ(said->rows, 2);
    logits.push_back(said->values);
  }
  for (int i = 0; i < 6; ++i) {
    const float mean = (logits[0].As<float>()[i] + logits[1].As<float>()[i]) / 2;
    EXPECT_NEAR(logits[2].As<float>()[i], mean, 1e-6);
  }
}

TEST(JobModelsTest, ErrorsNameTheModel) {
  JobModels::Options options = Job();
  options.job.mutable_teachers(1)->mutable_frozen()->set_archive("/nonexistent/older.pt");
  JobModels models(options);
  const auto both = models.Follow(*FindModel(options.job, "both"));
  EXPECT_EQ(both.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(both.status().message()), HasSubstr("both: older: "));
  EXPECT_THAT(std::string(both.status().message()), HasSubstr("/nonexistent/older.pt"));
  const auto far = models.Follow(*FindModel(options.job, "far"));
  EXPECT_EQ(far.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(far.status().message()), HasSubstr("far: an external teacher"));
}

}  // namespace
}  // namespace codistill
