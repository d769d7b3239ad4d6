#ifndef CODISTILL_PREDSERVER_INFERENCE_SERVICE_FIXTURE_H_
#define CODISTILL_PREDSERVER_INFERENCE_SERVICE_FIXTURE_H_

#include <memory>
#include <string>
#include <utility>

#include "absl/time/clock.h"
#include "common/model/testing/puppet_model.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "common/rpc/server.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "predserver/inference_service.h"

// What the tests of the service share: it over a real socket, and plain requests to it.
namespace codistill {

inline ModelConfig ParseConfig(const std::string& text) {
  ModelConfig config;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &config));
  return config;
}

// A service around a model, at version 2.30 of a group that is at step 33.
class Fixture {
 public:
  Fixture(std::shared_ptr<const Model> model, const ModelConfig& config, int max_queue = 32,
          size_t max_unread_bytes = InferenceService::kMaxUnreadBytes) {
    if (model != nullptr) followed_.Hold(std::move(model), 2, 30);
    followed_.SetGroupStep(2, 33);
    Predictor::Options options;
    options.model = "alpha";
    options.config = config;
    options.followed = &followed_;
    options.max_queue = max_queue;
    models_ = *ModelRepository::Create({});
    EXPECT_TRUE(models_->Add(std::move(options)).ok());
    service_ =
        std::make_unique<InferenceService>(models_.get(), PredictionConfig(), max_unread_bytes);
    RpcServer::Options server;
    server.services = {service_.get()};
    server.registries = {service_->registry()};
    server.max_message_bytes = kMaxPredictionBytes;
    auto started = RpcServer::Start(server);
    EXPECT_TRUE(started.ok()) << started.status();
    server_ = *std::move(started);
    stub_ = inference::GRPCInferenceService::NewStub(
        MakeChannel(server_->address(), ChannelUse::kPrediction));
  }

  absl::Status Infer(const inference::ModelInferRequest& request,
                     inference::ModelInferResponse* response,
                     absl::Duration timeout = absl::Seconds(30)) {
    const auto context = MakeContext(absl::Now() + timeout);
    return FromGrpcStatus(stub_->ModelInfer(context.get(), request, response));
  }

  PuppetFollowedModel followed_;
  std::unique_ptr<ModelRepository> models_;
  std::unique_ptr<InferenceService> service_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<inference::GRPCInferenceService::Stub> stub_;
};

inline std::string Bytes(const Tensor& tensor) {
  return std::string(static_cast<const char*>(tensor.data()), tensor.bytes());
}

inline void AddInput(const std::string& name, const Tensor& tensor,
                     inference::ModelInferRequest* request) {
  auto* input = request->add_inputs();
  input->set_name(name);
  input->set_datatype(std::string(DataTypeName(tensor.dtype())));
  for (int64_t size : tensor.shape()) input->add_shape(size);
  request->add_raw_input_contents(Bytes(tensor));
}

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_INFERENCE_SERVICE_FIXTURE_H_
