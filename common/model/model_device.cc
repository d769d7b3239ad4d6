#include "common/model/model_device.h"

#include <utility>

#include "common/base/device.h"
#include "common/model/torch_support.h"

namespace codistill::internal {
namespace {

class HostDevice final : public ModelDevice {
 public:
  at::Tensor Take(const Tensor& input) override { return ToTorch(input); }
  at::Tensor Send(const Tensor& tensor) override { return ToTorch(tensor); }
  Tensor Adopt(const at::Tensor& tensor) override { return FromTorch(tensor); }
  Tensor Bring(const at::Tensor& tensor) override { return FromTorch(tensor); }

  absl::Status BeginGradients(const Model::OnGradient* on_gradient) override {
    on_gradient_ = on_gradient;
    return absl::OkStatus();
  }
  void Deliver(int index, at::Tensor gradient) override {
    auto owner = std::make_shared<at::Tensor>(std::move(gradient));
    const float* data = owner->data_ptr<float>();
    (*on_gradient_)(index, data, std::move(owner));
  }
  absl::Status EndGradients() override { return absl::OkStatus(); }

 private:
  const Model::OnGradient* on_gradient_ = nullptr;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ModelDevice>> ModelDevice::Open(int ordinal) {
  if (ordinal != kHostDevice) return OpenCudaDevice(ordinal);
  return std::make_unique<HostDevice>();
}

}  // namespace codistill::internal
