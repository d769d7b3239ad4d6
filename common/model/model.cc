#include "common/model/model.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/mutex.h"
#include "common/base/status.h"
#include "common/model/inputs.h"
#include "common/model/mixed_precision.h"
#include "common/model/module_tensors.h"
#include "common/model/torch_support.h"

namespace codistill {
namespace {

using internal::CatchTorch;
using internal::FromTorch;
using internal::MixedPrecision;
using internal::ModuleTensors;
using internal::ToTorch;

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

struct PassResult {
  at::Tensor logits;  // [rows, num_outputs] fp32, part of the graph if there is one
  std::vector<at::Tensor> states;
};

class TorchModel final : public Model {
 public:
  TorchModel(Options options, torch::jit::Module module, ModuleTensors tensors)
      : options_(std::move(options)), module_(std::move(module)), tensors_(std::move(tensors)) {
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

  const TensorList& tensors() const override { return tensors_.list(); }
  absl::Span<const TensorView> storage() const override { return tensors_.views(); }
  int weight_sets() const override { return tensors_.sets(); }
  absl::Span<const TensorView> storage(int set) const override { return tensors_.views(set); }
  absl::Status UseWeights(int set) override;

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
                                      std::vector<torch::jit::IValue> arguments, int64_t batch) {
    MixedPrecision mixed(precision, at::Device(options_.device).type());
    return Run(&module_, std::move(arguments), batch, /*optimize=*/false);
  }
  static Logits ToLogits(const at::Tensor& logits) { return {FromTorch(logits), logits.size(0)}; }
  static void Return(const PassResult& result, States* states) {
    if (states == nullptr) return;
    states->resize(result.states.size());
    for (size_t i = 0; i < result.states.size(); ++i) (*states)[i] = FromTorch(result.states[i]);
  }
  // Keeps the gradients of the parameters where `on_gradient` is null.
  absl::Status RunBackward(const Tensor& gradient, const OnGradient* on_gradient);
  void HandOverAccumulated(int index);
  // After a backward pass, for one that may not have come in it.
  void FinishGradient(int index);
  void HandOver(int index, const at::Tensor& gradient);
  void TakeInputGradients();

