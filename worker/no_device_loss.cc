// In place of device_loss.cc in programs that are built without CUDA.

#include "absl/strings/str_cat.h"
#include "common/base/device.h"
#include "worker/batch_loss.h"

namespace codistill {

absl::StatusOr<std::unique_ptr<BatchLoss>> CreateDeviceLoss(LossOptions, Model* model) {
  return absl::FailedPreconditionError(
      absl::StrCat("device ", DeviceName(model->device()), ": the loss is built for the CPU only"));
}

}  // namespace codistill
