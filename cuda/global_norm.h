// The norm over a list of tensors, and whether all of them are finite, from one pass over them:
// what clipping and the rejection of a spoilt step need. On the CPU; global_norm_cuda.h has the
// same on CUDA devices.

#ifndef CODISTILL_CUDA_GLOBAL_NORM_H_
#define CODISTILL_CUDA_GLOBAL_NORM_H_

#include <cmath>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace codistill {

struct FloatArray {
  const float* values = nullptr;
  int64_t size = 0;
};

struct GlobalNorm {
  // Over all tensors, in double: finite exactly when every element is.
  double sum_of_squares = 0;
  // The first tensor with an element that is not finite; -1 where there is none.
  int64_t first_not_finite = -1;

  double norm() const { return std::sqrt(sum_of_squares); }
};

// Sums in an order that depends on the sizes alone, so that the result is the same for any number
// of threads. INVALID_ARGUMENT names the tensor whose size or pointer is wrong. Thread-safe.
absl::Status GlobalNormCpu(absl::Span<const FloatArray> tensors, int threads, GlobalNorm* result);

// The checks, shared with the CUDA twin.
absl::Status ValidateGlobalNorm(absl::Span<const FloatArray> tensors);

}  // namespace codistill

#endif  // CODISTILL_CUDA_GLOBAL_NORM_H_
