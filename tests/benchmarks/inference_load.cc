#include "tests/benchmarks/inference_load.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/mutex.h"
#include "common/base/random.h"
#include "common/base/retry_after.h"
#include "common/base/status.h"
#include "common/rpc/channel.h"
#include "common/rpc/frame.h"
#include "common/rpc/grpc_status.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"
#include "proto/open_inference.pb.h"

namespace codistill {
namespace {

constexpr char kModelInfer[] = "/inference.GRPCInferenceService/ModelInfer";
constexpr char kServerLive[] = "/inference.GRPCInferenceService/ServerLive";
constexpr int kRawInputField = 7;
constexpr int kRawOutputField = 6;
constexpr absl::Duration kStartLimit = absl::Seconds(60);

struct Call {
  size_t batch = 0;
  absl::Time sent;
  std::unique_ptr<grpc::ClientContext> context;
  std::unique_ptr<grpc::ClientAsyncResponseReader<grpc::ByteBuffer>> reader;
  grpc::ByteBuffer response;
  grpc::Status status;
};

absl::StatusOr<std::vector<float>> Logits(grpc::ByteBuffer* buffer) {
  inference::ModelInferResponse response;
  DecodedPayload payload;
  CODISTILL_RETURN_IF_ERROR(DecodedPayload::Decode(buffer, kRawOutputField, &response, &payload));
  if (payload.count() < 1 || response.outputs(0).name() != "logits") {
    return absl::InvalidArgumentError("the answer's first output is not raw logits");
  }
  std::vector<float> values(payload.size(0) / sizeof(float));
  payload.CopyTo(0, values.data());
  return values;
}

class InferenceLoadImpl : public InferenceLoad {
 public:
  explicit InferenceLoadImpl(Options options) : options_(std::move(options)) {
    for (int i = 0; i < options_.connections; ++i) {
      channels_.push_back(MakeChannel(options_.address, ChannelUse::kPrediction));
      stubs_.push_back(std::make_unique<grpc::GenericStub>(channels_.back()));
    }
    for (const Tensor& batch : options_.batches) {
      inference::ModelInferRequest request;
      request.set_model_name(options_.model);
      auto* input = request.add_inputs();
      input->set_name(options_.input);
      input->set_datatype("FP32");
      for (const int64_t dimension : batch.shape()) input->add_shape(dimension);
      questions_.push_back(EncodeWithPayload(request, kRawInputField,
                                             {{batch.data(), batch.bytes(), batch.owner()}}));
    }
    if (live()) questions_.push_back(EncodeWithPayload(inference::ServerLiveRequest(), 1, {}));
    thread_ = std::thread([this] { Run(); });
  }

  ~InferenceLoadImpl() override {
    queue_.Shutdown();
    thread_.join();
  }

  absl::Status LearnAnswers() {
    if (live()) return absl::OkStatus();
    answers_.resize(questions_.size());
    const absl::Time give_up = absl::Now() + kStartLimit;
    for (size_t i = 0; i < questions_.size();) {
      learning_ = static_cast<int>(i);
      Begin();
      Send(i);
      AwaitAll();
      MutexLock lock(&mu_);
      if (!answers_[i].empty()) {
        ++i;
      } else if (absl::Now() > give_up) {
        return absl::DeadlineExceededError(counts_.first_failure);
      }
    }
    learning_ = -1;
    return absl::OkStatus();
  }

  Counts Closed(int outstanding, absl::Duration time) override {
    const absl::Time start = Begin();
    closing_ = false;
    closed_ = true;
    for (int i = 0; i < outstanding; ++i) Send(next_++);
    absl::SleepFor(time);
    const Counts counts = Snapshot(start);  // what came in time, not what is under way
    closing_ = true;
    AwaitAll();
    closed_ = false;
    return WithLater(counts);
  }

  Counts Open(double rate, absl::Duration time) override {
    const absl::Time start = Begin();
    RandomStream random(17);
    for (absl::Time due = start; due < start + time;) {
      const absl::Duration wait = due - absl::Now();
      if (wait > absl::Microseconds(200)) absl::SleepFor(wait);
      Send(next_++);
      due += absl::Seconds(-std::log(1 - random.Uniform()) / rate);
    }
    const Counts counts = Snapshot(start);
    AwaitAll();
    return WithLater(counts);
  }

 private:
  bool live() const { return options_.batches.empty(); }

