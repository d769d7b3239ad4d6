#include "worker/inference_messages.h"

#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "common/model/inputs.h"
#include "common/rpc/frame.h"
#include "proto/open_inference.pb.h"
#include "worker/external_answer.h"

namespace codistill {
namespace {

constexpr int kRawInputField = 7;   // ModelInferRequest.raw_input_contents
constexpr int kRawOutputField = 6;  // ModelInferResponse.raw_output_contents
constexpr char kLogits[] = "logits";

using inference::ModelInferRequest;
using inference::ModelInferResponse;

void AddInput(const std::string& name, const Tensor& tensor, ModelInferRequest* request,
              std::vector<PayloadRef>* payloads) {
  auto* input = request->add_inputs();
  input->set_name(name);
  input->set_datatype(std::string(DataTypeName(tensor.dtype())));
  for (int64_t dimension : tensor.shape()) input->add_shape(dimension);
  payloads->push_back({tensor.data(), tensor.bytes(), tensor.owner()});
}

// An integer parameter, however the server chose to write it.
int64_t IntParameter(const ModelInferResponse& response, const char* name) {
  auto found = response.parameters().find(name);
  if (found == response.parameters().end()) return 0;
  const inference::InferParameter& parameter = found->second;
  switch (parameter.parameter_choice_case()) {
    case inference::InferParameter::kInt64Param:
      return parameter.int64_param();
    case inference::InferParameter::kUint64Param:
      return static_cast<int64_t>(parameter.uint64_param());
    case inference::InferParameter::kDoubleParam:
      return static_cast<int64_t>(parameter.double_param());
    case inference::InferParameter::kStringParam: {
      int64_t value = 0;
      return absl::SimpleAtoi(parameter.string_param(), &value) ? value : 0;
    }
    default:
      return 0;
  }
}

// Takes outputs out of a response.
class OutputReader {
 public:
  OutputReader(const ModelInferResponse& response, const DecodedPayload& payload)
      : response_(response), payload_(payload) {}

  absl::StatusOr<int> Find(const std::string& name) const {
    std::vector<std::string> names;
    for (int i = 0; i < response_.outputs_size(); ++i) {
      if (response_.outputs(i).name() == name) return i;
      names.push_back(response_.outputs(i).name());
    }
    return absl::InvalidArgumentError(absl::StrCat(
        "the answer has no output \"", name, "\"; it has [", absl::StrJoin(names, ", "), "]"));
  }

  absl::StatusOr<Tensor> Read(int index, std::vector<int64_t> shape) const {
    const auto& output = response_.outputs(index);
    if (output.datatype() != DataTypeName(DT_FLOAT)) {
      return absl::InvalidArgumentError(absl::StrCat("output \"", output.name(), "\" is ",
                                                     output.datatype(), "; FP32 is expected"));
    }
    Tensor tensor = Tensor::Allocate(DT_FLOAT, std::move(shape));
    // The protocol has two forms of contents: raw bytes for all outputs, or typed lists in each.
    if (payload_.count() == 0 && output.has_contents()) {
      const auto& values = output.contents().fp32_contents();
      if (values.size() != tensor.elements()) {
        return LengthError(output.name(), values.size() * sizeof(float), tensor.bytes());
      }
      std::memcpy(tensor.data(), values.data(), tensor.bytes());
      return tensor;
    }
    if (index >= payload_.count()) {
      return absl::InvalidArgumentError(
          absl::StrCat("the answer declares ", response_.outputs_size(), " outputs and brings ",
                       payload_.count(), " raw contents; \"", output.name(), "\" has none"));
    }
    if (payload_.size(index) != tensor.bytes()) {
      return LengthError(output.name(), payload_.size(index), tensor.bytes());
    }
    payload_.CopyTo(index, tensor.data());
    return tensor;
  }

 private:
  static absl::Status LengthError(const std::string& name, size_t got, size_t wanted) {
    return absl::InvalidArgumentError(
        absl::StrCat("output \"", name, "\" has ", got, " bytes where its shape takes ", wanted));
  }

