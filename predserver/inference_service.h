#ifndef CODISTILL_PREDSERVER_INFERENCE_SERVICE_H_
#define CODISTILL_PREDSERVER_INFERENCE_SERVICE_H_

#include "common/rpc/call_registry.h"
#include "predserver/predictor.h"
#include "proto/open_inference.grpc.pb.h"

namespace codistill {

namespace internal {

// Callbacks for all methods; ModelInfer in raw bytes.
using InferenceServiceBase = inference::GRPCInferenceService::WithCallbackMethod_ServerLive<
    inference::GRPCInferenceService::WithCallbackMethod_ServerReady<
        inference::GRPCInferenceService::WithCallbackMethod_ModelReady<
            inference::GRPCInferenceService::WithCallbackMethod_ServerMetadata<
                inference::GRPCInferenceService::WithCallbackMethod_ModelMetadata<
                    inference::GRPCInferenceService::WithRawCallbackMethod_ModelInfer<
                        inference::GRPCInferenceService::Service>>>>>>;

}  // namespace internal

// The Open Inference Protocol over a Predictor: decodes, calls, encodes. Thread-safe.
class InferenceService final : public internal::InferenceServiceBase {
 public:
  // Not owned; outlives every call.
  explicit InferenceService(Predictor* predictor) : predictor_(predictor) {}

  // Open ModelInfer calls, for shutting down.
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

 private:
  Predictor* const predictor_;
  CallRegistry registry_;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_INFERENCE_SERVICE_H_
