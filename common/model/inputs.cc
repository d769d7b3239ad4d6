#include "common/model/inputs.h"

#include <algorithm>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace codistill {
namespace {

// "[B, 3, 32, 32]".
std::string WantedShape(const ModelInput& input) {
  std::string text = "[B";
  for (int64_t size : input.shape()) absl::StrAppend(&text, ", ", size);
  return text + "]";
}

}  // namespace

absl::StatusOr<int64_t> CheckInputs(const ModelConfig& config, absl::Span<const Tensor> inputs) {
  if (static_cast<int>(inputs.size()) != config.inputs_size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the model takes ", config.inputs_size(), " inputs, got ", inputs.size()));
  }
  int64_t batch = 0;
  for (int i = 0; i < config.inputs_size(); ++i) {
    const ModelInput& want = config.inputs(i);
    const Tensor& got = inputs[i];
    if (got.dtype() != want.dtype()) {
      return absl::InvalidArgumentError(absl::StrCat("input ", want.name(), " is ",
                                                     DataTypeName(got.dtype()), "; it must be ",
                                                     DataTypeName(want.dtype())));
    }
    const std::vector<int64_t>& shape = got.shape();
    if (shape.empty() || shape[0] < 1 ||
        !std::equal(shape.begin() + 1, shape.end(), want.shape().begin(), want.shape().end())) {
      return absl::InvalidArgumentError(absl::StrCat("input ", want.name(), " has shape ",
                                                     ShapeString(shape), "; it must be ",
                                                     WantedShape(want), " with B >= 1"));
    }
    if (i == 0) {
      batch = shape[0];
    } else if (shape[0] != batch) {
      return absl::InvalidArgumentError(absl::StrCat("input ", want.name(), " has ", shape[0],
                                                     " examples where input ",
                                                     config.inputs(0).name(), " has ", batch));
    }
  }
  return batch;
}

std::vector<int64_t> StateShape(const RecurrentState& state, int64_t batch) {
  std::vector<int64_t> shape(state.shape().begin(), state.shape().end());
  std::replace(shape.begin(), shape.end(), int64_t{-1}, batch);
  return shape;
}

absl::Status CheckStates(const ModelConfig& config, absl::Span<const Tensor> states,
                         int64_t batch) {
  if (states.empty()) return absl::OkStatus();
  if (static_cast<int>(states.size()) != config.states_size()) {
    return absl::InvalidArgumentError(absl::StrCat("the model has ", config.states_size(),
                                                   " recurrent states, got ", states.size()));
  }
  for (int i = 0; i < config.states_size(); ++i) {
    if (states[i].empty()) continue;
    const std::vector<int64_t> want = StateShape(config.states(i), batch);
    if (states[i].dtype() != DT_FLOAT || states[i].shape() != want) {
      return absl::InvalidArgumentError(absl::StrCat(
          "state ", config.states(i).name(), " is ", DataTypeName(states[i].dtype()), " ",
          ShapeString(states[i].shape()), "; it must be FP32 ", ShapeString(want)));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckModelConfig(const ModelConfig& config) {
  ErrorList errors;
  if (config.inputs_size() == 0) errors.Add("model.inputs", "empty; forward() needs an input");
  if (config.num_outputs() < 1) {
    errors.Add("model.num_outputs", absl::StrCat(config.num_outputs(), "; it must be at least 1"));
  }
  std::set<std::string> names;
  for (const ModelInput& input : config.inputs()) {
    if (!names.insert(input.name()).second) {
      errors.Add("model.inputs", absl::StrCat("name ", input.name(), " is used twice"));
    }
  }
  for (const RecurrentState& state : config.states()) {
    if (!names.insert(state.name()).second) {
      errors.Add("model.states", absl::StrCat("name ", state.name(), " is used twice"));
    }
    if (std::count(state.shape().begin(), state.shape().end(), -1) != 1) {
      errors.Add("model.states",
                 absl::StrCat("state ", state.name(),
                              " must have exactly one -1 (the batch) in its shape"));
    }
  }
  return errors.ToStatus();
}

}  // namespace codistill
