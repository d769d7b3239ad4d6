// Model::Options::optimize_predict: passes with the JIT's graph optimisation say what passes
// without it say, whatever came before.

#include <memory>

#include "common/model/model.h"
#include "common/model/test_archive.h"
#include "common/model/testing/same_predictions.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

class OptimizedPredictTest : public testing::Test {
 protected:
  void Load(const TestedArchive& archive) {
    plain_ = LoadForTest(archive, false);
    optimized_ = LoadForTest(archive, true);
    ASSERT_TRUE(plain_ != nullptr && optimized_ != nullptr);
  }

  std::unique_ptr<Model> plain_, optimized_;
};

TEST_F(OptimizedPredictTest, GivesTheSameForEveryBatchSizeAndAfterTraining) {
  ASSERT_NO_FATAL_FAILURE(Load(ResNetForTest()));
  int seed = 0;
  for (const int64_t rows : {1, 1, 1, 7, 64, 1, 3}) {
    ExpectSameOfImages(*optimized_, *plain_, rows, ++seed);
    if (seed != 4) continue;
    // Training in between sets the running statistics of both, and does not disturb the rest.
    const Tensor images = RandomFloats({rows, 3, 32, 32}, seed);
    for (Model* model : {plain_.get(), optimized_.get()}) {
      const auto logits = model->Forward({images}, nullptr, 1);
      ASSERT_TRUE(logits.ok()) << logits.status();
      int gradients = 0;
      const auto count = [&](int, const float*, std::shared_ptr<const void>) { ++gradients; };
      ASSERT_TRUE(model->Backward(logits->values, count).ok());
      EXPECT_GT(gradients, 10);
    }
  }
}

// Weights change in place between versions; nothing of them may have been compiled in.
TEST_F(OptimizedPredictTest, SeesWeightsThatAreWritten) {
  ASSERT_NO_FATAL_FAILURE(Load(ResNetForTest()));
  for (int round = 1; round <= 4; ++round) {
    for (Model* model : {plain_.get(), optimized_.get()}) ScaleWeights(*model, 1.1f);
    ExpectSameOfImages(*optimized_, *plain_, 2, 5);
  }
}

TEST_F(OptimizedPredictTest, CarriesStatesAndTakesSeveralThreads) {
  ASSERT_NO_FATAL_FAILURE(Load(LstmForTest()));
  ExpectSameOfSequences(*optimized_, *plain_);
}

}  // namespace
}  // namespace codistill
