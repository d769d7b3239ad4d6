#include "worker/recurrent_state.h"

#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "worker/worker_state.pb.h"

namespace codistill {
namespace {

constexpr uint32_t kFormatVersion = 1;

absl::StatusOr<Tensor> DecodeState(const RecurrentState& config,
                                   const SavedWorkerState::State& saved) {
  auto error = [&](const std::string& what) {
    return absl::InvalidArgumentError(
        absl::StrCat("saved worker state \"", saved.name(), "\": ", what));
  };
  if (saved.name() != config.name()) return error(absl::StrCat("expected ", config.name()));
  std::vector<int64_t> shape(saved.shape().begin(), saved.shape().end());
  bool fits = static_cast<int>(shape.size()) == config.shape_size();
  for (int i = 0; fits && i < config.shape_size(); ++i) {
    fits = config.shape(i) == -1 || config.shape(i) == shape[i];
  }
  if (!fits) return error(absl::StrCat("shape ", ShapeString(shape), " is not the model's"));
  const int64_t elements = ElementCount(shape);
  if (elements < 0 || saved.values().size() != static_cast<size_t>(elements) * sizeof(float)) {
    return error(absl::StrCat(saved.values().size(), " bytes for the shape ", ShapeString(shape)));
  }
  Tensor tensor = Tensor::Allocate(DT_FLOAT, shape);
  std::memcpy(tensor.data(), saved.values().data(), saved.values().size());
  return tensor;
}

}  // namespace

std::string EncodeWorkerState(const ModelConfig& config, const RecurrentStateAfter& state) {
  SavedWorkerState saved;
  saved.set_format_version(kFormatVersion);
  saved.set_step(state.step);
  for (size_t i = 0; i < state.states.size(); ++i) {
    const Tensor& tensor = state.states[i];
    auto* entry = saved.add_recurrent();
    entry->set_name(config.states(static_cast<int>(i)).name());
    for (int64_t dimension : tensor.shape()) entry->add_shape(dimension);
    entry->set_values(tensor.data(), tensor.bytes());
  }
  return saved.SerializeAsString();
}

absl::StatusOr<RecurrentStateAfter> DecodeWorkerState(const ModelConfig& config,
                                                      const std::string& blob) {
  SavedWorkerState saved;
  if (!saved.ParseFromString(blob) || saved.format_version() != kFormatVersion) {
    return absl::InvalidArgumentError(absl::StrCat(
        "saved worker state of ", blob.size(), " bytes is not of format version ", kFormatVersion));
  }
  RecurrentStateAfter state;
  state.step = saved.step();
  if (saved.recurrent_size() == 0) return state;
  if (saved.recurrent_size() != config.states_size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("saved worker state has ", saved.recurrent_size(), " states; the model has ",
                     config.states_size()));
  }
  for (int i = 0; i < config.states_size(); ++i) {
    auto tensor = DecodeState(config.states(i), saved.recurrent(i));
    if (!tensor.ok()) return tensor.status();
    state.states.push_back(*std::move(tensor));
  }
  return state;
}

}  // namespace codistill
