#include "tests/benchmarks/known_load.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "proto/open_inference.grpc.pb.h"

namespace codistill {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(30);

// The step of an answer, which names its version twice; -1 if it does not, or not the same.
int64_t StepOf(const inference::ModelInferResponse& response) {
  const auto step = response.parameters().find("step");
  const auto generation = response.parameters().find("generation");
  if (step == response.parameters().end() || generation == response.parameters().end() ||
      response.model_version() !=
          absl::StrCat(generation->second.int64_param(), ".", step->second.int64_param())) {
    return -1;
  }
  return step->second.int64_param();
}

}  // namespace

KnownLoad::KnownLoad(Options options) : options_(std::move(options)) {
  for (int i = 0; i < options_.clients; ++i) threads_.emplace_back([this, i] { Run(i); });
}

KnownLoad::~KnownLoad() { Stop(); }

KnownLoad::Result KnownLoad::Stop() {
  stopping_ = true;
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  MutexLock lock(&mu_);
  return result_;
}

void KnownLoad::Fail(int64_t Result::*count, const std::string& error) {
  MutexLock lock(&mu_);
  ++(result_.*count);
  if (result_.error.empty()) result_.error = error;
}

void KnownLoad::Run(int client) {
  const KnownModel& model = options_.model;
  inference::ModelInferRequest request;
  request.set_model_name(options_.name);
  request.set_id(absl::StrCat("client ", client));
  auto* const input = request.add_inputs();
  input->set_name("x");
  input->set_datatype("FP32");
  input->add_shape(options_.rows);
  input->add_shape(model.inputs);
  const std::vector<float> ones(options_.rows * model.inputs, 1.0f);
  request.add_raw_input_contents(ones.data(), ones.size() * sizeof(float));
  const auto stub = inference::GRPCInferenceService::NewStub(
      MakeChannel(options_.address, ChannelUse::kPrediction));
  std::vector<float> logits(options_.rows * model.outputs);
  std::vector<Answered> answered;
  inference::ModelInferResponse response;
  while (!stopping_) {
    const auto context = MakeContext(absl::Now() + kTimeout);
    Answered one;
    one.asked = absl::Now();
    const grpc::Status status = stub->ModelInfer(context.get(), request, &response);
    one.latency = absl::Now() - one.asked;
    one.step = StepOf(response);
    if (!status.ok()) {
      Fail(&Result::failed, FromGrpcStatus(status).ToString());
    } else if (response.raw_output_contents_size() != 1 ||
               response.raw_output_contents(0).size() != logits.size() * sizeof(float) ||
               one.step < 0) {
      Fail(&Result::wrong,
           absl::StrCat("an answer of another form, version ", response.model_version()));
    } else {
      std::memcpy(logits.data(), response.raw_output_contents(0).data(),
                  logits.size() * sizeof(float));
      const absl::Status right = model.Check(one.step, logits.data(), options_.rows);
      if (right.ok()) {
        answered.push_back(one);
      } else {
        Fail(&Result::wrong, std::string(right.message()));
      }
      ++answers_;
      int64_t newest = newest_step_;
      while (one.step > newest && !newest_step_.compare_exchange_weak(newest, one.step)) {
      }
    }
    if (options_.pause > absl::ZeroDuration()) absl::SleepFor(options_.pause);
  }
  MutexLock lock(&mu_);
  result_.answered.insert(result_.answered.end(), answered.begin(), answered.end());
}

}  // namespace codistill
