#include "tests/integration/inference_client.h"

#include <cstring>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "proto/open_inference.grpc.pb.h"

namespace codistill {
namespace {

absl::StatusOr<int64_t> Parameter(const inference::ModelInferResponse& response,
                                  const std::string& name) {
  const auto it = response.parameters().find(name);
  if (it == response.parameters().end() || !it->second.has_int64_param()) {
    return absl::NotFoundError(absl::StrCat("no integer parameter ", name, " in the answer"));
  }
  return it->second.int64_param();
}

}  // namespace

absl::StatusOr<Inference> Infer(const std::string& address, const std::string& model,
                                const std::vector<NamedTensor>& inputs, absl::Duration timeout) {
  inference::ModelInferRequest request;
  request.set_model_name(model);
  request.set_id("one of a test");
  request.add_outputs()->set_name("logits");
  for (const NamedTensor& input : inputs) {
    auto* tensor = request.add_inputs();
    tensor->set_name(input.name);
    tensor->set_datatype(std::string(DataTypeName(input.tensor.dtype())));
    for (const int64_t d : input.tensor.shape()) tensor->add_shape(d);
    request.add_raw_input_contents(input.tensor.data(), input.tensor.bytes());
  }
  inference::ModelInferResponse response;
  const auto stub =
      inference::GRPCInferenceService::NewStub(MakeChannel(address, ChannelUse::kPrediction));
  const auto context = MakeContext(absl::Now() + timeout);
  const grpc::Status status = stub->ModelInfer(context.get(), request, &response);
  if (!status.ok()) return FromGrpcStatus(status);

  if (response.model_name() != model || response.id() != request.id()) {
    return absl::InternalError(
        absl::StrCat("an answer to another request: ", response.model_name(), " ", response.id()));
  }
  if (response.outputs_size() != 1 || response.outputs(0).name() != "logits" ||
      response.outputs(0).datatype() != "FP32" || response.raw_output_contents_size() != 1) {
    return absl::InternalError(
        absl::StrCat("not one FP32 output logits: ", response.outputs_size(), " outputs"));
  }
  Inference answer;
  const auto& output = response.outputs(0);
  const std::vector<int64_t> shape(output.shape().begin(), output.shape().end());
  const std::string& raw = response.raw_output_contents(0);
  const int64_t elements = ElementCount(shape);
  if (elements < 0 || raw.size() != static_cast<size_t>(elements) * sizeof(float)) {
    return absl::InternalError(
        absl::StrCat(raw.size(), " bytes of logits for the shape ", ShapeString(shape)));
  }
  answer.logits = Tensor::Allocate(DT_FLOAT, shape);
  std::memcpy(answer.logits.data(), raw.data(), raw.size());
  answer.model_version = response.model_version();
  for (const auto& [name, field] :
       {std::pair<const char*, int64_t*>{"generation", &answer.generation},
        {"step", &answer.step},
        {"latest_step", &answer.latest_step},
        {"staleness_steps", &answer.staleness_steps}}) {
    const absl::StatusOr<int64_t> value = Parameter(response, name);
    if (!value.ok()) return value.status();
    *field = *value;
  }
  return answer;
}

}  // namespace codistill
