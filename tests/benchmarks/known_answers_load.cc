#include "tests/benchmarks/known_answers_load.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/retry_after.h"
#include "common/base/status.h"
#include "common/rpc/channel.h"
#include "common/rpc/frame.h"
#include "common/rpc/grpc_status.h"
#include "grpcpp/generic/generic_stub.h"
#include "proto/open_inference.pb.h"

namespace codistill {
namespace {

using inference::ModelInferRequest;
using inference::ModelInferResponse;

constexpr char kMethod[] = "/inference.GRPCInferenceService/ModelInfer";
constexpr absl::Duration kTimeout = absl::Seconds(60);
// Sums in another order, for batches of another size.
constexpr float kTolerance = 2e-4f;
// Ids that are never used twice begin above those of examples.
constexpr int64_t kFreshIds = int64_t{1} << 40;

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// How many elements are off. Equal bytes, of which there are most, are seen fast.
int64_t Differing(const uint8_t* got, const float* want, size_t count) {
  constexpr size_t kBlock = 1024;
  int64_t off = 0;
  for (size_t begin = 0; begin < count; begin += kBlock) {
    const size_t size = std::min(kBlock, count - begin);
    if (std::memcmp(got + begin * sizeof(float), want + begin, size * sizeof(float)) == 0) continue;
    for (size_t i = begin; i < begin + size; ++i) {
      float value = 0;
      std::memcpy(&value, got + i * sizeof(float), sizeof(float));
      off += !(std::abs(value - want[i]) <= kTolerance * (1 + std::abs(want[i])));
    }
  }
  return off;
}

}  // namespace

struct KnownAnswersLoad::Call {
  std::unique_ptr<grpc::ClientContext> context;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> reader;
  grpc::ByteBuffer response;
  grpc::Status status;
  int64_t index = 0;
  double started = 0;
};

KnownAnswersLoad::KnownAnswersLoad(const std::string& address, int connections,
                                   const KnownAnswers* known)
    : known_(known), next_id_(kFreshIds) {
  for (int i = 0; i < connections; ++i) {
    channels_.push_back(MakeChannel(address, ChannelUse::kPrediction));
  }
}

KnownAnswersLoad::~KnownAnswersLoad() = default;

grpc::ByteBuffer KnownAnswersLoad::Request(const Options& options, int64_t index) {
  ModelInferRequest request;
  request.set_model_name(known_->model);
  const auto add = [&](const std::string& name, const char* datatype) {
    auto* const input = request.add_inputs();
    input->set_name(name);
    input->set_datatype(datatype);
    input->add_shape(options.rows);
    return input;
  };
  auto* const x = add(known_->input, "FP32");
  for (const int64_t size : known_->shape) x->add_shape(size);
  request.add_outputs()->set_name("logits");
  const int64_t first = index * options.rows % known_->rows();
  const int64_t width = known_->width();
  std::vector<PayloadRef> payloads = {{known_->examples.data() + first * width,
                                       static_cast<size_t>(options.rows * width) * sizeof(float),
                                       nullptr}};
  if (options.with_ids) {
    add("example_id", "INT64");
    auto ids = std::make_shared<std::vector<int64_t>>(options.rows);
    for (int64_t r = 0; r < options.rows; ++r) {
      (*ids)[r] = options.repeat ? options.first_id + first + r : next_id_++;
    }
    payloads.push_back({ids->data(), ids->size() * sizeof(int64_t), ids});
  }
  return EncodeWithPayload(request, ModelInferRequest::kRawInputContentsFieldNumber, payloads);
}

absl::Status KnownAnswersLoad::Check(const Options& options, int64_t index, grpc::ByteBuffer buffer,
                                     Result* result) const {
  ModelInferResponse response;
  DecodedPayload payload;
  CODISTILL_RETURN_IF_ERROR(DecodedPayload::Decode(
      &buffer, ModelInferResponse::kRawOutputContentsFieldNumber, &response, &payload));
  const size_t bytes = static_cast<size_t>(options.rows * known_->classes) * sizeof(float);
  if (payload.count() != 1 || payload.size(0) != bytes || response.outputs(0).name() != "logits") {
    return absl::InternalError(absl::StrCat("not the logits of ", options.rows, " examples"));
  }
  const int64_t first = index * options.rows % known_->rows();
  const float* want = known_->logits.data() + first * known_->classes;
  int64_t off = 0;
  std::string torn;  // an element that lies in two parts
  for (absl::Span<const uint8_t> part : payload.parts(0)) {
    while (!torn.empty() && !part.empty()) {
      torn.push_back(static_cast<char>(part.front()));
      part.remove_prefix(1);
      if (torn.size() < sizeof(float)) continue;
      off += Differing(reinterpret_cast<const uint8_t*>(torn.data()), want++, 1);
      torn.clear();
    }
    const size_t whole = part.size() / sizeof(float);
    off += Differing(part.data(), want, whole);
    want += whole;
    part.remove_prefix(whole * sizeof(float));
    torn.append(reinterpret_cast<const char*>(part.data()), part.size());
  }
  if (off > 0) {
    return absl::InternalError(
        absl::StrCat(off, " of ", bytes / sizeof(float), " logits differ from what libtorch says"));
  }
  result->payload_bytes += bytes;
  return absl::OkStatus();
}

absl::StatusOr<KnownAnswersLoad::Result> KnownAnswersLoad::Run(const Options& options) {
  Result result;
  result.latencies.reserve(options.requests);
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs;
  for (const auto& channel : channels_)
    stubs.push_back(std::make_unique<grpc::GenericStub>(channel));
  grpc::CompletionQueue queue;
  std::vector<Call> calls(options.in_flight);
  int64_t sent = 0;
  const auto send = [&](size_t slot) {
    Call& call = calls[slot];
    call.index = sent++;
    call.started = Now();
    call.context = MakeContext(absl::Now() + kTimeout);
    call.response.Clear();
    call.reader = stubs[slot % stubs.size()]->PrepareUnaryCall(
        call.context.get(), kMethod, Request(options, call.index), &queue);
    call.reader->StartCall();
    call.reader->Finish(&call.response, &call.status, &call);
  };
  absl::Status failed;
  const double start = Now();
  int open = 0;
  for (; open < options.in_flight && sent < options.requests; ++open) send(open);
  while (open > 0) {
    void* tag = nullptr;
    bool ok = false;
    if (options.stay_awake) {
      const gpr_timespec now = gpr_time_0(GPR_CLOCK_MONOTONIC);
      while (queue.AsyncNext(&tag, &ok, now) == grpc::CompletionQueue::TIMEOUT) {
      }
    } else if (!queue.Next(&tag, &ok)) {
      return absl::InternalError("the queue has ended");
    }
    Call* const call = static_cast<Call*>(tag);
    const double latency = Now() - call->started;
    const absl::Status status = FromGrpcStatus(call->status);
    const int64_t index = call->index;
    grpc::ByteBuffer response;
    response.Swap(&call->response);
    // The next one goes out before this one is looked at.
    if (sent < options.requests && failed.ok()) {
      send(call - calls.data());
    } else {
      --open;
    }
    if (status.ok()) {
      ++result.answered;
      result.latencies.push_back(latency);
      failed.Update(Check(options, index, std::move(response), &result));
    } else if (options.may_be_refused && absl::IsResourceExhausted(status)) {
      ++result.refused;
      if (RetryAfter(status).has_value()) ++result.hinted;
    } else {
      failed.Update(status);
    }
  }
  result.seconds = Now() - start;
  if (!failed.ok()) return failed;
  return result;
}

}  // namespace codistill
