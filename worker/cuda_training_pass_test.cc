// A step on the first CUDA device, loss included, against the same step on the host. Needs a device
// and a program that is built for it; skips, saying what is missing.

#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/model/test_archive.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "worker/training_pass.h"

namespace codistill {
namespace {

using testing::HasSubstr;

constexpr int kRows = 16;
constexpr int kClasses = 7;

class CudaTrainingPassTest : public testing::Test {
 protected:
  struct Outcome {
    absl::Status status;
    TrainingPass::Result result;
    std::map<int, std::vector<float>> gradients;
  };

  CudaTrainingPassTest() {
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
        "model { inputs { name: 'x' shape: 12 } num_outputs: 7 label_smoothing: 0.1 }"
        "codistillation { temperature: 2 } groups { name: 'alpha' }",
        &job_));
    archive_ = ExportForTest("m", "mlp", {"in_features=12", "hidden=32", "num_classes=7"});
    std::vector<int64_t> labels;
    for (int i = 0; i < kRows; ++i) labels.push_back(i % kClasses);
    labels_ = Int64Tensor({kRows}, labels);
  }

  Outcome Run(const std::string& device) {
    Outcome out;
    Model::Options options;
    options.archive = archive_ + "/m.pt";
    options.config = job_.model();
    options.device = device;
    const auto model = Model::Load(options);
    out.status = model.status();
    if (!model.ok()) return out;
    TrainingPass::Options pass_options;
    pass_options.job = job_;
    pass_options.model = model->get();
    const auto pass = TrainingPass::Create(pass_options);
    out.status = pass.status();
    if (!pass.ok()) return out;
    BatchPipeline::Step step;
    step.assignment.set_step(3);
    step.assignment.set_teacher_weight(predictions_.teachers() > 0 ? 0.5f : 0);
    step.batch.examples = step.batch.rows = kRows;
    step.batch.labels = labels_;
    Model::States states;
    const auto result = (*pass)->Run(
        step, {RandomFloats({kRows, 12}, 1)}, &states,
        [&]() -> absl::StatusOr<const TeacherPredictions*> { return &predictions_; },
        [&]() -> Model::OnGradient {
          return [&](int index, const float* data, std::shared_ptr<const void>) {
            const int64_t n = (*model)->storage()[index].elements();
            out.gradients[index] = std::vector<float>(data, data + n);
          };
        });
    out.status = result.status();
    if (result.ok()) out.result = *result;
    return out;
  }

  void ExpectSame(const Outcome& got, const Outcome& want) {
    ASSERT_TRUE(got.status.ok() && want.status.ok()) << got.status << want.status;
    EXPECT_EQ(got.result.used_teacher, want.result.used_teacher);
    EXPECT_EQ(got.result.sums.counted_rows, want.result.sums.counted_rows);
    EXPECT_NEAR(got.result.sums.label_loss_sum, want.result.sums.label_loss_sum, 1e-3);
    EXPECT_NEAR(got.result.sums.teacher_loss_sum, want.result.sums.teacher_loss_sum, 1e-3);
    ASSERT_EQ(got.gradients.size(), want.gradients.size());
    for (const auto& [index, gradient] : want.gradients) {
      const std::vector<float>& mine = got.gradients.at(index);
      ASSERT_EQ(mine.size(), gradient.size());
      for (size_t i = 0; i < gradient.size(); ++i) EXPECT_NEAR(mine[i], gradient[i], 1e-4);
    }
  }

  JobConfig job_;
  std::string archive_;
  Tensor labels_;
  TeacherPredictions predictions_;
};

#define CODISTILL_NEEDS_DEVICE(outcome) \
  if (absl::IsFailedPrecondition((outcome).status)) GTEST_SKIP() << (outcome).status.message()

TEST_F(CudaTrainingPassTest, LabelsTeachSameAsOnTheHost) {
  const Outcome got = Run("cuda:0");
  CODISTILL_NEEDS_DEVICE(got);
  ExpectSame(got, Run("cpu"));
}

TEST_F(CudaTrainingPassTest, TeachersTeachTheSameAndThoseWhoHaveDivergedAreLeftOut) {
  for (int i = 0; i < 2; ++i) predictions_.logits.push_back(RandomFloats({kRows, kClasses}, 5 + i));
  Outcome got = Run("cuda:0");
  CODISTILL_NEEDS_DEVICE(got);
  ExpectSame(got, Run("cpu"));
  EXPECT_TRUE(got.result.used_teacher);

  predictions_.logits[1].As<float>()[9] = std::nanf("");
  got = Run("cuda:0");
  ExpectSame(got, Run("cpu"));
  EXPECT_FALSE(got.result.used_teacher);
}

TEST_F(CudaTrainingPassTest, ABadLabelIsAnErrorThatNamesIt) {
  labels_.As<int64_t>()[4] = 70;
  const Outcome got = Run("cuda:0");
  CODISTILL_NEEDS_DEVICE(got);
  EXPECT_TRUE(absl::IsInvalidArgument(got.status)) << got.status;
  EXPECT_THAT(std::string(got.status.message()), HasSubstr("70"));
}

}  // namespace
}  // namespace codistill
