#include "worker/external_answer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "common/model/inputs.h"
#include "common/rpc/frame.h"
#include "common/tensor/float16.h"
#include "proto/open_inference.pb.h"

namespace codistill {
namespace {

constexpr int kRawOutputField = 6;  // ModelInferResponse.raw_output_contents
constexpr float kLeastProbability = 1e-10f;
// Rounding, of sums over classes in half precision above all, may lead a little over 1.
constexpr float kMostProbability = 1.01f;

using inference::ModelInferResponse;

absl::Status LengthError(const std::string& name, size_t got, size_t wanted) {
  return absl::InvalidArgumentError(
      absl::StrCat("output \"", name, "\" has ", got, " bytes where its shape takes ", wanted));
}

// Output `name` as FP32 of `shape`. `flat`: any shape of as many values that ends in the same
// dimension will do, and a last dimension of 1 may be left out.
absl::StatusOr<Tensor> ReadOutput(const ModelInferResponse& response, const DecodedPayload& payload,
                                  const std::string& name, std::vector<int64_t> shape, bool flat) {
  int index = 0;
  std::vector<std::string> names;
  while (index < response.outputs_size() && response.outputs(index).name() != name) {
    names.push_back(response.outputs(index++).name());
  }
  if (index == response.outputs_size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the answer has no output \"", name, "\"; it has [", absl::StrJoin(names, ", "), "]"));
  }
  const auto& output = response.outputs(index);
  const std::vector<int64_t> given(output.shape().begin(), output.shape().end());
  const bool fits =
      flat ? ElementCount(given) == ElementCount(shape) &&
                 (shape.back() == 1 || (!given.empty() && given.back() == shape.back()))
           : given == shape;
  if (!fits) {
    return absl::InvalidArgumentError(absl::StrCat("output \"", name, "\" has the shape ",
                                                   ShapeString(given), "; ", ShapeString(shape),
                                                   " is expected"));
  }
  const DataType dtype = DataTypeFromName(output.datatype());
  if (dtype != DT_FLOAT && dtype != DT_HALF) {
    return absl::InvalidArgumentError(
        absl::StrCat("output \"", name, "\" is ", output.datatype(), "; FP32 or FP16 is expected"));
  }
  Tensor tensor = Tensor::Allocate(DT_FLOAT, std::move(shape));
  const size_t bytes = static_cast<size_t>(tensor.elements()) * ElementSize(dtype);
  // The protocol has two forms of contents: raw bytes for all outputs, or typed lists in each. The
  // typed form has no list for FP16.
  if (payload.count() == 0 && dtype == DT_FLOAT && output.has_contents()) {
    const auto& values = output.contents().fp32_contents();
    if (values.size() != tensor.elements()) {
      return LengthError(name, values.size() * sizeof(float), bytes);
    }
    std::memcpy(tensor.data(), values.data(), bytes);
    return tensor;
  }
  if (index >= payload.count()) {
    return absl::InvalidArgumentError(absl::StrCat("the answer declares ", response.outputs_size(),
                                                   " outputs and brings ", payload.count(),
                                                   " raw contents; \"", name, "\" has none"));
  }
  if (payload.size(index) != bytes) return LengthError(name, payload.size(index), bytes);
  if (dtype == DT_FLOAT) {
    payload.CopyTo(index, tensor.data());
    return tensor;
  }
  std::vector<uint16_t> halves(tensor.elements());
  payload.CopyTo(index, halves.data());
  FromFloat16(halves.data(), halves.size(), tensor.As<float>().data());
  return tensor;
}

absl::Status CheckAnswerer(const ModelInferResponse& response, const TeacherDialect& dialect) {
  if (!response.model_name().empty() && response.model_name() != dialect.model) {
    return absl::InvalidArgumentError(absl::StrCat("answered by model \"", response.model_name(),
                                                   "\"; \"", dialect.model, "\" was asked"));
  }
  if (!dialect.version.empty() && !response.model_version().empty() &&
      response.model_version() != dialect.version) {
    return absl::InvalidArgumentError(
        absl::StrCat("model \"", dialect.model, "\" answered with version \"",
                     response.model_version(), "\"; \"", dialect.version, "\" was asked for"));
  }
  return absl::OkStatus();
}

int64_t IntParameter(const ModelInferResponse& response, const char* name) {
  const auto found = response.parameters().find(name);
  return found == response.parameters().end() ? 0 : found->second.int64_param();
}

}  // namespace

absl::Status LogitsOfProbabilities(LabelLoss label_loss, absl::Span<float> values) {
  for (size_t i = 0; i < values.size(); ++i) {
    // Also false for what is not a number.
    if (!(values[i] >= 0 && values[i] <= kMostProbability)) {
      return absl::InvalidArgumentError(
          absl::StrCat("value ", i, " is ", values[i], ", which is no probability"));
    }
  }
  if (label_loss == SIGMOID_CROSS_ENTROPY) {
    // In double: 1 - 1e-10 is no float.
    for (float& p : values) {
      const double q = std::min(std::max<double>(p, kLeastProbability), 1.0 - kLeastProbability);
      p = static_cast<float>(std::log(q / (1 - q)));
    }
  } else {
    for (float& p : values) p = std::log(std::max(p, kLeastProbability));
  }
  return absl::OkStatus();
}

absl::StatusOr<InferenceAnswer> DecodeExternalAnswer(grpc::ByteBuffer* buffer,
                                                     const InferenceQuestion& question) {
  const TeacherDialect& dialect = *question.dialect;
  const ModelConfig& config = *question.config;
  ModelInferResponse response;
  DecodedPayload payload;
  CODISTILL_RETURN_IF_ERROR(DecodedPayload::Decode(buffer, kRawOutputField, &response, &payload));
  CODISTILL_RETURN_IF_ERROR(CheckAnswerer(response, dialect));
  InferenceAnswer answer;
  CODISTILL_ASSIGN_OR_RETURN(answer.logits, ReadOutput(response, payload, dialect.output,
                                                       {question.batch->rows, config.num_outputs()},
                                                       /*flat=*/true));
  if (dialect.probabilities) {
    CODISTILL_RETURN_IF_ERROR(
        Annotate(LogitsOfProbabilities(config.label_loss(), answer.logits.As<float>()),
                 absl::StrCat("output \"", dialect.output, "\"")));
  }
  for (const RecurrentState& state : config.states()) {
    CODISTILL_ASSIGN_OR_RETURN(Tensor value, ReadOutput(response, payload, state.name(),
                                                        StateShape(state, question.batch->examples),
                                                        /*flat=*/false));
    answer.states.push_back(std::move(value));
  }
  if (dialect.codistill_server) {
    answer.generation = static_cast<uint64_t>(IntParameter(response, "generation"));
    answer.step = IntParameter(response, "step");
    answer.latest_step = IntParameter(response, "latest_step");
  }
  return answer;
}

}  // namespace codistill
