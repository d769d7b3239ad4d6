#ifndef CODISTILL_PREDSERVER_ROW_OUTPUTS_H_
#define CODISTILL_PREDSERVER_ROW_OUTPUTS_H_

#include <cstdint>

// The vector loops behind output_format.h, for the processor at hand.
namespace codistill::internal {

// Where probabilities go: FP32, or one of the two 16-bit types.
struct ProbabilityTarget {
  enum Type { kFloat, kHalf, kBfloat16 };
  Type type = kFloat;
  void* data = nullptr;
};

// All three return the first row with a logit that is not finite, -1 if there is none; what is
// written of that row and the rows after it is unspecified. Logits are [rows, columns], row-major;
// probabilities are those at `temperature`, before they are rounded to the target's type within
// 2e-6 relative (on a processor without fused multiply-add, 1.5e-7 more for every nat below 1).

int64_t SoftmaxRows(const float* logits, int64_t rows, int64_t columns, double temperature,
                    const ProbabilityTarget& to);

int64_t SigmoidRows(const float* logits, int64_t rows, int64_t columns, double temperature,
                    const ProbabilityTarget& to);

// The k largest (1 <= k <= columns) of each row: index and value [rows, k], and tail [rows]. Each
// target may have null data.
int64_t TopKRows(const float* logits, int64_t rows, int64_t columns, double temperature, int64_t k,
                 int32_t* index, const ProbabilityTarget& value, float* tail);

}  // namespace codistill::internal

#endif  // CODISTILL_PREDSERVER_ROW_OUTPUTS_H_
