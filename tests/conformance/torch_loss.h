#ifndef CODISTILL_TESTS_CONFORMANCE_TORCH_LOSS_H_
#define CODISTILL_TESTS_CONFORMANCE_TORCH_LOSS_H_

#include <vector>

#include "cuda/loss.h"

// The loss of cuda/loss.h as one writes it in libtorch: log_softmax, logsigmoid, sums, and autograd
// for the gradient. Shares no formula of a derivative with the kernels or their reference.
namespace codistill {

struct TorchLoss {
  double label_loss_sum = 0;
  double teacher_loss_sum = 0;
  std::vector<float> gradient;  // [rows, classes], through the logits' own format
};

// In float32; inputs must be valid, with at least one row that counts.
TorchLoss ComputeTorchLoss(const LossOptions& options, const LossInputs& inputs);

}  // namespace codistill

#endif  // CODISTILL_TESTS_CONFORMANCE_TORCH_LOSS_H_
