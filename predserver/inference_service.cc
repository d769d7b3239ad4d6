#include "predserver/inference_service.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/daemon/version.h"
#include "common/rpc/unary_call.h"
#include "predserver/inference_codec.h"

namespace codistill {
namespace {

using InferCall = UnaryCall<grpc::ByteBuffer, grpc::ByteBuffer>;
using TensorMetadata = inference::ModelMetadataResponse::TensorMetadata;

void Describe(const std::string& name, DataType dtype, TensorMetadata* metadata) {
  metadata->set_name(name);
  metadata->set_datatype(std::string(DataTypeName(dtype)));
}

void DescribeModel(const ModelConfig& config, inference::ModelMetadataResponse* response) {
  for (const ModelInput& input : config.inputs()) {
    TensorMetadata* metadata = response->add_inputs();
    Describe(input.name(), input.dtype(), metadata);
    metadata->add_shape(-1);
    metadata->mutable_shape()->MergeFrom(input.shape());
  }
  TensorMetadata* logits = response->add_outputs();
  Describe(kLogitsOutput, DT_FLOAT, logits);
  logits->add_shape(-1);
  logits->add_shape(config.num_outputs());
  for (const RecurrentState& state : config.states()) {
    for (TensorMetadata* metadata : {response->add_inputs(), response->add_outputs()}) {
      Describe(state.name(), DT_FLOAT, metadata);
      *metadata->mutable_shape() = state.shape();
    }
  }
}

}  // namespace

grpc::ServerUnaryReactor* InferenceService::ServerLive(grpc::CallbackServerContext* context,
                                                       const inference::ServerLiveRequest*,
                                                       inference::ServerLiveResponse* response) {
  response->set_live(true);
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ServerReady(grpc::CallbackServerContext* context,
                                                        const inference::ServerReadyRequest*,
                                                        inference::ServerReadyResponse* response) {
  response->set_ready(predictor_->Ready(predictor_->model(), "").ok());
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ModelReady(grpc::CallbackServerContext* context,
                                                       const inference::ModelReadyRequest* request,
                                                       inference::ModelReadyResponse* response) {
  response->set_ready(predictor_->Ready(request->name(), request->version()).ok());
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ServerMetadata(
    grpc::CallbackServerContext* context, const inference::ServerMetadataRequest*,
    inference::ServerMetadataResponse* response) {
  response->set_name("codistill");
  response->set_version(kVersion);
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ModelMetadata(
    grpc::CallbackServerContext* context, const inference::ModelMetadataRequest* request,
    inference::ModelMetadataResponse* response) {
  // What a model takes and gives is known before a version is loaded.
  const absl::Status ready = predictor_->Ready(request->name(), request->version());
  if (absl::IsNotFound(ready)) return AnswerUnary(context, ready);
  response->set_name(predictor_->model());
  if (const std::string held = predictor_->held_version(); !held.empty()) {
    response->add_versions(held);
  }
  response->set_platform("codistill_torchscript");
  DescribeModel(predictor_->config(), response);
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ModelInfer(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request,
                                                       grpc::ByteBuffer* response) {
  const InferCall::Ptr call = InferCall::Start(context, request, response, &registry_);
  grpc::ServerUnaryReactor* const reactor = call->reactor();
  // A copy: the call, and the request with it, may be over before it is computed.
  absl::StatusOr<InferenceRequest> decoded = DecodeInferenceRequest(grpc::ByteBuffer(*request));
  if (!decoded.ok()) {
    call->Finish(decoded.status());
    return reactor;
  }
  PredictionRequest& prediction = decoded->prediction;
  prediction.deadline = call->deadline();
  prediction.cancelled = [call] { return call->ended(); };
  predictor_->Predict(std::move(prediction), [this, call, id = std::move(decoded->id)](
                                                 const absl::StatusOr<Prediction>& result) {
    if (result.ok()) {
      call->FinishWith(EncodeInferenceResponse(predictor_->model(), id, *result));
    } else {
      call->Finish(result.status());
    }
  });
  return reactor;
}

}  // namespace codistill