  const Options options_;
  mutable torch::jit::Module module_;
  ModuleTensors tensors_;
  std::vector<std::shared_ptr<torch::autograd::Node>> accumulators_;

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

absl::Status TorchModel::UseWeights(int set) {
  if (set < 0 || set >= weight_sets()) {
    return absl::InvalidArgumentError(
        Error(absl::StrCat("there is no set ", set, " of weights; there are ", weight_sets())));
  }
  return CatchTorch(absl::StatusCode::kInternal, Error("weights cannot be exchanged"),
                    [&]() -> absl::Status {
                      tensors_.Use(set);
                      return absl::OkStatus();
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
  for (const Tensor& input : inputs) arguments.emplace_back(ToTorch(input));
  for (int i = 0; i < config().states_size(); ++i) {
    if (states->empty() || (*states)[i].empty()) {
      arguments.emplace_back(at::zeros(StateShape(config().states(i), batch), at::kFloat));
    } else {
      arguments.emplace_back(ToTorch((*states)[i]));
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
  result.logits = logits.to(at::kFloat).reshape({-1, columns});
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
  // What worked on zeros and fails now fails because of the values.
  return CatchTorch(
      absl::StatusCode::kInvalidArgument, "forward() failed on this batch",
      [&]() -> absl::StatusOr<Logits> {
        torch::NoGradGuard no_grad;
        const MixedPrecision mixed(options_.predict_precision, at::Device(options_.device).type());
        CODISTILL_ASSIGN_OR_RETURN(auto arguments, Arguments(inputs, states));
        CODISTILL_ASSIGN_OR_RETURN(const PassResult result, Run(module, std::move(arguments),
                                                                inputs[0].shape()[0], optimize));
        Return(result, states);
        return ToLogits(result.logits);
      });
}

absl::StatusOr<Model::Logits> TorchModel::Forward(absl::Span<const Tensor> inputs, States* states,
                                                  uint64_t seed) {
  SetTraining(true);
  output_ = at::Tensor();
  rows_.clear();
  input_gradients_.clear();
  return CatchTorch(absl::StatusCode::kInvalidArgument, "forward() failed on this batch",
                    [&]() -> absl::StatusOr<Logits> {
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
                          RunMixed(options_.precision, std::move(arguments), inputs[0].shape()[0]));
                      CODISTILL_RETURN_IF_ERROR(tensors_.PutBuffersBack());
                      Return(result, states);
                      output_ = result.logits;
                      return ToLogits(output_);
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
  if (gradient.dtype() != DT_FLOAT || gradient.shape() != output_.sizes().vec()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "gradient of the logits is ", DataTypeName(gradient.dtype()), " ",
        ShapeString(gradient.shape()), "; it must be FP32 ", ShapeString(output_.sizes().vec())));
  }
  const at::Tensor output = std::exchange(output_, at::Tensor());
  on_gradient_ = on_gradient;
  root_ = gradient.data();
  std::fill(handed_over_.begin(), handed_over_.end(), false);
  absl::Status status =
      CatchTorch(absl::StatusCode::kInternal, "backward pass failed", [&]() -> absl::Status {
        if (output.requires_grad()) {
          torch::autograd::backward({output}, {ToTorch(gradient)});
        }
        for (int i = 0; i < tensors_.list().tensors_size(); ++i) {
          if (tensors_.list().tensors(i).role() == TensorSpec::PARAMETER) FinishGradient(i);
        }
        TakeInputGradients();
        return absl::OkStatus();
      });
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
    input_gradients_[i] = FromTorch(gradient);
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
  auto owner = std::make_shared<at::Tensor>(std::move(dense));
  const float* data = owner->data_ptr<float>();
  (*on_gradient_)(index, data, std::move(owner));
}

absl::Status TorchModel::CheckSchema() const {
  const auto method = module_.find_method("forward");
  if (!method) return absl::InvalidArgumentError(Error("the archive has no method forward()"));
  std::vector<std::string> wanted, got;
  for (const ModelInput& input : config().inputs()) wanted.push_back(input.name());
  for (const RecurrentState& state : config().states()) wanted.push_back(state.name());
  const auto& arguments = method->function().getSchema().arguments();
  for (size_t i = 1; i < arguments.size(); ++i) {  // 0 is self
    // A trailing argument with a default may be left alone.
    if (got.size() >= wanted.size() && arguments[i].default_value().has_value()) break;
    got.push_back(arguments[i].name());
  }
  if (got != wanted) {
    return absl::InvalidArgumentError(Error(absl::StrCat(
        "forward() takes (", absl::StrJoin(got, ", "),
        "); the job's model.inputs and model.states are (", absl::StrJoin(wanted, ", "), ")")));
  }
  return absl::OkStatus();
}

absl::Status TorchModel::CheckTrialPass() {
  constexpr int64_t kBatch = 2;
  std::vector<Tensor> inputs;
  for (const ModelInput& input : config().inputs()) {
    std::vector<int64_t> shape = {kBatch};
    shape.insert(shape.end(), input.shape().begin(), input.shape().end());
    inputs.push_back(Tensor::Zeros(input.dtype(), std::move(shape)));
  }
  const States zeros;
  torch::NoGradGuard no_grad;
  CODISTILL_ASSIGN_OR_RETURN(std::vector<torch::jit::IValue> arguments, Arguments(inputs, &zeros));
  // The first pass with the optimisation records, the second compiles.
  for (int i = 0; i < 2 && options_.optimize_predict; ++i) {
    CODISTILL_RETURN_IF_ERROR(Run(&module_, arguments, kBatch, /*optimize=*/true).status());
  }
  // Same tensors as the interpreter's, whose version counters tell of writes.
  const std::vector<torch::jit::IValue> seen = arguments;
  std::vector<uint32_t> versions;
  for (const auto& argument : seen) versions.push_back(argument.toTensor()._version());
  CODISTILL_RETURN_IF_ERROR(Run(&module_, std::move(arguments), kBatch, /*optimize=*/false));
  for (size_t i = 0; i < seen.size(); ++i) {
    if (seen[i].toTensor()._version() == versions[i]) continue;
    const bool is_input = i < inputs.size();
    const std::string& name =
        is_input ? config().inputs(i).name() : config().states(i - inputs.size()).name();
    return absl::InvalidArgumentError(Error(absl::StrCat("forward() writes into its argument ",
                                                         name, "; it must compute out of place")));
  }
  const std::string changed = tensors_.FirstChanged();
  if (!changed.empty()) {
    return absl::InvalidArgumentError(Error(absl::StrCat(
        "forward() changes ", changed, " in eval mode; it may do so in training only")));
  }
  const std::pair<Precision, absl::string_view> precisions[] = {
      {options_.precision, "training.precision"},
      {options_.predict_precision, "prediction.precision"}};
  for (const auto& [precision, field] : precisions) {
    if (precision == FP32) continue;
    CODISTILL_RETURN_IF_ERROR(
        CatchTorch(absl::StatusCode::kInvalidArgument,
                   Error(absl::StrCat("a trial pass in bfloat16 (", field, ": BF16) failed")),
                   [&, mixed = precision] { return RunMixed(mixed, seen, kBatch).status(); }));
  }
  return absl::OkStatus();
}

absl::Status TorchModel::CheckForward() {
  CODISTILL_RETURN_IF_ERROR(CheckSchema());
  SetTraining(false);
  return CatchTorch(absl::StatusCode::kInvalidArgument,
                    Error("a trial pass on two examples of zeros failed"),
                    [&] { return CheckTrialPass(); });
}

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

absl::StatusOr<std::shared_ptr<const Model>> TorchModel::DoCompile(
    std::shared_ptr<const Model> self) const {
  if (options_.predict_precision != FP32) {
    return absl::UnimplementedError("only passes in fp32 can be compiled for their weights");
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

absl::Status CheckDevice(const std::string& device) {
  if (device == "cpu") return absl::OkStatus();
  if (absl::StartsWith(device, "cuda")) {
    return absl::FailedPreconditionError(absl::StrCat(
        "device ", device, ": this build computes on the CPU only; set devices to \"cpu\""));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("device ", device, ": it must be \"cpu\" or \"cuda:N\""));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> Model::Load(Options options) {
  CODISTILL_RETURN_IF_ERROR(CheckDevice(options.device));
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
  internal::AvoidBrokenBfloat16Kernels();
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
  auto model =
      std::make_unique<TorchModel>(std::move(options), std::move(module), std::move(tensors));
  CODISTILL_RETURN_IF_ERROR(model->CheckForward());
  return model;
}

absl::StatusOr<std::shared_ptr<const Model>> Model::Compile(std::shared_ptr<const Model> model) {
  const Model& self = *model;
  return self.DoCompile(std::move(model));
}

}  // namespace codistill
