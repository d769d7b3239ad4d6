// Whether an archive can be trained and used as a job wants it.

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "common/model/torch_model.h"
#include "common/model/torch_support.h"

namespace codistill::internal {

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
                    Error("a trial pass on two examples of zeros failed"), [&] {
                      const auto scope = device_->Predict();
                      return CheckTrialPass();
                    });
}

}  // namespace codistill::internal
