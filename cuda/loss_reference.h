// The loss as its definition reads: in double precision, without any care for speed. Only for
// tests.

#ifndef CODISTILL_CUDA_LOSS_REFERENCE_H_
#define CODISTILL_CUDA_LOSS_REFERENCE_H_

#include <vector>

#include "cuda/loss.h"

namespace codistill {

struct ReferenceLoss {
  std::vector<double> gradient;  // [rows, classes]
  LossSums sums;
};

// Inputs must be valid.
ReferenceLoss ComputeLossReference(const LossOptions& options, const LossInputs& inputs);

}  // namespace codistill

#endif  // CODISTILL_CUDA_LOSS_REFERENCE_H_
