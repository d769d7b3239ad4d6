// What a training pass does with a loss that is queued on a device and found out about later, shown
// with one that only pretends to.

#include "worker/batch_loss.h"

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "common/model/test_archive.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "worker/loss_options.h"
#include "worker/testing/linear_model.h"
#include "worker/training_pass.h"

namespace codistill {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// The host's loss, as late as a device's.
class LateLoss final : public BatchLoss {
 public:
  LateLoss(const JobConfig& job, Model* model, std::vector<std::string>* calls)
      : loss_(*BatchLoss::Create(LossOptionsOf(job), model, 1)), calls_(calls) {}

  absl::StatusOr<Tensor> Begin(const LossInputs& inputs, const Tensor& logits) override {
    calls_->push_back(inputs.teacher_weight > 0 ? "begin with teachers" : "begin");
    if (!lost_.ok()) return lost_;
    return loss_->Begin(inputs, logits);
  }
  absl::Status End(LossOutputs* outputs) override {
    calls_->push_back("end");
    return loss_->End(outputs);
  }
  bool asynchronous() const override { return true; }

  void set_lost(absl::Status status) { lost_ = std::move(status); }

 private:
  const std::unique_ptr<BatchLoss> loss_;
  std::vector<std::string>* const calls_;
  absl::Status lost_;
};

class BatchLossTest : public testing::Test {
 protected:
  BatchLossTest() : model_(3, 2, /*recurrent=*/false) {
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
        "model { inputs { name: 'x' shape: 3 } num_outputs: 2 } groups { name: 'alpha' }",
        &options_.job));
    options_.model = &model_;
    step_.assignment.set_step(7);
    step_.batch.examples = step_.batch.rows = 4;
    step_.batch.labels = Int64Tensor({4}, {0, 1, 0, 1});
  }

  absl::StatusOr<TrainingPass::Result> Run(BatchLoss* loss) {
    options_.loss = loss;
    calls_.clear();
    gradients_.clear();
    auto pass = TrainingPass::Create(options_);
    EXPECT_TRUE(pass.ok()) << pass.status();
    step_.assignment.set_teacher_weight(predictions_.teachers() > 0 ? 0.5f : 0);
    Model::States states;
    return (*pass)->Run(
        step_, {RandomFloats({4, 3}, 1)}, &states,
        [&]() -> absl::StatusOr<const TeacherPredictions*> { return &predictions_; },
        [&]() -> Model::OnGradient {
          calls_.push_back("gradients");
          return [&](int index, const float* data, std::shared_ptr<const void>) {
            gradients_.insert(gradients_.end(), data, data + (index == 0 ? 6 : 2));
          };
        });
  }

  LinearModel model_;
  TrainingPass::Options options_;
  BatchPipeline::Step step_;
  TeacherPredictions predictions_;
  std::vector<std::string> calls_;
  std::vector<float> gradients_;
};

TEST_F(BatchLossTest, IsFoundOutAboutWhenTheBackwardPassIsUnderWay) {
  const auto want = Run(nullptr);
  ASSERT_TRUE(want.ok()) << want.status();
  const std::vector<float> gradients = gradients_;
  LateLoss loss(options_.job, &model_, &calls_);
  const auto got = Run(&loss);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_THAT(calls_, ElementsAre("begin", "gradients", "end"));
  EXPECT_EQ(got->sums.label_loss_sum, want->sums.label_loss_sum);
  EXPECT_EQ(gradients_, gradients);

  options_.job.mutable_training()->set_micro_batches(2);
  ASSERT_TRUE(Run(&loss).ok());
  EXPECT_THAT(calls_, ElementsAre("begin", "end", "begin", "gradients", "end"));
}

TEST_F(BatchLossTest, ABadLabelIsAnErrorBeforeThePushEnds) {
  LateLoss loss(options_.job, &model_, &calls_);
  step_.batch.labels.As<int64_t>()[2] = 5;
  const auto got = Run(&loss);
  EXPECT_TRUE(absl::IsInvalidArgument(got.status())) << got.status();
  EXPECT_THAT(std::string(got.status().message()), HasSubstr("step 7"));
  EXPECT_THAT(std::string(got.status().message()), HasSubstr("5"));
  EXPECT_THAT(calls_, ElementsAre("begin", "gradients", "end"));
}

TEST_F(BatchLossTest, WithTeachersItIsKnownBeforeAnyGradientLeaves) {
  predictions_.logits.push_back(FloatTensor({4, 2}, {1, 2, 3, 4, 5, 6, 7, 8}));
  LateLoss loss(options_.job, &model_, &calls_);
  auto got = Run(&loss);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_TRUE(got->used_teacher);
  EXPECT_THAT(calls_, ElementsAre("begin with teachers", "end", "gradients"));

  predictions_.logits[0].As<float>()[3] = std::nanf("");
  got = Run(&loss);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_FALSE(got->used_teacher);
  EXPECT_TRUE(got->finite);
  EXPECT_THAT(calls_, ElementsAre("begin with teachers", "end", "begin", "gradients", "end"));
  for (const float gradient : gradients_) EXPECT_TRUE(std::isfinite(gradient));
}

TEST_F(BatchLossTest, ADevicesErrorIsNotBlamedOnTheTeachers) {
  predictions_.logits.push_back(FloatTensor({4, 2}, {1, 2, 3, 4, 5, 6, 7, 8}));
  LateLoss loss(options_.job, &model_, &calls_);
  loss.set_lost(absl::UnavailableError("cudaErrorECCUncorrectable"));
  const auto got = Run(&loss);
  EXPECT_TRUE(absl::IsUnavailable(got.status())) << got.status();
  EXPECT_THAT(calls_, ElementsAre("begin with teachers"));
}

// Says that it computes somewhere else.
class ElsewhereModel final : public LinearModel {
 public:
  ElsewhereModel() : LinearModel(3, 2, /*recurrent=*/false) {}
  int device() const override { return 5; }
};

TEST_F(BatchLossTest, ModelsOfDevicesNeedALossThere) {
  ElsewhereModel model;
  const auto loss = BatchLoss::Create(LossOptionsOf(options_.job), &model, 1);
#ifdef CODISTILL_CUDA
  EXPECT_TRUE(loss.ok()) << loss.status();
#else
  EXPECT_TRUE(absl::IsFailedPrecondition(loss.status()));
  EXPECT_THAT(std::string(loss.status().message()), HasSubstr("cuda:5"));
#endif
}

}  // namespace
}  // namespace codistill
