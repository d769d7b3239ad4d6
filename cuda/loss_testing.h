#ifndef CODISTILL_CUDA_LOSS_TESTING_H_
#define CODISTILL_CUDA_LOSS_TESTING_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "common/tensor/bfloat16.h"
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

// Instruction sets are a parameter of tests: all that this processor has and the kernels are
// compiled for.
inline std::vector<int64_t> LossTargets() {
  std::vector<int64_t> targets;
  for (int64_t target : {HWY_AVX3, HWY_AVX2, HWY_SSE4, HWY_NEON, HWY_EMU128, HWY_SCALAR}) {
    if (hwy::SupportedTargets() & HWY_TARGETS & target) targets.push_back(target);
  }
  return targets;
}

class LossTargetTest : public ::testing::TestWithParam<int64_t> {
 protected:
  LossTargetTest() { hwy::SetSupportedTargetsForTest(GetParam()); }
  ~LossTargetTest() override { hwy::SetSupportedTargetsForTest(0); }
};

// Bytes of the gradient that ComputeLossCpu writes, whatever its format; fails the test where it
// writes past the end.
struct AnyResult {
  absl::Status status;
  std::vector<char> bytes;
  LossOutputs outputs;

  // Element i as a number.
  double gradient(const LossInputs& inputs, int64_t i) const {
    if (inputs.logits_format == NumberFormat::kFloat32) {
      return reinterpret_cast<const float*>(bytes.data())[i];
    }
    return FromBfloat16(reinterpret_cast<const uint16_t*>(bytes.data())[i]);
  }
};

inline AnyResult ComputeAny(const LossOptions& options, const LossInputs& inputs, int threads = 1) {
  AnyResult result;
  constexpr size_t kGuard = 64;
  const size_t size = inputs.rows * inputs.classes * BytesOf(inputs.logits_format);
  result.bytes.assign(size + kGuard, 77);
  result.outputs.gradient = result.bytes.data();
  result.status = ComputeLossCpu(options, inputs, &result.outputs, threads);
  for (size_t i = size; i < size + kGuard; ++i) EXPECT_EQ(result.bytes[i], 77);
  result.bytes.resize(size);
  return result;
}

// Without vectors, whole chunks are summed in few floats.
inline bool HasVectors() { return (hwy::SupportedTargets() & (HWY_EMU128 - 1)) != 0; }

}  // namespace codistill

#endif  // CODISTILL_CUDA_LOSS_TESTING_H_
