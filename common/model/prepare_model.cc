#include "common/model/prepare_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/tensor/round_weights.h"

namespace codistill {
namespace {

// Whether an element is a NaN or, if `infinite`, an infinity. By integers, which vectorises.
bool HasBad(const float* values, int64_t n, bool infinite) {
  const int32_t limit = infinite ? 0x7f7fffff : 0x7f800000;  // largest bits that are good
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    largest = std::max(largest, bits & 0x7fffffff);
  }
  return largest > limit;
}

// Element of the first value that is bad in that sense.
int64_t FirstBad(const float* values, int64_t n, bool infinite) {
  for (int64_t i = 0; i < n; ++i) {
    if (infinite ? !std::isfinite(values[i]) : std::isnan(values[i])) return i;
  }
  return n;
}

bool IsParameter(const TensorSpec& spec) {
  return spec.role() == TensorSpec::PARAMETER || spec.role() == TensorSpec::FROZEN;
}

}  // namespace

absl::Status CheckWeights(const Model& model) {
  for (int i = 0; i < model.tensors().tensors_size(); ++i) {
    const TensorSpec& spec = model.tensors().tensors(i);
    if (spec.role() == TensorSpec::TIED || spec.dtype() != DT_FLOAT) continue;
    const TensorView& view = model.storage()[i];
    const auto* const values = static_cast<const float*>(view.data);
    const int64_t n = view.elements();
    const bool infinite = IsParameter(spec);
    if (!HasBad(values, n, infinite)) continue;
    const int64_t at = FirstBad(values, n, infinite);
    return absl::DataLossError(absl::StrCat("tensor ", spec.name(), " has ",
                                            std::isnan(values[at]) ? "a NaN" : "an infinity",
                                            " at element ", at));
  }
  return absl::OkStatus();
}

absl::Status CheckPrecision(DataType weights) {
  if (weights == DT_FLOAT || weights == DT_BFLOAT16 || weights == DT_INT8) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("prediction.weights: ", DataType_Name(weights),
                   " is not supported; DT_FLOAT, DT_BFLOAT16 or DT_INT8 would be right"));
}

void RoundWeights(DataType weights, Model* model) {
  if (weights == DT_FLOAT) return;
  for (int i = 0; i < model->tensors().tensors_size(); ++i) {
    const TensorSpec& spec = model->tensors().tensors(i);
    if (!IsParameter(spec) || spec.dtype() != DT_FLOAT || spec.shape_size() < 2) continue;
    const TensorView& view = model->storage()[i];
    auto* const values = static_cast<float*>(view.data);
    if (view.elements() == 0) continue;
    if (weights == DT_BFLOAT16) {
      RoundToBfloat16(values, view.elements());
    } else {
      RoundToInt8(values, spec.shape(0), view.elements() / spec.shape(0));
    }
  }
}

DataType AnswerPrecision(DataType weights, Precision passes) {
  return weights == DT_FLOAT && passes == BF16 ? DT_BFLOAT16 : weights;
}

absl::Status WarmUp(const ModelConfig& config, const Model& model) {
  // Some models divide by what is 0 for zeros.
  for (const float fill : {0.0f, 1.0f}) {
    std::vector<Tensor> inputs;
    for (const ModelInput& input : config.inputs()) {
      std::vector<int64_t> shape = {1};
      shape.insert(shape.end(), input.shape().begin(), input.shape().end());
      inputs.push_back(Tensor::Zeros(input.dtype(), std::move(shape)));
      if (input.dtype() != DT_FLOAT) continue;
      const auto values = inputs.back().As<float>();
      std::fill(values.begin(), values.end(), fill);
    }
    Model::States states;
    const absl::StatusOr<Model::Logits> logits = model.Predict(inputs, &states);
    if (!logits.ok()) return Annotate(logits.status(), "warming up");
    if (!HasBad(static_cast<const float*>(logits->values.data()), logits->values.elements(),
                /*infinite=*/true)) {
      return absl::OkStatus();
    }
  }
  return absl::DataLossError(
      "warming up: the logits of an example of zeros are not finite, nor those of one of ones");
}

absl::Status PrepareModel(const ModelConfig& config, DataType weights, Model* model) {
  CODISTILL_RETURN_IF_ERROR(CheckWeights(*model));
  RoundWeights(weights, model);
  CODISTILL_RETURN_IF_ERROR(model->UseWeights(0));
  return WarmUp(config, *model);
}

}  // namespace codistill
