#include "common/model/model.h"

#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>
#include <unistd.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/blas_kernels.h"
#include "common/base/device.h"
#include "common/base/status.h"
#include "common/model/inputs.h"
#include "common/model/mixed_precision.h"
#include "common/model/model_device.h"
#include "common/model/module_tensors.h"
#include "common/model/torch_model.h"
#include "common/model/torch_support.h"

namespace codistill {
namespace internal {
namespace {

// An archive with the weights of `model` compiled in.
class CompiledModel final : public Model {
 public:
  CompiledModel(std::shared_ptr<const Model> keep, const TorchModel* model,
                torch::jit::Module module)
      : keep_(std::move(keep)), model_(model), module_(std::move(module)) {}

  const TensorList& tensors() const override { return model_->tensors(); }
  absl::Span<const TensorView> storage() const override { return model_->storage(); }
  absl::StatusOr<Logits> Predict(absl::Span<const Tensor> inputs, States* states) const override {
    return model_->PredictWith(&module_, /*optimize=*/true, inputs, states);
  }
  absl::StatusOr<Logits> Forward(absl::Span<const Tensor>, States*, uint64_t) override {
    return absl::UnimplementedError("a compiled model is not trained");
  }
  absl::Status Backward(const Tensor&, const OnGradient&) override {
    return absl::UnimplementedError("a compiled model is not trained");
  }

 private:
  const std::shared_ptr<const Model> keep_;
  const TorchModel* const model_;
  mutable torch::jit::Module module_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const Model>> TorchModel::DoCompile(
    std::shared_ptr<const Model> self) const {
  if (options_.predict_precision != FP32 || device() != kHostDevice) {
    return absl::UnimplementedError(
        "only passes on the CPU, in fp32, can be compiled for their weights");
  }
  using Result = absl::StatusOr<std::shared_ptr<const Model>>;
  return CatchTorch(
      absl::StatusCode::kFailedPrecondition, Error("cannot be compiled"), [&]() -> Result {
        torch::NoGradGuard no_grad;
        // Loaded anew rather than cloned: the types of a clone would stay with those of the
        // original for ever.
        torch::jit::Module module = torch::jit::load(options_.archive, at::kCPU);
        CODISTILL_ASSIGN_OR_RETURN(ModuleTensors tensors, ModuleTensors::Collect(module));
        CODISTILL_RETURN_IF_ERROR(Annotate(tensors.View(tensors_), options_.archive));
        module.eval();
        torch::jit::GraphOptimizerEnabledGuard optimization(true);
        return std::make_shared<CompiledModel>(std::move(self), this,
                                               torch::jit::optimize_for_inference(module));
      });
}

}  // namespace internal

using internal::CatchTorch;
using internal::ModelDevice;
using internal::ModuleTensors;
using internal::TorchModel;

absl::StatusOr<std::unique_ptr<Model>> Model::Load(Options options) {
  CODISTILL_ASSIGN_OR_RETURN(const int ordinal, ParseDevice(options.device));
  if (options.threads < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads is ", options.threads, "; it must be at least 1"));
  }
  if (options.weight_sets < 1 || options.weight_sets > 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("weight_sets is ", options.weight_sets, "; it must be 1 or 2"));
  }
  CODISTILL_RETURN_IF_ERROR(CheckModelConfig(options.config));
  if (access(options.archive.c_str(), R_OK) != 0) {
    return absl::NotFoundError(absl::StrCat(options.archive, ": no such archive, or not readable"));
  }
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<ModelDevice> device, ModelDevice::Open(ordinal));
  AvoidTilesOfUnknownShape();
  internal::SetTorchThreads(options.threads);
  torch::jit::setGraphExecutorOptimize(false);
  CODISTILL_ASSIGN_OR_RETURN(
      torch::jit::Module module,
      CatchTorch(absl::StatusCode::kDataLoss,
                 absl::StrCat(options.archive, ": not a TorchScript archive"),
                 [&]() -> absl::StatusOr<torch::jit::Module> {
                   torch::jit::Module loaded = torch::jit::load(options.archive, at::kCPU);
                   loaded.train();
                   return loaded;
                 }));
  CODISTILL_ASSIGN_OR_RETURN(ModuleTensors tensors,
                             CatchTorch(absl::StatusCode::kInvalidArgument, options.archive,
                                        [&]() -> absl::StatusOr<ModuleTensors> {
                                          auto collected = ModuleTensors::Collect(module);
                                          if (!collected.ok())
                                            return Annotate(collected.status(), options.archive);
                                          return collected;
                                        }));
  if (options.weight_sets == 2) tensors.AddSet();
  CODISTILL_ASSIGN_OR_RETURN(
      std::unique_ptr<TorchModel> model,
      CatchTorch(absl::StatusCode::kInternal,
                 absl::StrCat(options.archive, ": cannot be brought to ", options.device),
                 [&]() -> absl::StatusOr<std::unique_ptr<TorchModel>> {
                   device->Hold(&tensors);
                   return std::make_unique<TorchModel>(std::move(options), std::move(device),
                                                       std::move(module), std::move(tensors));
                 }));
  CODISTILL_RETURN_IF_ERROR(model->CheckForward());
  return model;
}

absl::StatusOr<std::shared_ptr<const Model>> Model::Compile(std::shared_ptr<const Model> model) {
  const Model& self = *model;
  return self.DoCompile(std::move(model));
}

}  // namespace codistill