  const ModelInferResponse& response_;
  const DecodedPayload& payload_;
};

std::vector<int64_t> ShapeOf(const ModelInferResponse::InferOutputTensor& output) {
  return {output.shape().begin(), output.shape().end()};
}

// [..., num_outputs] with rows x num_outputs values in all; a single output may leave its dimension
// out.
absl::Status CheckLogitsShape(const std::vector<int64_t>& shape, int64_t rows, int64_t outputs) {
  const bool ends_right = outputs == 1 || (!shape.empty() && shape.back() == outputs);
  if (ends_right && ElementCount(shape) == rows * outputs) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("output \"", kLogits, "\" has the shape ",
                                                 ShapeString(shape), "; ",
                                                 ShapeString({rows, outputs}), " is expected"));
}

}  // namespace

grpc::ByteBuffer EncodeQuestion(const InferenceQuestion& question) {
  ModelInferRequest request;
  std::vector<PayloadRef> payloads;
  const TeacherDialect& dialect = *question.dialect;
  request.set_model_name(dialect.model);
  request.set_model_version(dialect.version);
  request.set_id(absl::StrCat(question.batch->generation, ".", question.batch->step));
  if (dialect.codistill_server && question.max_staleness_steps >= 0) {
    (*request.mutable_parameters())["max_staleness_steps"].set_int64_param(
        question.max_staleness_steps);
  }
  for (int i = 0; i < question.config->inputs_size(); ++i) {
    AddInput(dialect.inputs.empty() ? question.config->inputs(i).name() : dialect.inputs[i],
             question.batch->inputs[i], &request, &payloads);
  }
  for (int i = 0; i < question.config->states_size(); ++i) {
    const RecurrentState& state = question.config->states(i);
    AddInput(state.name(),
             question.states.empty()
                 ? Tensor::Zeros(DT_FLOAT, StateShape(state, question.batch->examples))
                 : question.states[i],
             &request, &payloads);
  }
  if (dialect.codistill_server && !question.batch->example_ids.empty()) {
    AddInput("example_id", question.batch->example_ids, &request, &payloads);
  }
  if (dialect.external()) {
    // Whatever else the model gives need not travel.
    request.add_outputs()->set_name(dialect.output);
    for (const RecurrentState& state : question.config->states()) {
      request.add_outputs()->set_name(state.name());
    }
  }
  return EncodeWithPayload(request, kRawInputField, payloads);
}

absl::StatusOr<InferenceAnswer> DecodeAnswer(grpc::ByteBuffer* buffer,
                                             const InferenceQuestion& question) {
  if (question.dialect->external()) return DecodeExternalAnswer(buffer, question);
  ModelInferResponse response;
  DecodedPayload payload;
  CODISTILL_RETURN_IF_ERROR(DecodedPayload::Decode(buffer, kRawOutputField, &response, &payload));
  const ModelConfig& config = *question.config;
  const OutputReader reader(response, payload);
  InferenceAnswer answer;

  CODISTILL_ASSIGN_OR_RETURN(const int logits, reader.Find(kLogits));
  CODISTILL_RETURN_IF_ERROR(CheckLogitsShape(ShapeOf(response.outputs(logits)),
                                             question.batch->rows, config.num_outputs()));
  CODISTILL_ASSIGN_OR_RETURN(answer.logits,
                             reader.Read(logits, {question.batch->rows, config.num_outputs()}));

  for (const RecurrentState& state : config.states()) {
    CODISTILL_ASSIGN_OR_RETURN(const int index, reader.Find(state.name()));
    const std::vector<int64_t> shape = StateShape(state, question.batch->examples);
    if (ShapeOf(response.outputs(index)) != shape) {
      return absl::InvalidArgumentError(absl::StrCat("output \"", state.name(), "\" has the shape ",
                                                     ShapeString(ShapeOf(response.outputs(index))),
                                                     "; ", ShapeString(shape), " is expected"));
    }
    CODISTILL_ASSIGN_OR_RETURN(Tensor value, reader.Read(index, shape));
    answer.states.push_back(std::move(value));
  }

  answer.generation = static_cast<uint64_t>(IntParameter(response, "generation"));
  answer.step = IntParameter(response, "step");
  answer.latest_step = IntParameter(response, "latest_step");
  return answer;
}

}  // namespace codistill
