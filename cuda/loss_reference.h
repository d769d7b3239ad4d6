// The loss as its definition reads: in double precision, without any care for speed. Only for
// tests.

#ifndef CODISTILL_CUDA_LOSS_REFERENCE_H_
#define CODISTILL_CUDA_LOSS_REFERENCE_H_

#include <vector>

#include "absl/types/span.h"
#include "cuda/loss.h"

namespace codistill {

struct ReferenceLoss {
  std::vector<double> gradient;  // [rows, classes]
  LossSums sums;
};

// Inputs must be valid. `logits`, [rows, classes], take the place of those of `inputs` where given:
// numbers between those that a float has, for differences.
ReferenceLoss ComputeLossReference(const LossOptions& options, const LossInputs& inputs,
                                   absl::Span<const double> logits = {});

}  // namespace codistill

#endif  // CODISTILL_CUDA_LOSS_REFERENCE_H_
