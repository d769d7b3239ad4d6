#ifndef CODISTILL_COMMON_MODEL_MODEL_DEVICE_H_
#define CODISTILL_COMMON_MODEL_MODEL_DEVICE_H_

#include <torch/script.h>

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/model/model.h"
#include "common/model/module_tensors.h"
#include "common/tensor/tensor.h"

namespace codistill::internal {

// Where a model's passes are computed: what is different between the host, where everything is
// where it is wanted, and a CUDA device, to which weights and batches and from which gradients,
// buffers and logits are copied. For .cc files of common/model only. Where no Status is returned
// libtorch's exceptions are thrown. Used as the model is: one thread trains, several may predict.
class ModelDevice {
 public:
  // `ordinal`: as common/base/device.h. FAILED_PRECONDITION: the machine has no such device, or
  // this program is not built for it.
  static absl::StatusOr<std::unique_ptr<ModelDevice>> Open(int ordinal);
  virtual ~ModelDevice() = default;

  virtual at::Device device() const { return at::kCPU; }
  virtual void* stream() const { return nullptr; }  // Model::stream

  // While it lives, what the calling thread computes is queued where passes of training are, or
  // beside them, where those of several threads do not wait for one another.
  class Scope {
   public:
    virtual ~Scope() = default;
  };
  virtual std::unique_ptr<Scope> Train() { return nullptr; }
  virtual std::unique_ptr<Scope> Predict() { return nullptr; }

  // Brings all sets of weights to the device, once: the module then computes with what is there,
  // and `tensors` views memory of the host, from which WeightsWritten and UseWeights (of Model)
  // copy.
  virtual void Hold(ModuleTensors* /*tensors*/) {}
  virtual void WeightsWritten(int /*set*/) {}
  virtual void UseWeights(int /*set*/) {}

  // In a scope: an argument of forward(), as soon as the scope's stream comes to it.
  virtual at::Tensor Take(const Tensor& input) = 0;
  // In a scope: a copy on the device, which is under way while the scope's stream computes what has
  // been queued so far.
  virtual at::Tensor Send(const Tensor& tensor) = 0;
  virtual void Stage(absl::Span<const Tensor> /*inputs*/) {}  // Model::Stage
  // A tensor that lives on the device, without a copy.
  virtual Tensor Adopt(const at::Tensor& tensor) = 0;
  // In a scope: a copy in the host's memory, where that is not where the tensor is. Waits for it.
  virtual Tensor Bring(const at::Tensor& tensor) = 0;

  // Begins to copy the buffers back, and waits until they are.
  virtual void FetchBuffers() {}
  virtual void AwaitBuffers() {}

  // The gradients of one backward pass: each that is delivered, from whatever thread, is copied and
  // handed to `on_gradient`, in that order, before End returns. Deliver never waits.
  virtual absl::Status BeginGradients(const Model::OnGradient* on_gradient) = 0;
  virtual void Deliver(int index, at::Tensor gradient) = 0;  // dense fp32
  virtual absl::Status EndGradients() = 0;
};

// The ordinal's device, in cuda_device.cc; no_cuda_device.cc has none.
absl::StatusOr<std::unique_ptr<ModelDevice>> OpenCudaDevice(int ordinal);

}  // namespace codistill::internal

#endif  // CODISTILL_COMMON_MODEL_MODEL_DEVICE_H_