  absl::Time Begin() {
    MutexLock lock(&mu_);
    counts_ = Counts();
    begun_ = absl::Now();
    return begun_;
  }

  Counts Snapshot(absl::Time start) {
    MutexLock lock(&mu_);
    Counts counts = counts_;
    counts.seconds = absl::ToDoubleSeconds(absl::Now() - start);
    return counts;
  }

  // `counts` and what has come since.
  Counts WithLater(Counts counts) {
    MutexLock lock(&mu_);
    counts.answered_later = counts_.answered - counts.answered;
    counts.refused_later = counts_.refused - counts.refused;
    return counts;
  }

  void Send(size_t number) {
    auto* call = new Call;
    call->batch = number % questions_.size();
    call->sent = absl::Now();
    call->context = MakeContext(call->sent + options_.deadline);
    {
      MutexLock lock(&mu_);
      ++counts_.offered;
      ++under_way_;
    }
    call->reader = stubs_[number % stubs_.size()]->PrepareUnaryCall(
        call->context.get(), live() ? kServerLive : kModelInfer, questions_[call->batch], &queue_);
    call->reader->StartCall();
    call->reader->Finish(&call->response, &call->status, call);
  }

  void AwaitAll() {
    MutexLock lock(&mu_);
    const auto none = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return under_way_ == 0; };
    mu_.Await(absl::Condition(&none));
  }

  void Run() {
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
      const std::unique_ptr<Call> call(static_cast<Call*>(tag));
      Count(call.get());
      if (closed_ && !closing_) Send(next_++);
      MutexLock lock(&mu_);
      --under_way_;
    }
  }

  void Count(Call* call) {
    const double seconds = absl::ToDoubleSeconds(absl::Now() - call->sent);
    absl::Status status = FromGrpcStatus(call->status);
    double difference = 0;
    if (status.ok()) status = Check(call, &difference);
    MutexLock lock(&mu_);
    if (status.ok()) {
      ++counts_.answered;
      counts_.latencies.push_back(seconds);
      counts_.answered_after.push_back(absl::ToDoubleSeconds(absl::Now() - begun_));
      counts_.largest_difference = std::max(counts_.largest_difference, difference);
    } else if (absl::IsResourceExhausted(status)) {
      ++counts_.refused;
      counts_.refusal_latencies.push_back(seconds);
      if (!RetryAfter(status).has_value()) ++counts_.refused_without_delay;
    } else if (absl::IsDeadlineExceeded(status)) {
      ++counts_.expired;
    } else {
      if (++counts_.failed == 1) counts_.first_failure = status.ToString();
    }
  }

  absl::Status Check(Call* call, double* difference) {
    if (live()) return absl::OkStatus();
    CODISTILL_ASSIGN_OR_RETURN(std::vector<float> values, Logits(&call->response));
    if (learning_ >= 0) {
      answers_[learning_] = std::move(values);
      return absl::OkStatus();
    }
    const std::vector<float>& expected = answers_[call->batch];
    if (values.size() != expected.size()) return absl::InternalError("answer of another size");
    double scale = 0, largest = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      scale = std::max<double>(scale, std::abs(expected[i]));
      largest = std::max<double>(largest, std::abs(values[i] - expected[i]));
    }
    *difference = largest / scale;
    // Also for what is not a number.
    if (*difference <= options_.tolerance) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("an answer differs by ", *difference));
  }

  const Options options_;
  std::vector<std::shared_ptr<grpc::Channel>> channels_;
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs_;
  std::vector<grpc::ByteBuffer> questions_;
  std::vector<std::vector<float>> answers_;  // by batch; written while learning
  grpc::CompletionQueue queue_;
  std::atomic<int> learning_{-1};
  std::atomic<bool> closed_{false}, closing_{false};
  std::atomic<size_t> next_{0};
  Mutex mu_;
  Counts counts_ ABSL_GUARDED_BY(mu_);
  absl::Time begun_ ABSL_GUARDED_BY(mu_);
  int64_t under_way_ ABSL_GUARDED_BY(mu_) = 0;
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<InferenceLoad>> InferenceLoad::Start(Options options) {
  auto load = std::make_unique<InferenceLoadImpl>(std::move(options));
  CODISTILL_RETURN_IF_ERROR(load->LearnAnswers());
  return load;
}

}  // namespace codistill
