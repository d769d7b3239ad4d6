#include "worker/inference_messages.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/model/inputs.h"
#include "common/rpc/frame.h"
#include "proto/open_inference.pb.h"
#include "worker/external_answer.h"
#include "worker/output_reader.h"

namespace codistill {
namespace {

constexpr int kRawInputField = 7;   // ModelInferRequest.raw_input_contents
constexpr int kRawOutputField = 6;  // ModelInferResponse.raw_output_contents

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

// Servers give logits as FP32 to those who do not say otherwise.
void AddFormat(const AnswerFormat& format, ModelInferRequest* request) {
  auto& parameters = *request->mutable_parameters();
  if (format.dtype != DT_FLOAT) {
    parameters["format"].set_string_param(std::string(DataTypeName(format.dtype)));
  }
  if (format.top_k > 0) {
    parameters["top_k"].set_int64_param(format.top_k);
    parameters["temperature"].set_double_param(format.temperature);
  }
}

}  // namespace

AnswerFormat AnswerFormatOf(const CodistillationConfig& config) {
  AnswerFormat format;
  format.dtype = config.teacher_dtype();
  if (config.teacher_output() == CodistillationConfig::TOP_K) {
    format.top_k = config.top_k();
    format.temperature = config.temperature();
  }
  return format;
}

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
  if (!dialect.external()) AddFormat(question.format, &request);
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

  const AnswerFormat& format = question.format;
  const int64_t rows = question.batch->rows;
  if (format.top_k > 0) {
    CODISTILL_ASSIGN_OR_RETURN(answer.top_k,
                               reader.TopK(rows, config.num_outputs(), format.top_k, format.dtype));
  } else {
    CODISTILL_ASSIGN_OR_RETURN(answer.logits,
                               reader.Logits(rows, config.num_outputs(), format.dtype));
  }
  for (const RecurrentState& state : config.states()) {
    CODISTILL_ASSIGN_OR_RETURN(
        Tensor value, reader.Floats(state.name(), StateShape(state, question.batch->examples)));
    answer.states.push_back(std::move(value));
  }

  answer.generation = static_cast<uint64_t>(IntParameter(response, "generation"));
  answer.step = IntParameter(response, "step");
  answer.latest_step = IntParameter(response, "latest_step");
  return answer;
}

}  // namespace codistill
