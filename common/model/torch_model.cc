#include "common/model/torch_model.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <algorithm>
#include <utility>

#include "common/base/device.h"
#include "common/base/status.h"
#include "common/model/inputs.h"
#include "common/model/mixed_precision.h"
#include "common/model/torch_support.h"

namespace codistill::internal {
namespace {

// Runs after the gradient of one parameter has been accumulated, which is when all its uses have
// contributed.
class AccumulatedHook final : public torch::autograd::FunctionPostHook {
 public:
  explicit AccumulatedHook(std::function<void()> f) : f_(std::move(f)) {}
  torch::autograd::variable_list operator()(const torch::autograd::variable_list& outputs,
                                            const torch::autograd::variable_list&) override {
    f_();
    return outputs;
  }

 private:
  const std::function<void()> f_;
};

}  // namespace

TorchModel::TorchModel(Options options, std::unique_ptr<ModelDevice> device,
                       torch::jit::Module module, ModuleTensors tensors)
    : options_(std::move(options)),
      module_(std::move(module)),
      tensors_(std::move(tensors)),
      device_(std::move(device)) {
  // Gradients are added up on the stream on which these are made.
  const auto scope = device_->Train();
  handed_over_.resize(tensors_.list().tensors_size());
  for (int i = 0; i < tensors_.list().tensors_size(); ++i) {
    if (tensors_.list().tensors(i).role() != TensorSpec::PARAMETER) continue;
    // The variable holds its accumulator weakly, and with it the hook.
    auto accumulator = torch::autograd::impl::grad_accumulator(tensors_.tensor(i));
    accumulator->add_post_hook(
        std::make_unique<AccumulatedHook>([this, i] { HandOverAccumulated(i); }));
    accumulators_.push_back(std::move(accumulator));
  }
}

int TorchModel::device() const {
  return device_->device().is_cpu() ? kHostDevice : device_->device().index();
}

std::string TorchModel::What(absl::string_view pass, int64_t examples) const {
  if (device() == kHostDevice) return absl::StrCat(pass, " failed on this batch");
  return absl::StrCat(pass, " of ", examples, " examples failed on ", DeviceName(device()));
}

absl::Status TorchModel::CheckSet(int set) const {
  if (set >= 0 && set < weight_sets()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      Error(absl::StrCat("there is no set ", set, " of weights; there are ", weight_sets())));
}

absl::Status TorchModel::UseWeights(int set) {
  CODISTILL_RETURN_IF_ERROR(CheckSet(set));
  return CatchTorch(absl::StatusCode::kInternal, Error("weights cannot be exchanged"),
                    [&]() -> absl::Status {
                      device_->UseWeights(set);
                      tensors_.Use(set);
                      return absl::OkStatus();
                    });
}

absl::Status TorchModel::WeightsWritten(int set) {
  CODISTILL_RETURN_IF_ERROR(CheckSet(set));
  return CatchTorch(absl::StatusCode::kInternal,
                    Error(absl::StrCat("weights cannot be brought to ", options_.device)),
                    [&]() -> absl::Status {
                      device_->WeightsWritten(set);
                      return absl::OkStatus();
                    });
}

absl::Status TorchModel::AwaitBuffers() {
  return CatchTorch(absl::StatusCode::kInternal,
                    Error(absl::StrCat("buffers cannot be brought from ", options_.device)),
                    [&]() -> absl::Status {
                      device_->AwaitBuffers();
                      return absl::OkStatus();
                    });
}

absl::StatusOr<Tensor> TorchModel::Allocate(DataType dtype, std::vector<int64_t> shape) {
  if (device() == kHostDevice) return Model::Allocate(dtype, std::move(shape));
  return CatchTorch(
      absl::StatusCode::kInternal, Error(absl::StrCat("memory of ", options_.device)),
      [&]() -> absl::StatusOr<Tensor> {
        const auto scope = device_->Train();
        return device_->Adopt(at::empty(
            shape, at::TensorOptions().dtype(ToTorchType(dtype)).device(device_->device())));
      });
}

absl::StatusOr<Tensor> TorchModel::ToDevice(const Tensor& tensor) {
  if (tensor.device() == device()) return tensor;
  return CatchTorch(absl::StatusCode::kInternal,
                    Error(absl::StrCat("copying to ", options_.device)),
                    [&]() -> absl::StatusOr<Tensor> {
                      const auto scope = device_->Train();
                      return device_->Adopt(device_->Send(tensor));
                    });
}

void TorchModel::SetTraining(bool training) const {
  MutexLock lock(&mode_mu_);
  if (training_ == training) return;
  module_.train(training);
  training_ = training;
}

absl::StatusOr<std::vector<torch::jit::IValue>> TorchModel::Arguments(
    absl::Span<const Tensor> inputs, const States* states) const {
  CODISTILL_ASSIGN_OR_RETURN(const int64_t batch, CheckInputs(config(), inputs));
  if (states == nullptr && config().states_size() > 0) {
    return absl::InvalidArgumentError(absl::StrCat("the model has recurrent states (",
                                                   config().states(0).name(), ", ...), got none"));
  }
  if (states != nullptr) CODISTILL_RETURN_IF_ERROR(CheckStates(config(), *states, batch));
  std::vector<torch::jit::IValue> arguments;
  arguments.reserve(inputs.size() + config().states_size());
  for (const Tensor& input : inputs) arguments.emplace_back(device_->Take(input));
  for (int i = 0; i < config().states_size(); ++i) {
    if (states->empty() || (*states)[i].empty()) {
      arguments.emplace_back(
          at::zeros(StateShape(config().states(i), batch),
                    at::TensorOptions().dtype(at::kFloat).device(device_->device())));
    } else {
      arguments.emplace_back(device_->Take((*states)[i]));
    }
  }
  return arguments;
}

absl::StatusOr<PassResult> TorchModel::Run(torch::jit::Module* module,
                                           std::vector<torch::jit::IValue> arguments, int64_t batch,
                                           bool optimize) const {
  // Per thread in libtorch, so it is set for every pass.
  torch::jit::GraphOptimizerEnabledGuard optimization(optimize);
  const torch::jit::IValue value = module->forward(std::move(arguments));

  PassResult result;
  std::vector<torch::jit::IValue> parts;
  if (value.isTensor()) {
    parts.push_back(value);
  } else if (value.isTuple()) {
    for (const auto& part : value.toTupleRef().elements()) parts.push_back(part);
  }
  if (static_cast<int>(parts.size()) != 1 + config().states_size() ||
      !std::all_of(parts.begin(), parts.end(), [](const auto& part) { return part.isTensor(); })) {
    return absl::InvalidArgumentError(Error(absl::StrCat(
        "forward() returned ", value.tagKind(), " of ", parts.size(), "; it must return ",
        config().states_size() == 0
            ? std::string("a tensor, the logits")
            : absl::StrCat("the logits and then ", config().states_size(), " states"))));
  }
  at::Tensor logits = parts[0].toTensor();
  const int64_t columns = config().num_outputs();
  if (!at::isFloatingType(logits.scalar_type()) || logits.dim() < 2 || logits.size(-1) != columns ||
      logits.numel() == 0 || logits.size(0) != batch) {
    return absl::InvalidArgumentError(Error(
        absl::StrCat("forward() gave logits ", c10::toString(logits.scalar_type()), " ",
                     ShapeString(logits.sizes().vec()), " for ", batch, " examples; they must be [",
                     batch, ", ..., ", columns, "] (model.num_outputs: ", columns, ")")));
  }
  result.logits = logits.reshape({-1, columns});
  for (int i = 0; i < config().states_size(); ++i) {
    at::Tensor state = parts[i + 1].toTensor().detach().to(at::kFloat);
    const std::vector<int64_t> want = StateShape(config().states(i), batch);
    if (state.sizes() != want) {
      return absl::InvalidArgumentError(Error(
          absl::StrCat("forward() gave state ", config().states(i).name(), " the shape ",
                       ShapeString(state.sizes().vec()), "; it must be ", ShapeString(want))));
    }
    result.states.push_back(std::move(state));
  }
  return result;
}

absl::StatusOr<PassResult> TorchModel::RunMixed(Precision precision,
                                                std::vector<torch::jit::IValue> arguments,
                                                int64_t batch) {
  const MixedPrecision mixed(precision, device_->device().type());
  CODISTILL_ASSIGN_OR_RETURN(PassResult result,
                             Run(&module_, std::move(arguments), batch, /*optimize=*/false));
  // The loss reads bfloat16 as it is.
  if (precision == FP32 || result.logits.scalar_type() != at::kBFloat16) {
    result.logits = result.logits.to(at::kFloat);
  }
  return result;
}

void TorchModel::Return(const PassResult& result, States* states) const {
  if (states == nullptr) return;
  states->resize(result.states.size());
  for (size_t i = 0; i < result.states.size(); ++i) {
    (*states)[i] = device_->Bring(result.states[i]);
  }
}

absl::StatusOr<Model::Logits> TorchModel::Predict(absl::Span<const Tensor> inputs,
                                                  States* states) const {
  SetTraining(false);
  return PredictWith(&module_, options_.optimize_predict, inputs, states);
}

absl::StatusOr<Model::Logits> TorchModel::PredictWith(torch::jit::Module* module, bool optimize,
                                                      absl::Span<const Tensor> inputs,
                                                      States* states) const {
  // What the optimisation has recorded holds for one precision.
  optimize &= options_.predict_precision == FP32;
  const int64_t examples = inputs.empty() || inputs[0].shape().empty() ? 0 : inputs[0].shape()[0];
  // What worked on zeros and fails now fails because of the values.
  return CatchTorch(
      absl::StatusCode::kInvalidArgument, What("forward()", examples),
      [&]() -> absl::StatusOr<Logits> {
        const auto scope = device_->Predict();
        torch::NoGradGuard no_grad;
        const MixedPrecision mixed(options_.predict_precision, device_->device().type());
        CODISTILL_ASSIGN_OR_RETURN(auto arguments, Arguments(inputs, states));
        CODISTILL_ASSIGN_OR_RETURN(const PassResult result,
                                   Run(module, std::move(arguments), examples, optimize));
        Return(result, states);
        return Logits{device_->Bring(result.logits.to(at::kFloat)), result.logits.size(0)};
      });
}

absl::StatusOr<Model::Logits> TorchModel::Forward(absl::Span<const Tensor> inputs, States* states,
                                                  uint64_t seed) {
  SetTraining(true);
  output_ = at::Tensor();
  rows_.clear();
  input_gradients_.clear();
  const int64_t examples = inputs.empty() || inputs[0].shape().empty() ? 0 : inputs[0].shape()[0];
  return CatchTorch(absl::StatusCode::kInvalidArgument, What("forward()", examples),
                    [&]() -> absl::StatusOr<Logits> {
                      const auto scope = device_->Train();
                      torch::AutoGradMode with_grad(true);
                      torch::manual_seed(seed);
                      CODISTILL_ASSIGN_OR_RETURN(auto arguments, Arguments(inputs, states));
                      rows_.resize(inputs.size());
                      for (int i = 0; i < config().inputs_size(); ++i) {
                        if (config().inputs(i).embedding_table().empty()) continue;
                        rows_[i] = arguments[i].toTensor().set_requires_grad(true);
                      }
                      CODISTILL_ASSIGN_OR_RETURN(
                          const PassResult result,
                          RunMixed(options_.precision, std::move(arguments), examples));
                      CODISTILL_RETURN_IF_ERROR(tensors_.PutBuffersBack());
                      device_->FetchBuffers();
                      Return(result, states);
                      output_ = result.logits;
                      return Logits{device_->Adopt(output_), output_.size(0)};
                    });
}

void TorchModel::ForgetGradients() {
  for (int i = 0; i < tensors_.list().tensors_size(); ++i) {
    if (tensors_.list().tensors(i).role() == TensorSpec::PARAMETER) {
      tensors_.tensor(i).mutable_grad() = at::Tensor();
    }
  }
}

absl::Status TorchModel::RunBackward(const Tensor& gradient, const OnGradient* on_gradient) {
  if (!output_.defined()) {
    return absl::FailedPreconditionError("Backward without a Forward before it");
  }
  const DataType dtype = FromTorchType(output_.scalar_type());
  if (gradient.dtype() != dtype || gradient.shape() != output_.sizes().vec()) {
    return absl::InvalidArgumentError(
        absl::StrCat("gradient of the logits is ", DataTypeName(gradient.dtype()), " ",
                     ShapeString(gradient.shape()), "; it must be ", DataTypeName(dtype), " ",
                     ShapeString(output_.sizes().vec())));
  }
  const at::Tensor output = std::exchange(output_, at::Tensor());
  if (on_gradient != nullptr) CODISTILL_RETURN_IF_ERROR(device_->BeginGradients(on_gradient));
  on_gradient_ = on_gradient;
  root_ = gradient.data();
  std::fill(handed_over_.begin(), handed_over_.end(), false);
  absl::Status status =
      CatchTorch(absl::StatusCode::kInternal, What("backward pass", gradient.shape()[0]),
                 [&]() -> absl::Status {
                   const auto scope = device_->Train();
                   if (output.requires_grad()) {
                     torch::autograd::backward({output}, {device_->Take(gradient)});
                   }
                   for (int i = 0; i < tensors_.list().tensors_size(); ++i) {
                     if (tensors_.list().tensors(i).role() == TensorSpec::PARAMETER)
                       FinishGradient(i);
                   }
                   TakeInputGradients();
                   return absl::OkStatus();
                 });
  if (on_gradient != nullptr) {
    // Whatever has happened: what was delivered is on its way.
    const absl::Status ended = device_->EndGradients();
    if (status.ok()) status = ended;
  }
  on_gradient_ = nullptr;
  root_ = nullptr;
  rows_.clear();
  return status;
}

void TorchModel::TakeInputGradients() {
  input_gradients_.resize(rows_.size());
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!rows_[i].defined()) continue;
    at::Tensor gradient = rows_[i].grad();
    if (!gradient.defined()) gradient = at::zeros_like(rows_[i], at::MemoryFormat::Contiguous);
    // The caller's own memory may not be kept, as in HandOver.
    if (gradient.storage().data() == root_) gradient = gradient.clone();
    input_gradients_[i] = device_->Bring(gradient);
  }
}

