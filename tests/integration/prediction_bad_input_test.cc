// What a prediction server of a running job is sent that it should not be: each mistake has its
// code and its message, the server's memory stays as it was, and others are served meanwhile.

#include <atomic>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "grpcpp/generic/generic_stub.h"
#include "gtest/gtest.h"
#include "proto/open_inference.grpc.pb.h"
#include "tests/integration/inference_client.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

using inference::ModelInferRequest;
using inference::ModelInferResponse;

constexpr char kModelInfer[] = "/inference.GRPCInferenceService/ModelInfer";
constexpr int64_t kInputs = 32;
// By how much a server's memory may grow, in kB. Sanitizers keep freed memory for a while.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int64_t kMostGrowth = 700 << 10;
#else
constexpr int64_t kMostGrowth = 200 << 10;
#endif

// Bytes as they are, to any method.
absl::Status SendBytes(const std::shared_ptr<grpc::Channel>& channel,
                       const grpc::ByteBuffer& request) {
  grpc::GenericStub stub(channel);
  const auto context = MakeContext(absl::Now() + absl::Seconds(60));
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareUnaryCall(context.get(), kModelInfer, request, &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  EXPECT_TRUE(queue.Next(&tag, &ok));
  return FromGrpcStatus(status);
}

grpc::ByteBuffer Buffer(const std::string& bytes) {
  const grpc::Slice slice(bytes.data(), bytes.size());
  return grpc::ByteBuffer(&slice, 1);
}

// A message of a gigabyte that takes a megabyte here: its payload's parts are all the same bytes.
grpc::ByteBuffer Gigabyte() {
  ModelInferRequest request;
  request.set_model_name("alpha");
  auto* const x = request.add_inputs();
  x->set_name("x");
  x->set_datatype("FP32");
  x->add_shape((int64_t{1} << 30) / kInputs / 4);
  x->add_shape(kInputs);
  const std::string header = request.SerializeAsString() + "\x3a\x80\x80\x80\x80\x04";
  std::vector<grpc::Slice> slices(1025, grpc::Slice(std::string(1 << 20, '\0')));
  slices[0] = grpc::Slice(header);
  return grpc::ByteBuffer(slices.data(), slices.size());
}

// Kilobytes that a process has in memory.
int64_t Resident(pid_t pid) {
  std::ifstream status(absl::StrCat("/proc/", pid, "/status"));
  for (std::string word; status >> word;) {
    int64_t kilobytes = 0;
    if (word == "VmRSS:" && status >> kilobytes) return kilobytes;
  }
  return -1;
}

std::vector<NamedTensor> GoodInputs() { return {{"x", Tensor::Zeros(DT_FLOAT, {4, kInputs})}}; }

// Somebody who asks nothing unusual, all the time.
class GoodClient {
 public:
  explicit GoodClient(const std::string& address)
      : thread_([this, address] {
          while (!stop_) {
            const auto answer = Infer(address, "alpha", GoodInputs(), absl::Seconds(30));
            (answer.ok() ? served_ : failed_) += 1;
            if (!answer.ok()) last_ = answer.status();
          }
        }) {}
  ~GoodClient() {
    if (thread_.joinable()) Stop();
  }
  void Stop() {
    stop_ = true;
    thread_.join();
  }
  int served() const { return served_; }
  int failed() const { return failed_; }
  // After Stop.
  const absl::Status& last() const { return last_; }

 private:
  std::atomic<bool> stop_{false};
  std::atomic<int> served_{0};
  std::atomic<int> failed_{0};
  absl::Status last_;
  std::thread thread_;
};

class PredictionBadInputTest : public testing::Test {
 protected:
  void SetUp() override {
    JobConfig job = MlpJob("bad-predictions", 2);
    job.mutable_stop()->set_steps(100000000);
    job.mutable_codistillation()->set_on_teacher_loss(CodistillationConfig::SKIP);
    harness_ = std::make_unique<JobHarness>(job);
    absl::Status status = harness_->Start();
    ASSERT_TRUE(status.ok()) << status;
    status = harness_->WaitForStep(0, 20);
    ASSERT_TRUE(status.ok()) << status;
    const FleetMember& server = harness_->member("alpha.prediction.0");
    address_ = server.address;
    pid_ = server.process.pid();
    channel_ = MakeChannel(address_, ChannelUse::kPrediction);
    stub_ = inference::GRPCInferenceService::NewStub(channel_);
  }

  static ModelInferRequest Good() {
    ModelInferRequest request;
    request.set_model_name("alpha");
    auto* const x = request.add_inputs();
    x->set_name("x");
    x->set_datatype("FP32");
    x->add_shape(4);
    x->add_shape(kInputs);
    request.add_raw_input_contents(std::string(4 * kInputs * sizeof(float), '\0'));
    return request;
  }

  absl::Status Ask(const ModelInferRequest& request) {
    ModelInferResponse response;
    const auto context = MakeContext(absl::Now() + absl::Seconds(30));
    return FromGrpcStatus(stub_->ModelInfer(context.get(), request, &response));
  }

  std::unique_ptr<JobHarness> harness_;
  std::string address_;
  pid_t pid_ = 0;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<inference::GRPCInferenceService::Stub> stub_;
};

TEST_F(PredictionBadInputTest, EveryMistakeHasItsCodeAndMessage) {
  GoodClient good(address_);
  struct Mistake {
    const char* name;
    std::function<void(ModelInferRequest*)> make;
    absl::StatusCode code;
    const char* text;
  };
  const float bad = std::numeric_limits<float>::quiet_NaN();
  const std::string nan(reinterpret_cast<const char*>(&bad), sizeof(bad));
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kNotFound = absl::StatusCode::kNotFound;
  using R = ModelInferRequest;
  const Mistake mistakes[] = {
      {"model", [](R* r) { r->set_model_name("omega"); }, kNotFound, "omega"},
      {"version", [](R* r) { r->set_model_version("1.123456789"); }, kNotFound, "1.123456789"},
      {"no version", [](R* r) { r->set_model_version("newest"); }, kNotFound, "newest"},
      {"input", [](R* r) { r->mutable_inputs(0)->set_name("y"); }, kInvalid, "input \"y\""},
      {"no input",
       [](R* r) {
         r->clear_inputs();
         r->clear_raw_input_contents();
       },
       kInvalid, "input x: is missing"},
      {"dtype", [](R* r) { r->mutable_inputs(0)->set_datatype("FP64"); }, kInvalid, "\"FP64\""},
      {"shape", [](R* r) { r->mutable_inputs(0)->set_shape(1, 31); }, kInvalid, "[4, 31]"},
      {"rows", [](R* r) { r->mutable_inputs(0)->set_shape(0, -4); }, kInvalid, "[-4, 32]"},
      {"huge shape", [](R* r) { r->mutable_inputs(0)->set_shape(0, int64_t{1} << 60); }, kInvalid,
       "input x: contents are 512 bytes"},
      {"length", [](R* r) { r->mutable_raw_input_contents(0)->pop_back(); }, kInvalid,
       "input x: contents are 511 bytes"},
      {"contents", [](R* r) { r->add_raw_input_contents("more"); }, kInvalid,
       "raw_input_contents: has 2 entries for 1 inputs"},
      {"NaN", [&](R* r) { r->mutable_raw_input_contents(0)->replace(8, 4, nan); }, kInvalid,
       "input x: has a NaN"},
      {"output", [](R* r) { r->add_outputs()->set_name("loss"); }, kInvalid, "output \"loss\""},
      {"top-k", [](R* r) { (*r->mutable_parameters())["top_k"].set_int64_param(9); }, kInvalid,
       "parameter top_k"},
      {"parameter", [](R* r) { (*r->mutable_parameters())["topk"].set_int64_param(2); }, kInvalid,
       "parameter \"topk\""},
  };
  for (const Mistake& mistake : mistakes) {
    SCOPED_TRACE(mistake.name);
    ModelInferRequest request = Good();
    mistake.make(&request);
    const absl::Status status = Ask(request);
    EXPECT_EQ(status.code(), mistake.code) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), mistake.text)) << status;
  }
  EXPECT_TRUE(Ask(Good()).ok());
  good.Stop();
  EXPECT_GT(good.served(), 0);
  EXPECT_EQ(good.failed(), 0) << good.last();
}

