#ifndef CODISTILL_PREDSERVER_INFERENCE_SERVICE_H_
#define CODISTILL_PREDSERVER_INFERENCE_SERVICE_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/rpc/call_registry.h"
#include "predserver/inference_codec.h"
#include "predserver/model_repository.h"
#include "predserver/unread_responses.h"
#include "proto/job.pb.h"
#include "proto/open_inference.grpc.pb.h"

namespace codistill {

namespace internal {

using GrpcInferenceService = inference::GRPCInferenceService;
template <typename Base>
using WithModelCallbacks = GrpcInferenceService::WithCallbackMethod_ModelReady<
    GrpcInferenceService::WithCallbackMethod_ModelMetadata<
        GrpcInferenceService::WithCallbackMethod_ModelConfig<
            GrpcInferenceService::WithCallbackMethod_ModelStatistics<
                GrpcInferenceService::WithCallbackMethod_RepositoryIndex<Base>>>>>;
// Callbacks for all methods; what carries tensors in raw bytes.
using InferenceServiceBase = GrpcInferenceService::WithCallbackMethod_ServerLive<
    GrpcInferenceService::WithCallbackMethod_ServerReady<
        GrpcInferenceService::WithCallbackMethod_ServerMetadata<
            WithModelCallbacks<GrpcInferenceService::WithRawCallbackMethod_ModelInfer<
                GrpcInferenceService::WithRawCallbackMethod_ModelStreamInfer<
                    GrpcInferenceService::Service>>>>>>;

}  // namespace internal

// The Open Inference Protocol over a ModelRepository: decodes, calls, encodes. Thread-safe.
//
// A client is a connection: its requests are fair to those of others, and while it leaves more than
// a limit of responses unread, on calls or streams, it is refused.
class InferenceService final : public internal::InferenceServiceBase {
 public:
  // Bytes of responses that a client may leave unread.
  static constexpr size_t kMaxUnreadBytes = size_t{256} << 20;
  // That all together may, as a multiple of it.
  static constexpr size_t kMaxUnreadClients = 4;

  // Not owned; outlives every call. `prediction` is told as part of the models' configuration.
  explicit InferenceService(ModelRepository* models, PredictionConfig prediction = {},
                            size_t max_unread_bytes = kMaxUnreadBytes);

  // Open ModelInfer and ModelStreamInfer calls, for shutting down.
  CallRegistry* registry() { return &registry_; }

  grpc::ServerUnaryReactor* ServerLive(grpc::CallbackServerContext* context,
                                       const inference::ServerLiveRequest* request,
                                       inference::ServerLiveResponse* response) override;
  grpc::ServerUnaryReactor* ServerReady(grpc::CallbackServerContext* context,
                                        const inference::ServerReadyRequest* request,
                                        inference::ServerReadyResponse* response) override;
  grpc::ServerUnaryReactor* ModelReady(grpc::CallbackServerContext* context,
                                       const inference::ModelReadyRequest* request,
                                       inference::ModelReadyResponse* response) override;
  grpc::ServerUnaryReactor* ServerMetadata(grpc::CallbackServerContext* context,
                                           const inference::ServerMetadataRequest* request,
                                           inference::ServerMetadataResponse* response) override;
  grpc::ServerUnaryReactor* ModelMetadata(grpc::CallbackServerContext* context,
                                          const inference::ModelMetadataRequest* request,
                                          inference::ModelMetadataResponse* response) override;
  grpc::ServerUnaryReactor* ModelInfer(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* ModelStreamInfer(
      grpc::CallbackServerContext* context) override;
  grpc::ServerUnaryReactor* ModelConfig(grpc::CallbackServerContext* context,
                                        const inference::ModelConfigRequest* request,
                                        inference::ModelConfigResponse* response) override;
  grpc::ServerUnaryReactor* ModelStatistics(grpc::CallbackServerContext* context,
                                            const inference::ModelStatisticsRequest* request,
                                            inference::ModelStatisticsResponse* response) override;
  grpc::ServerUnaryReactor* RepositoryIndex(grpc::CallbackServerContext* context,
                                            const inference::RepositoryIndexRequest* request,
                                            inference::RepositoryIndexResponse* response) override;

 private:
  // Who asks, and until when.
  struct Caller {
    std::string client;
    std::shared_ptr<UnreadResponses::Account> account;
    absl::Time deadline;
    std::function<bool()> gone;
  };
  // `response` is a ModelInferResponse where `status` is OK.
  using Respond = std::function<void(const InferenceRequest& request, const absl::Status& status,
                                     const grpc::ByteBuffer& response)>;

  // NOT_FOUND unless there is the model, and it has `version` or, where that is empty, may have
  // one.
  absl::StatusOr<const Predictor*> FindVersion(const std::string& model,
                                               const std::string& version) const;
  Caller CallerOf(const grpc::CallbackServerContext& context, absl::Time deadline,
                  std::function<bool()> gone);
  // `request` tells its id as far as that could be found out.
  void Infer(grpc::ByteBuffer message, Caller caller, Respond respond);

  ModelRepository* const models_;
  const PredictionConfig prediction_;
  CallRegistry registry_;
  UnreadResponses unread_;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_INFERENCE_SERVICE_H_
