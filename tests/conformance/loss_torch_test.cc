#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/loss.h"
#include "cuda/loss_combinations.h"
#include "cuda/loss_testing.h"
#include "gtest/gtest.h"
#include "tests/conformance/torch_loss.h"

namespace codistill {
namespace {

// The kernel's gradient and libtorch's, both computed in float32: each element to 1e-5 of itself,
// where logits and hence gradients are bfloat16 to 1e-2. The floor is 1e-5 of the terms that make
// up a row's gradient, which may cancel.
TEST(LossTorchTest, AgreesWithTheCompositeOverAllCombinations) {
  uint64_t seed = 500;
  for (const LossCombination& combination : AllLossCombinations()) {
    SCOPED_TRACE(combination.name);
    const bool narrow = combination.logits_format == NumberFormat::kBfloat16;
    for (int64_t classes : {11, 257}) {
      SCOPED_TRACE(classes);
      const CombinationBatch batch(combination, 8, classes, 2.0, ++seed);
      const LossInputs& inputs = batch.inputs();
      const AnyResult ours = ComputeAny(combination.options, inputs, 2);
      ASSERT_TRUE(ours.status.ok()) << ours.status;
      const TorchLoss torch = ComputeTorchLoss(combination.options, inputs);
      const LossSums& sums = ours.outputs.sums;
      EXPECT_NEAR(sums.label_loss_sum, torch.label_loss_sum,
                  1e-5 * (std::abs(torch.label_loss_sum) + sums.weight_sum));
      const double t2 = combination.options.temperature * combination.options.temperature;
      EXPECT_NEAR(sums.teacher_loss_sum, torch.teacher_loss_sum,
                  1e-5 * (std::abs(torch.teacher_loss_sum) + t2 * sums.weight_sum));
      const double relative = narrow ? 1e-2 : 1e-5;
      const double floor =
          1e-5 * (1 + inputs.teacher_weight * combination.options.temperature) / sums.weight_sum;
      for (int64_t i = 0; i < inputs.rows * classes; ++i) {
        ASSERT_NEAR(ours.gradient(inputs, i), torch.gradient[i],
                    relative * std::abs(torch.gradient[i]) + floor)
            << "row " << i / classes << " class " << i % classes;
      }
    }
  }
}

}  // namespace
}  // namespace codistill
