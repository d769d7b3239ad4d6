// In place of cuda_device.cc in programs that are built without CUDA.

#include "absl/strings/str_cat.h"
#include "common/base/device.h"
#include "common/model/model_device.h"

namespace codistill::internal {

absl::StatusOr<std::unique_ptr<ModelDevice>> OpenCudaDevice(int ordinal) {
  return absl::FailedPreconditionError(absl::StrCat(
      "device ", DeviceName(ordinal),
      ": this program is built for the CPU only; a build with "
      "--config=cuda and with LIBTORCH naming a libtorch for CUDA (docs/gpu.md), or cpu, would be "
      "right"));
}

}  // namespace codistill::internal