void TorchModel::HandOverAccumulated(int index) {
  at::Tensor& slot = tensors_.tensor(index).mutable_grad();
  if (on_gradient_ == nullptr) return;  // kept for the next part
  // Taken rather than copied: the next pass starts from nothing.
  const at::Tensor gradient = std::exchange(slot, at::Tensor());
  if (gradient.defined()) HandOver(index, gradient);
}

void TorchModel::FinishGradient(int index) {
  at::Tensor& slot = tensors_.tensor(index).mutable_grad();
  if (on_gradient_ == nullptr) {
    if (!slot.defined()) return;
    // The next part is added in place, so nobody else may have this memory: neither another
    // gradient nor the caller, who owns what the pass began with.
    if (slot.is_sparse() || slot.storage().use_count() > 1 || slot.storage().data() == root_) {
      slot = slot.clone();
    }
    return;
  }
  if (handed_over_[index]) return;
  // One that only earlier parts depend on has been kept.
  const at::Tensor kept = std::exchange(slot, at::Tensor());
  HandOver(index, kept.defined()
                      ? kept
                      : at::zeros_like(tensors_.tensor(index), at::MemoryFormat::Contiguous));
}

void TorchModel::HandOver(int index, const at::Tensor& gradient) {
  at::Tensor dense = gradient.is_sparse() ? gradient.to_dense() : gradient;
  dense = dense.detach().to(at::kFloat).contiguous();
  // A gradient that is just the caller's own memory (of a bias added to one row, say) would change
  // under whoever keeps it.
  if (dense.storage().data() == root_) dense = dense.clone();
  handed_over_[index] = true;
  device_->Deliver(index, std::move(dense));
}

}  // namespace codistill::internal
