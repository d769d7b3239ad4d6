// The k largest logits of every row as probabilities, and what all others have together: what a
// teacher says of 64 out of 24,000 classes. On the CPU; row_topk_cuda.h has the same on CUDA
// devices.

#ifndef CODISTILL_CUDA_ROW_TOPK_H_
#define CODISTILL_CUDA_ROW_TOPK_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "cuda/number_format.h"

namespace codistill {

struct RowTopKInputs {
  const float* logits = nullptr;  // [rows, classes]
  int64_t rows = 0;
  int64_t classes = 0;     // 1 to kMaxTopKClasses
  double temperature = 1;  // of the probabilities p = softmax(logits / temperature)
  int64_t k = 0;           // 1 to `classes`
};

// Each may be null: not wanted.
struct RowTopKOutputs {
  // [rows, k]: the classes of the k largest logits, in descending order, of equal ones the smaller
  // class first.
  int32_t* index = nullptr;
  // [rows, k]: their p in value_format, float32, float16 or bfloat16. Before rounding to it within
  // 2e-6 relative; in descending order.
  void* value = nullptr;
  NumberFormat value_format = NumberFormat::kFloat32;
  // [rows]: what the classes - k others have together, summed over them, so that it is neither
  // negative nor off where next to nothing is left.
  float* tail = nullptr;
};

constexpr int64_t kMaxTopKClasses = int64_t{1} << 31;  // an index is an int32

// INVALID_ARGUMENT names the argument at fault; for a logit that is not finite the first row that
// has one, which is also left in *not_finite_row (unless null; -1 otherwise): what has been written
// is then unspecified. Thread-safe; the same for any number of threads.
absl::Status RowTopKCpu(const RowTopKInputs& inputs, const RowTopKOutputs& outputs, int threads,
                        int64_t* not_finite_row = nullptr);

// The checks, shared with the CUDA twin.
absl::Status ValidateRowTopK(const RowTopKInputs& inputs, const RowTopKOutputs& outputs);
// What is said of a row with a logit that is not finite.
absl::Status TopKRowNotFinite(int64_t row);

}  // namespace codistill

#endif  // CODISTILL_CUDA_ROW_TOPK_H_
