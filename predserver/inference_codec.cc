#include "predserver/inference_codec.h"

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/rpc/frame.h"
#include "proto/open_inference.pb.h"

namespace codistill {
namespace {

using inference::InferParameter;
using inference::InferTensorContents;
using inference::ModelInferRequest;
using inference::ModelInferResponse;

constexpr int kRawInputField = ModelInferRequest::kRawInputContentsFieldNumber;
constexpr int kRawOutputField = ModelInferResponse::kRawOutputContentsFieldNumber;

// Everything that the parts of a request's inputs point into.
struct Contents {
  DecodedPayload raw;
  std::vector<std::string> typed;
};

template <typename T, typename Values>
std::string Packed(const Values& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  char* to = bytes.data();
  for (const auto value : values) {
    const T element = static_cast<T>(value);
    std::memcpy(to, &element, sizeof(T));
    to += sizeof(T);
  }
  return bytes;
}

// The bytes that raw contents would have had. Types without a field of their own (FP16, BF16)
// travel raw only.
absl::StatusOr<std::string> PackTyped(const std::string& name, const std::string& datatype,
                                      const InferTensorContents& contents) {
  switch (DataTypeFromName(datatype)) {
    case DT_FLOAT:
      return Packed<float>(contents.fp32_contents());
    case DT_DOUBLE:
      return Packed<double>(contents.fp64_contents());
    case DT_INT32:
      return Packed<int32_t>(contents.int_contents());
    case DT_INT64:
      return Packed<int64_t>(contents.int64_contents());
    case DT_INT8:
      return Packed<int8_t>(contents.int_contents());
    case DT_UINT8:
      return Packed<uint8_t>(contents.uint_contents());
    case DT_BOOL:
      return Packed<bool>(contents.bool_contents());
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("input ", name, ": datatype \"", datatype,
                       "\" has no typed contents; send raw_input_contents"));
  }
}

absl::StatusOr<int64_t> MaxStaleness(const ModelInferRequest& request) {
  constexpr char kName[] = "max_staleness_steps";
  const auto found = request.parameters().find(kName);
  if (found == request.parameters().end()) return -1;
  const InferParameter& parameter = found->second;
  int64_t value = -1;
  switch (parameter.parameter_choice_case()) {
    case InferParameter::kInt64Param:
      value = parameter.int64_param();
      break;
    case InferParameter::kUint64Param:
      value = static_cast<int64_t>(parameter.uint64_param() & INT64_MAX);
      break;
    case InferParameter::kStringParam:
      if (!absl::SimpleAtoi(parameter.string_param(), &value)) value = -1;
      break;
    default:
      break;
  }
  if (value < 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "parameter ", kName, ": ", parameter.ShortDebugString(), "; it must be an integer >= 0"));
  }
  return value;
}

void SetInt64(const char* name, int64_t value, ModelInferResponse* response) {
  (*response->mutable_parameters())[name].set_int64_param(value);
}

}  // namespace

absl::StatusOr<InferenceRequest> DecodeInferenceRequest(grpc::ByteBuffer buffer) {
  auto contents = std::make_shared<Contents>();
  ModelInferRequest message;
  CODISTILL_RETURN_IF_ERROR(
      DecodedPayload::Decode(&buffer, kRawInputField, &message, &contents->raw));
  const int raw_count = contents->raw.count();
  if (raw_count > 0 && raw_count != message.inputs_size()) {
    return absl::InvalidArgumentError(absl::StrCat("raw_input_contents: has ", raw_count,
                                                   " entries for ", message.inputs_size(),
                                                   " inputs; it must have one for each"));
  }

  InferenceRequest request;
  request.id = message.id();
  PredictionRequest& prediction = request.prediction;
  prediction.model = message.model_name();
  prediction.version = message.model_version();
  CODISTILL_ASSIGN_OR_RETURN(prediction.max_staleness_steps, MaxStaleness(message));
  for (const auto& output : message.outputs()) prediction.outputs.push_back(output.name());
  contents->typed.resize(message.inputs_size());
  for (int i = 0; i < message.inputs_size(); ++i) {
    const auto& from = message.inputs(i);
    PredictionRequest::Input& input = prediction.inputs.emplace_back();
    input.name = from.name();
    input.datatype = from.datatype();
    input.shape.assign(from.shape().begin(), from.shape().end());
    if (raw_count > 0) {
      if (from.has_contents()) {
        return absl::InvalidArgumentError(absl::StrCat(
            "input ", from.name(), ": has contents although raw_input_contents is used"));
      }
      const auto parts = contents->raw.parts(i);
      input.parts.assign(parts.begin(), parts.end());
    } else {
      CODISTILL_ASSIGN_OR_RETURN(contents->typed[i],
                                 PackTyped(from.name(), from.datatype(), from.contents()));
      const std::string& bytes = contents->typed[i];
      input.parts.emplace_back(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    }
  }
  prediction.owner = std::move(contents);
  return request;
}

grpc::ByteBuffer EncodeInferenceResponse(const std::string& model, const std::string& id,
                                         const Prediction& prediction) {
  ModelInferResponse response;
  response.set_model_name(model);
  response.set_model_version(
      absl::StrCat(prediction.version.generation(), ".", prediction.version.step()));
  response.set_id(id);
  SetInt64("generation", static_cast<int64_t>(prediction.version.generation()), &response);
  SetInt64("step", prediction.version.step(), &response);
  SetInt64("latest_step", prediction.latest_step, &response);
  SetInt64("staleness_steps", prediction.staleness_steps, &response);
  SetInt64("age_ms", absl::ToInt64Milliseconds(prediction.age), &response);
  (*response.mutable_parameters())["precision"].set_string_param(
      std::string(DataTypeName(prediction.precision)));
  std::vector<PayloadRef> payloads;
  for (const NamedTensor& output : prediction.outputs) {
    auto* to = response.add_outputs();
    to->set_name(output.name);
    to->set_datatype(std::string(DataTypeName(output.tensor.dtype())));
    for (int64_t size : output.tensor.shape()) to->add_shape(size);
    payloads.push_back({output.tensor.data(), output.tensor.bytes(), output.tensor.owner()});
  }
  return EncodeWithPayload(response, kRawOutputField, payloads);
}

}  // namespace codistill