TEST_F(PredictionBadInputTest, GarbageAndGigabytesLeaveNoTrace) {
  // What the server takes to answer as many requests as will be asked.
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(Ask(Good()).ok());
  const int64_t before = Resident(pid_);
  ASSERT_GT(before, 0);
  GoodClient good(address_);
  for (int i = 0; i < 5; ++i) {
    const absl::Status status = SendBytes(channel_, Gigabyte());
    EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), "larger than max")) << status;
    for (const std::string& garbage : {std::string("garbage"), std::string(1 << 20, '\xff')}) {
      const absl::Status refused = SendBytes(channel_, Buffer(garbage));
      EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
    }
    const absl::Status asked = Ask(Good());
    EXPECT_TRUE(asked.ok()) << asked;
  }
  good.Stop();
  EXPECT_GT(good.served(), 0);
  EXPECT_EQ(good.failed(), 0) << good.last();
  EXPECT_LT(Resident(pid_) - before, kMostGrowth) << "kB more than " << before;
}

TEST_F(PredictionBadInputTest, ClientsThatReadNothingHarmOnlyThemselves) {
  GoodClient good(address_);
  // A stream whose client asks and asks, and never reads.
  ModelInferRequest request = Good();
  constexpr int64_t kRows = 5000;
  request.mutable_inputs(0)->set_shape(0, kRows);
  request.set_raw_input_contents(0, std::string(kRows * kInputs * sizeof(float), '\0'));
  // What passes of that size take stays the server's.
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(Ask(request).ok());
  const int64_t before = Resident(pid_);
  const auto greedy = MakeChannel(address_, ChannelUse::kPrediction);
  const auto stub = inference::GRPCInferenceService::NewStub(greedy);
  const auto context = MakeContext(absl::Now() + absl::Seconds(5));
  const auto stream = stub->ModelStreamInfer(context.get());
  int written = 0;
  while (stream->Write(request)) ++written;
  EXPECT_GT(written, 0);
  // The deadline has ended it.
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_LT(Resident(pid_) - before, kMostGrowth) << "kB more than " << before;
  EXPECT_TRUE(Ask(Good()).ok());
  good.Stop();
  EXPECT_GT(good.served(), 0);
  EXPECT_EQ(good.failed(), 0) << good.last();
}

}  // namespace
}  // namespace codistill
