// Prediction requests as a server receives them: decoded, checked against a model, and read into
// tensors. What is accepted fits the model, and what comes back on a stream is well-formed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "glog/logging.h"
#include "grpcpp/support/byte_buffer.h"
#include "predserver/batch_inputs.h"
#include "predserver/inference_codec.h"
#include "predserver/request_check.h"
#include "predserver/request_queue.h"
#include "proto/job.pb.h"
#include "proto/open_inference.pb.h"
#include "tests/fuzz/fuzz_target.h"

namespace codistill {
namespace {

using inference::ModelInferRequest;

constexpr int64_t kFeatures = 3;
constexpr int64_t kClasses = 5;

ModelConfig MakeConfig() {
  ModelConfig config;
  ModelInput* const x = config.add_inputs();
  x->set_name("x");
  x->add_shape(kFeatures);
  ModelInput* const flag = config.add_inputs();
  flag->set_name("flag");
  flag->set_dtype(DT_BOOL);
  RecurrentState* const state = config.add_states();
  state->set_name("h");
  for (const int64_t size : {1, -1, 2}) state->add_shape(size);
  config.set_num_outputs(kClasses);
  return config;
}

ModelInferRequest Request(int64_t rows) {
  ModelInferRequest request;
  request.set_model_name("alpha");
  request.set_model_version("1.10");
  request.set_id("seven");
  auto* const x = request.add_inputs();
  x->set_name("x");
  x->set_datatype("FP32");
  x->add_shape(rows);
  x->add_shape(kFeatures);
  auto* const flag = request.add_inputs();
  flag->set_name("flag");
  flag->set_datatype("BOOL");
  flag->add_shape(rows);
  return request;
}

std::string Raw(int64_t rows) {
  ModelInferRequest request = Request(rows);
  request.add_raw_input_contents(std::string(rows * kFeatures * sizeof(float), '\1'));
  request.add_raw_input_contents(std::string(rows, '\1'));
  auto& parameters = *request.mutable_parameters();
  parameters["top_k"].set_int64_param(2);
  parameters["temperature"].set_double_param(2);
  parameters["max_staleness_steps"].set_string_param("9");
  request.add_outputs()->set_name("topk_value");
  request.add_outputs()->set_name("h");
  return request.SerializeAsString();
}

std::string Typed() {
  ModelInferRequest request = Request(2);
  for (int i = 0; i < 2 * kFeatures; ++i) {
    request.mutable_inputs(0)->mutable_contents()->add_fp32_contents(static_cast<float>(i));
  }
  for (int i = 0; i < 2; ++i) request.mutable_inputs(1)->mutable_contents()->add_bool_contents(i);
  (*request.mutable_parameters())["format"].set_string_param("INT8");
  (*request.mutable_inputs(0)->mutable_parameters())["binary_data"].set_bool_param(true);
  request.add_outputs()->set_name("logits");
  return request.SerializeAsString();
}

// As received bytes lie: in slices whose borders mean nothing.
grpc::ByteBuffer Slices(absl::string_view bytes, size_t step) {
  std::vector<grpc::Slice> slices;
  for (; !bytes.empty(); bytes.remove_prefix(std::min(step, bytes.size()))) {
    const absl::string_view part = bytes.substr(0, step);
    slices.emplace_back(part.data(), part.size());
  }
  if (slices.empty()) slices.emplace_back();
  return grpc::ByteBuffer(slices.data(), slices.size());
}

void CheckAccepted(const ModelConfig& config, const WaitingRequest& waiting) {
  const PredictionRequest& request = waiting.request;
  const RequestPlan& plan = waiting.plan;
  CHECK_GE(plan.batch, 1);
  CHECK_EQ(plan.want_states.size(), 1);
  // Alone, and twice in one pass.
  for (const size_t copies : {1, 2}) {
    const std::vector<const WaitingRequest*> requests(copies, &waiting);
    std::vector<absl::Status> statuses;
    const BatchInputs batch = AssembleBatch(config, requests, &statuses);
    CHECK_EQ(statuses.size(), copies);
    if (!statuses[0].ok()) continue;
    const int64_t rows = plan.batch * static_cast<int64_t>(copies);
    CHECK_EQ(batch.examples, rows);
    CHECK_EQ(batch.inputs.size(), 2);
    CHECK(batch.inputs[0].shape() == (std::vector<int64_t>{rows, kFeatures}));
    for (const float value : batch.inputs[0].As<float>()) CHECK(std::isfinite(value));
    CHECK_EQ(batch.inputs[1].bytes(), static_cast<size_t>(rows));
    if (plan.states[0] >= 0) CHECK_EQ(batch.states[0].elements(), 2 * rows);
  }
  const OutputFormat& format = request.format;
  CHECK(std::isfinite(format.temperature) && format.temperature > 0);
  CHECK_LE(format.top_k, config.num_outputs());
  CHECK_EQ(plan.want_top_k(), format.top_k > 0);
  CHECK(format.dtype != DT_INT8 || !(plan.want_probabilities || plan.want_top_k()));
}

}  // namespace

std::vector<std::string> FuzzSeeds() {
  // The first byte says how the bytes lie.
  return {"\1" + Raw(2), "\7" + Raw(40), "\3" + Typed()};
}

void FuzzOne(absl::string_view input) {
  if (input.empty()) return;
  static const ModelConfig* const config = new ModelConfig(MakeConfig());
  const size_t step = static_cast<uint8_t>(input[0]) % 64 + 1;
  input.remove_prefix(1);
  InferenceRequest request;
  absl::Status status = DecodeInferenceRequest(Slices(input, step), &request);
  if (status.ok()) {
    WaitingRequest waiting;
    waiting.request = std::move(request.prediction);
    absl::StatusOr<RequestPlan> plan = CheckRequest(*config, waiting.request);
    status = plan.status();
    if (plan.ok()) {
      waiting.plan = *std::move(plan);
      CheckAccepted(*config, waiting);
    }
  }
  if (status.ok()) return;
  CHECK(absl::IsInvalidArgument(status)) << status;
  std::vector<grpc::Slice> slices;
  CHECK(EncodeStreamError(request.id, status).Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  inference::ModelStreamInferResponse message;
  CHECK(message.ParseFromString(bytes));
  CHECK(!message.error_message().empty());
}

}  // namespace codistill
