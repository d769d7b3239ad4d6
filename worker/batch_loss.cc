#include "worker/batch_loss.h"

#include <utility>

#include "common/base/device.h"

namespace codistill {
namespace {

class HostLoss final : public BatchLoss {
 public:
  HostLoss(LossOptions options, int threads) : options_(std::move(options)), threads_(threads) {}

  absl::StatusOr<Tensor> Begin(const LossInputs& inputs, const Tensor& logits) override {
    if (gradient_.empty() || gradient_.dtype() != logits.dtype() ||
        gradient_.shape() != logits.shape()) {
      gradient_ = Tensor::Allocate(logits.dtype(), logits.shape());
    }
    LossInputs whole = inputs;
    whole.logits = logits.data();
    outputs_ = LossOutputs();
    outputs_.gradient = gradient_.data();
    status_ = ComputeLossCpu(options_, whole, &outputs_, threads_);
    return gradient_;
  }
  absl::Status End(LossOutputs* outputs) override {
    *outputs = outputs_;
    return status_;
  }

 private:
  const LossOptions options_;
  const int threads_;
  Tensor gradient_;  // reused
  LossOutputs outputs_;
  absl::Status status_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<BatchLoss>> BatchLoss::Create(LossOptions options, Model* model,
                                                             int threads) {
  if (model->device() != kHostDevice) return CreateDeviceLoss(std::move(options), model);
  return std::make_unique<HostLoss>(std::move(options), threads);
}

}  // namespace codistill
