// The loss on a CUDA device.

#include <cuda_runtime_api.h>

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/device.h"
#include "common/base/status.h"
#include "common/model/cuda_errors.h"
#include "cuda/loss_cuda.h"
#include "worker/batch_loss.h"

namespace codistill {
namespace {

class DeviceLoss final : public BatchLoss {
 public:
  DeviceLoss(LossOptions options, Model* model) : options_(std::move(options)), model_(model) {}

  absl::StatusOr<Tensor> Begin(const LossInputs& inputs, const Tensor& logits) override {
    CODISTILL_RETURN_IF_ERROR(Here());
    kept_.clear();
    teachers_.clear();
    topk_teachers_.clear();
    inputs_ = inputs;
    inputs_.logits = logits.data();
    kept_.push_back(logits);
    const int64_t rows = inputs.rows;
    const int64_t elements = rows * inputs.classes;
    CODISTILL_RETURN_IF_ERROR(Send(DT_INT64, rows, &inputs_.labels));
    CODISTILL_RETURN_IF_ERROR(Send(DT_FLOAT, elements, &inputs_.targets));
    CODISTILL_RETURN_IF_ERROR(Send(DT_FLOAT, inputs.classes, &inputs_.label_prior));
    CODISTILL_RETURN_IF_ERROR(Send(DT_FLOAT, rows, &inputs_.row_weights));
    // Teachers travel to the device in the format in which they came.
    if (inputs.teacher_weight > 0) {
      for (DenseTeacher teacher : inputs.teachers) {
        const auto* bytes = static_cast<const uint8_t*>(teacher.values);
        CODISTILL_RETURN_IF_ERROR(
            Send(DT_UINT8, elements * static_cast<int64_t>(BytesOf(teacher.format)), &bytes));
        teacher.values = bytes;
        CODISTILL_RETURN_IF_ERROR(Send(DT_FLOAT, rows, &teacher.scale));
        teachers_.push_back(teacher);
      }
      for (TopKTeacher teacher : inputs.topk_teachers) {
        CODISTILL_RETURN_IF_ERROR(Send(DT_INT32, rows * teacher.k, &teacher.index));
        CODISTILL_RETURN_IF_ERROR(Send(DT_FLOAT, rows * teacher.k, &teacher.value));
        CODISTILL_RETURN_IF_ERROR(Send(DT_FLOAT, rows, &teacher.tail));
        topk_teachers_.push_back(teacher);
      }
    }
    inputs_.teachers = teachers_;
    inputs_.topk_teachers = topk_teachers_;

    CODISTILL_ASSIGN_OR_RETURN(Tensor gradient, model_->Allocate(logits.dtype(), logits.shape()));
    CODISTILL_ASSIGN_OR_RETURN(
        workspace_,
        model_->Allocate(DT_UINT8, {static_cast<int64_t>(CudaLossWorkspaceBytes(inputs_))}));
    CODISTILL_RETURN_IF_ERROR(
        Named(LaunchLoss(options_, inputs_, gradient.data(), workspace_.data(), model_->stream())));
    return gradient;
  }

  bool asynchronous() const override { return true; }

  absl::Status End(LossOutputs* outputs) override {
    CODISTILL_RETURN_IF_ERROR(Here());
    const absl::Status status =
        Named(FinishLoss(options_, inputs_, workspace_.data(), model_->stream(), outputs));
    kept_.clear();
    workspace_ = Tensor();
    return status;
  }

 private:
  // Replaces an array of the host by a copy on the device; null stays null.
  template <typename T>
  absl::Status Send(DataType dtype, int64_t count, const T** array) {
    if (*array == nullptr || count == 0) return absl::OkStatus();
    // What is copied from is read before ToDevice returns.
    const Tensor view = Tensor::Adopt(dtype, {count}, const_cast<T*>(*array), nullptr);
    CODISTILL_ASSIGN_OR_RETURN(Tensor sent, model_->ToDevice(view));
    *array = static_cast<const T*>(sent.data());
    kept_.push_back(std::move(sent));
    return absl::OkStatus();
  }

  // The kernels are launched on the calling thread's device.
  absl::Status Here() const {
    const cudaError_t error = cudaSetDevice(model_->device());
    if (error == cudaSuccess) return absl::OkStatus();
    return Named(absl::InternalError(
        absl::StrCat(cudaGetErrorName(error), " (", cudaGetErrorString(error), ")")));
  }

  // The kernels' launchers know the device's errors by CUDA's names, not what they mean.
  absl::Status Named(const absl::Status& status) const {
    if (!absl::IsInternal(status)) return status;
    const absl::Status meaning = CudaStatus(status.message());
    if (meaning.ok()) return status;
    if (IsDeviceLost(meaning)) ReportDeviceLost(meaning);
    return AnnotateDevice(meaning, "the loss", DeviceName(model_->device()));
  }

  const LossOptions options_;
  Model* const model_;
  // Of the last Begin:
  LossInputs inputs_;  // on the device
  std::vector<DenseTeacher> teachers_;
  std::vector<TopKTeacher> topk_teachers_;
  std::vector<Tensor> kept_;  // memory of the device
  Tensor workspace_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<BatchLoss>> CreateDeviceLoss(LossOptions options, Model* model) {
  return std::make_unique<DeviceLoss>(std::move(options), model);
}

}  // namespace codistill
