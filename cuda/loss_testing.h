#ifndef CODISTILL_CUDA_LOSS_TESTING_H_
#define CODISTILL_CUDA_LOSS_TESTING_H_

#include <vector>

#include "absl/status/status.h"
#include "cuda/loss.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"

// For tests: what those of the loss have in common.
namespace codistill {

struct Result {
  absl::Status status;
  std::vector<float> gradient;
  LossOutputs outputs;
};

// A teacher of float32 logits.
inline DenseTeacher LogitsTeacher(const float* values) {
  DenseTeacher teacher;
  teacher.values = values;
  return teacher;
}

// ComputeLossCpu into memory of its own; fails the test where it writes past the end.
inline Result Compute(const LossOptions& options, const LossInputs& inputs, int threads = 1) {
  Result result;
  // One element too many, to see that nothing is written past the end.
  result.gradient.assign(inputs.rows * inputs.classes + 1, 1234.5f);
  result.outputs.gradient = result.gradient.data();
  result.status = ComputeLossCpu(options, inputs, &result.outputs, threads);
  EXPECT_EQ(result.gradient.back(), 1234.5f);
  result.gradient.pop_back();
  return result;
}

// Without vectors, whole chunks are summed in few floats.
inline bool HasVectors() { return (hwy::SupportedTargets() & (HWY_EMU128 - 1)) != 0; }

}  // namespace codistill

#endif  // CODISTILL_CUDA_LOSS_TESTING_H_
