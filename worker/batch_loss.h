#ifndef CODISTILL_WORKER_BATCH_LOSS_H_
#define CODISTILL_WORKER_BATCH_LOSS_H_

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/model.h"
#include "common/tensor/tensor.h"
#include "cuda/loss.h"

namespace codistill {

// The loss of a batch and its gradient with respect to the logits, computed where these are: on the
// host (ComputeLossCpu) or on the model's CUDA device (cuda/loss_cuda.h), where it is queued behind
// the forward pass, and the backward pass behind it, without anybody waiting. Used by one thread.
class BatchLoss {
 public:
  // `model` (not owned) says where. FAILED_PRECONDITION: on a device that this program is not built
  // for.
  static absl::StatusOr<std::unique_ptr<BatchLoss>> Create(LossOptions options, Model* model,
                                                           int threads);
  virtual ~BatchLoss() = default;

  // Begins to compute. `logits`: as Forward gave them, [rows, classes]; everything else in `inputs`
  // is the host's, and on the device the arrays may be let go of at once. The gradient has the
  // shape, type and place of the logits and lives as long as nobody calls Begin again. An error: as
  // far as it is known before the pass.
  virtual absl::StatusOr<Tensor> Begin(const LossInputs& inputs, const Tensor& logits) = 0;

  // What ComputeLossCpu says of the batch, and its sums. Waits for what is queued on the device; so
  // it is best called when the backward pass has been queued too. Once for each Begin.
  virtual absl::Status End(LossOutputs* outputs) = 0;

  // Whether Begin returns before the loss is known.
  virtual bool asynchronous() const { return false; }
};

// In device_loss.cc; no_device_loss.cc has none.
absl::StatusOr<std::unique_ptr<BatchLoss>> CreateDeviceLoss(LossOptions options, Model* model);

}  // namespace codistill

#endif  // CODISTILL_WORKER_BATCH_LOSS_H_
