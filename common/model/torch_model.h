#ifndef CODISTILL_COMMON_MODEL_TORCH_MODEL_H_
#define CODISTILL_COMMON_MODEL_TORCH_MODEL_H_

#include <torch/script.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "common/base/mutex.h"
#include "common/model/model.h"
#include "common/model/model_device.h"
#include "common/model/module_tensors.h"

namespace codistill::internal {

// What forward() gave.
struct PassResult {
  at::Tensor logits;  // [rows, num_outputs], part of the graph if there is one
  std::vector<at::Tensor> states;
};

// An archive, where its passes are computed, and the pass under way. For .cc files of common/model
// only.
class TorchModel final : public Model {
 public:
  // `device` holds `tensors` already. May throw, as libtorch does.
  TorchModel(Options options, std::unique_ptr<ModelDevice> device, torch::jit::Module module,
             ModuleTensors tensors);

  const TensorList& tensors() const override { return tensors_.list(); }
  absl::Span<const TensorView> storage() const override { return tensors_.views(); }
  int weight_sets() const override { return tensors_.sets(); }
  absl::Span<const TensorView> storage(int set) const override { return tensors_.views(set); }
  absl::Status UseWeights(int set) override;
  absl::Status WeightsWritten(int set) override;

  int device() const override;
  void* stream() const override { return device_->stream(); }
  absl::StatusOr<Tensor> Allocate(DataType dtype, std::vector<int64_t> shape) override;
  absl::StatusOr<Tensor> ToDevice(const Tensor& tensor) override;
  absl::Status AwaitBuffers() override;
  void Stage(absl::Span<const Tensor> inputs) override { device_->Stage(inputs); }

  absl::StatusOr<Logits> Predict(absl::Span<const Tensor> inputs, States* states) const override;
  absl::StatusOr<Logits> Forward(absl::Span<const Tensor> inputs, States* states,
                                 uint64_t seed) override;
  absl::Status Backward(const Tensor& gradient, const OnGradient& on_gradient) override {
    return RunBackward(gradient, &on_gradient);
  }
  absl::Status Accumulate(const Tensor& gradient) override {
    return RunBackward(gradient, nullptr);
  }
  void ForgetGradients() override;
  Tensor InputGradient(int index) const override {
    return static_cast<size_t>(index) < input_gradients_.size() ? input_gradients_[index]
                                                                : Tensor();
  }

  // Checks forward()'s arguments and runs it on zeros.
  absl::Status CheckForward();
  // Predict of `module`, which takes and gives what ours does.
  absl::StatusOr<Logits> PredictWith(torch::jit::Module* module, bool optimize,
                                     absl::Span<const Tensor> inputs, States* states) const;

 protected:
  absl::StatusOr<std::shared_ptr<const Model>> DoCompile(
      std::shared_ptr<const Model> self) const override;

 private:
  const ModelConfig& config() const { return options_.config; }
  std::string Error(absl::string_view what) const {
    return absl::StrCat(options_.archive, ": ", what);
  }
  // What has failed: a pass over so many examples, and where if that is not the host.
  std::string What(absl::string_view pass, int64_t examples) const;
  absl::Status CheckSet(int set) const;
  absl::Status CheckSchema() const;
  absl::Status CheckTrialPass();
  // Only where it changes, because it writes to every submodule.
  void SetTraining(bool training) const ABSL_LOCKS_EXCLUDED(mode_mu_);
  absl::StatusOr<std::vector<torch::jit::IValue>> Arguments(absl::Span<const Tensor> inputs,
                                                            const States* states) const;
  absl::StatusOr<PassResult> Run(torch::jit::Module* module,
                                 std::vector<torch::jit::IValue> arguments, int64_t batch,
                                 bool optimize) const;
  // Run of our module, unoptimised, in a certain precision.
  absl::StatusOr<PassResult> RunMixed(Precision precision,
                                      std::vector<torch::jit::IValue> arguments, int64_t batch);
  void Return(const PassResult& result, States* states) const;
  // Keeps the gradients of the parameters where `on_gradient` is null.
  absl::Status RunBackward(const Tensor& gradient, const OnGradient* on_gradient);
  void HandOverAccumulated(int index);
  // After a backward pass, for one that may not have come in it.
  void FinishGradient(int index);
  void HandOver(int index, const at::Tensor& gradient);  // from the thread of a backward pass
  void TakeInputGradients();

  const Options options_;
  mutable torch::jit::Module module_;
  ModuleTensors tensors_;
  std::vector<std::shared_ptr<torch::autograd::Node>> accumulators_;
  const std::unique_ptr<ModelDevice> device_;  // goes before what it computes with

  mutable Mutex mode_mu_;
  mutable bool training_ ABSL_GUARDED_BY(mode_mu_) = true;

  at::Tensor output_;  // of the last Forward, until its Backward
  // The arguments whose gradients are wanted, by input; undefined for others. As output_.
  std::vector<at::Tensor> rows_;
  std::vector<Tensor> input_gradients_;  // of the last Backward
  // During Backward only:
  const OnGradient* on_gradient_ = nullptr;
  const void* root_ = nullptr;  // the caller's memory
  std::vector<bool> handed_over_;
};

}  // namespace codistill::internal

#endif  // CODISTILL_COMMON_MODEL_TORCH_MODEL_H_
