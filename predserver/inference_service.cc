#include "predserver/inference_service.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "common/daemon/version.h"
#include "common/rpc/channel.h"
#include "common/rpc/unary_call.h"
#include "predserver/inference_stream.h"
#include "predserver/model_description.h"

namespace codistill {
namespace {

using InferCall = UnaryCall<grpc::ByteBuffer, grpc::ByteBuffer>;

// What a response may have beside its tensors.
constexpr size_t kHeadroomBytes = 64 << 10;

constexpr const char* kExtensions[] = {"model_configuration", "parameters", "statistics"};

}  // namespace

InferenceService::InferenceService(ModelRepository* models, PredictionConfig prediction,
                                   size_t max_unread_bytes)
    : models_(models),
      prediction_(std::move(prediction)),
      unread_(max_unread_bytes, kMaxUnreadClients * max_unread_bytes) {}

absl::StatusOr<const Predictor*> InferenceService::FindVersion(const std::string& model,
                                                               const std::string& version) const {
  CODISTILL_ASSIGN_OR_RETURN(const Predictor* const found, models_->Find(model));
  const absl::Status ready = found->Ready(version);
  if (absl::IsNotFound(ready)) return ready;
  return found;
}

grpc::ServerUnaryReactor* InferenceService::ServerLive(grpc::CallbackServerContext* context,
                                                       const inference::ServerLiveRequest*,
                                                       inference::ServerLiveResponse* response) {
  response->set_live(true);
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ServerReady(grpc::CallbackServerContext* context,
                                                        const inference::ServerReadyRequest*,
                                                        inference::ServerReadyResponse* response) {
  response->set_ready(models_->Ready().ok());
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ModelReady(grpc::CallbackServerContext* context,
                                                       const inference::ModelReadyRequest* request,
                                                       inference::ModelReadyResponse* response) {
  const absl::StatusOr<Predictor*> model = models_->Find(request->name());
  response->set_ready(model.ok() && (*model)->Ready(request->version()).ok());
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ServerMetadata(
    grpc::CallbackServerContext* context, const inference::ServerMetadataRequest*,
    inference::ServerMetadataResponse* response) {
  response->set_name("codistill");
  response->set_version(kVersion);
  for (const char* extension : kExtensions) response->add_extensions(extension);
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ModelMetadata(
    grpc::CallbackServerContext* context, const inference::ModelMetadataRequest* request,
    inference::ModelMetadataResponse* response) {
  // What a model takes and gives is known before a version is loaded.
  const absl::StatusOr<const Predictor*> model = FindVersion(request->name(), request->version());
  if (!model.ok()) return AnswerUnary(context, model.status());
  response->set_name((*model)->model());
  for (const std::string& held : (*model)->held_versions()) response->add_versions(held);
  DescribeModel((*model)->config(), response);
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ModelConfig(
    grpc::CallbackServerContext* context, const inference::ModelConfigRequest* request,
    inference::ModelConfigResponse* response) {
  const absl::StatusOr<const Predictor*> model = FindVersion(request->name(), request->version());
  if (!model.ok()) return AnswerUnary(context, model.status());
  response->mutable_config()->set_name(request->name());
  DescribeConfig((*model)->config(), prediction_, response->mutable_config());
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::ModelStatistics(
    grpc::CallbackServerContext* context, const inference::ModelStatisticsRequest* request,
    inference::ModelStatisticsResponse* response) {
  std::vector<const Predictor*> asked(models_->models().begin(), models_->models().end());
  if (!request->name().empty()) {
    const absl::StatusOr<const Predictor*> model = FindVersion(request->name(), request->version());
    if (!model.ok()) return AnswerUnary(context, model.status());
    asked = {*model};
  }
  for (const Predictor* model : asked) {
    auto* const statistics = response->add_model_stats();
    statistics->set_name(model->model());
    const std::vector<std::string> held = model->held_versions();
    if (!held.empty()) statistics->set_version(held[0]);
    DescribeStatistics(model->statistics(), statistics);
  }
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::RepositoryIndex(
    grpc::CallbackServerContext* context, const inference::RepositoryIndexRequest* request,
    inference::RepositoryIndexResponse* response) {
  if (!request->repository_name().empty()) {
    return AnswerUnary(
        context, absl::NotFoundError(absl::StrCat("no repository \"", request->repository_name(),
                                                  "\"; there is one, without a name")));
  }
  for (const Predictor* predictor : models_->models()) {
    const absl::Status ready = predictor->Ready("");
    if (request->ready() && !ready.ok()) continue;
    const std::vector<std::string> held = predictor->held_versions();
    auto* const model = response->add_models();
    model->set_name(predictor->model());
    if (!held.empty()) model->set_version(held[0]);
    model->set_state(ready.ok() ? "READY" : held.empty() ? "LOADING" : "UNAVAILABLE");
    model->set_reason(std::string(ready.message()));
  }
  return AnswerUnary(context, absl::OkStatus());
}

InferenceService::Caller InferenceService::CallerOf(const grpc::CallbackServerContext& context,
                                                    absl::Time deadline,
                                                    std::function<bool()> gone) {
  std::string client = context.peer();
  std::shared_ptr<UnreadResponses::Account> account = unread_.Find(client);
  return {std::move(client), std::move(account), deadline, std::move(gone)};
}

void InferenceService::Infer(grpc::ByteBuffer message, Caller caller, Respond respond) {
  auto request = std::make_shared<InferenceRequest>();
  RequestHead head = PeekHead(message);
  absl::Status status = caller.account->Check();
  if (status.ok()) {
    // What there is no room for is refused before it costs anything.
    const absl::StatusOr<Predictor*> model = models_->Find(head.model);
    if (model.ok()) {
      status = (*model)->CheckRoom(caller.client, static_cast<int64_t>(message.Length()));
    }
  }
  if (status.ok()) status = DecodeInferenceRequest(std::move(message), request.get());
  if (!status.ok()) {
    if (request->id.empty()) request->id = std::move(head.id);
    respond(*request, status, {});
    return;
  }
  PredictionRequest prediction = std::move(request->prediction);
  prediction.client = std::move(caller.client);
  prediction.deadline = std::min(caller.deadline, absl::Now() + request->timeout);
  const std::shared_ptr<UnreadResponses::Account> account = std::move(caller.account);
  // Who reads nothing is not computed for, whatever was accepted before.
  prediction.cancelled = [account, gone = std::move(caller.gone)] {
    return gone() || account->full();
  };
  std::string model = prediction.model;
  models_->Predict(std::move(prediction), [model = std::move(model), request, account,
                                           respond = std::move(respond)](
                                              const absl::StatusOr<Prediction>& result) {
    if (!result.ok()) {
      const absl::Status unread = account->Check();
      respond(*request,
              absl::IsCancelled(result.status()) && !unread.ok() ? unread : result.status(), {});
      return;
    }
    const size_t bytes = ResponseBytes(*result);
    // Predictor::Options::outputs sees to it before anything is computed.
    if (bytes + kHeadroomBytes > kMaxPredictionBytes) {
      respond(*request,
              absl::InvalidArgumentError(absl::StrCat(
                  "the outputs asked for are ", bytes, " bytes; a response has at most ",
                  kMaxPredictionBytes - kHeadroomBytes,
                  ": send fewer rows, or ask for top-k or a smaller format")),
              {});
      return;
    }
    if (absl::Status room = account->CheckRoomFor(bytes); !room.ok()) {
      respond(*request, room, {});
      return;
    }
    respond(*request, absl::OkStatus(),
            EncodeInferenceResponse(model, *request, *result,
                                    UnreadResponses::Account::Hold(account, bytes)));
  });
}

grpc::ServerUnaryReactor* InferenceService::ModelInfer(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request,
                                                       grpc::ByteBuffer* response) {
  const InferCall::Ptr call = InferCall::Start(context, request, response, &registry_);
  grpc::ServerUnaryReactor* const reactor = call->reactor();
  // Taken out of the call, which may be over before it is computed, or keep what is not needed any
  // more until it is.
  grpc::ByteBuffer message;
  message.Swap(const_cast<grpc::ByteBuffer*>(request));
  Infer(
      std::move(message), CallerOf(*context, call->deadline(), [call] { return call->ended(); }),
      [call](const InferenceRequest&, const absl::Status& status, const grpc::ByteBuffer& answer) {
        status.ok() ? call->FinishWith(answer) : call->Finish(status);
      });
  return reactor;
}

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* InferenceService::ModelStreamInfer(
    grpc::CallbackServerContext* context) {
  // As of every call, what is asked of the context is asked here: it does not outlive the call.
  const Caller caller = CallerOf(*context, absl::FromChrono(context->deadline()), nullptr);
  return InferenceStream::Start(
             context, {},
             [this, caller](const std::shared_ptr<InferenceStream>& stream,
                            grpc::ByteBuffer message, InferenceStream::Respond respond) {
               Caller of_request = caller;
               of_request.gone = [stream] { return stream->ended(); };
               Infer(std::move(message), std::move(of_request),
                     [respond = std::move(respond)](const InferenceRequest& request,
                                                    const absl::Status& status,
                                                    const grpc::ByteBuffer& answer) {
                       respond(status.ok() ? EncodeStreamResponse(answer)
                                           : EncodeStreamError(request.id, status));
                     });
             },
             &registry_)
      ->reactor();
}

}  // namespace codistill
