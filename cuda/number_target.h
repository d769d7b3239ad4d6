// Where a kernel on the CPU writes numbers that it has computed in single precision.

#ifndef CODISTILL_CUDA_NUMBER_TARGET_H_
#define CODISTILL_CUDA_NUMBER_TARGET_H_

#include <cstdint>

#include "cuda/number_format.h"

namespace codistill {

struct NumberTarget {
  void* data = nullptr;
  NumberFormat format = NumberFormat::kFloat32;  // or kFloat16, kBfloat16
};

// Writes n numbers at element `begin` of the target, rounded to nearest, ties to even.
void StoreNumbers(const float* from, int64_t n, const NumberTarget& to, int64_t begin);

}  // namespace codistill

#endif  // CODISTILL_CUDA_NUMBER_TARGET_H_
