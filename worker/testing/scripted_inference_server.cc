#include "worker/testing/scripted_inference_server.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/mutex.h"
#include "common/rpc/grpc_status.h"
#include "glog/logging.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "proto/open_inference.grpc.pb.h"

namespace codistill {
namespace {

class ScriptedInferenceServerImpl : public ScriptedInferenceServer,
                                    public inference::GRPCInferenceService::Service {
 public:
  explicit ScriptedInferenceServerImpl(Answer answer) : answer_(std::move(answer)) {
    grpc::ServerBuilder builder;
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    CHECK(server_ != nullptr && port_ != 0);
  }

  ~ScriptedInferenceServerImpl() override {
    {
      MutexLock lock(&mu_);
      stopping_ = true;
    }
    server_->Shutdown(absl::ToChronoTime(absl::Now() + absl::Seconds(1)));
  }

  std::string address() const override { return absl::StrCat("127.0.0.1:", port_); }
  void Hold() override {
    MutexLock lock(&mu_);
    held_ = true;
  }
  void Release() override {
    MutexLock lock(&mu_);
    held_ = false;
  }
  int64_t calls() const override {
    MutexLock lock(&mu_);
    return calls_;
  }
  int64_t cancelled() const override {
    MutexLock lock(&mu_);
    return cancelled_;
  }
  int64_t waiting() const override {
    MutexLock lock(&mu_);
    return waiting_;
  }

  grpc::Status ModelInfer(grpc::ServerContext* context, const inference::ModelInferRequest* request,
                          inference::ModelInferResponse* response) override {
    MutexLock lock(&mu_);
    ++calls_;
    ++waiting_;
    // gRPC tells a synchronous handler about cancellation only when asked.
    while (held_ && !stopping_ && !context->IsCancelled()) {
      mu_.AwaitWithTimeout(
          absl::Condition(
              +[](ScriptedInferenceServerImpl* self) { return !self->held_ || self->stopping_; },
              this),
          absl::Milliseconds(2));
    }
    --waiting_;
    if (context->IsCancelled()) {
      ++cancelled_;
      return grpc::Status::CANCELLED;
    }
    if (stopping_) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "stopping");
    response->set_model_name(request->model_name());
    response->set_id(request->id());
    return ToGrpcStatus(answer_(*request, response));
  }

 private:
  const Answer answer_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  mutable Mutex mu_;
  bool held_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  int64_t calls_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t cancelled_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t waiting_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace

std::unique_ptr<ScriptedInferenceServer> ScriptedInferenceServer::Start(Answer answer) {
  return std::make_unique<ScriptedInferenceServerImpl>(std::move(answer));
}

void AddFp32Output(const std::string& name, const std::vector<int64_t>& shape,
                   absl::Span<const float> values, inference::ModelInferResponse* response) {
  auto* output = response->add_outputs();
  output->set_name(name);
  output->set_datatype("FP32");
  for (int64_t dimension : shape) output->add_shape(dimension);
  response->add_raw_output_contents(values.data(), values.size() * sizeof(float));
}

void SetVersion(uint64_t generation, int64_t step, int64_t latest_step,
                inference::ModelInferResponse* response) {
  auto& parameters = *response->mutable_parameters();
  parameters["generation"].set_int64_param(static_cast<int64_t>(generation));
  parameters["step"].set_int64_param(step);
  parameters["latest_step"].set_int64_param(latest_step);
  response->set_model_version(absl::StrCat(generation, ".", step));
}

std::vector<float> Fp32Input(const inference::ModelInferRequest& request, const std::string& name) {
  for (int i = 0; i < request.inputs_size() && i < request.raw_input_contents_size(); ++i) {
    if (request.inputs(i).name() != name) continue;
    const std::string& bytes = request.raw_input_contents(i);
    std::vector<float> values(bytes.size() / sizeof(float));
    std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
    return values;
  }
  return {};
}

}  // namespace codistill
