// The service and clients that do not read its answers.

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/model/test_archive.h"
#include "gmock/gmock.h"
#include "grpcpp/generic/generic_stub.h"
#include "gtest/gtest.h"
#include "predserver/inference_service_fixture.h"

namespace codistill {
namespace {

using inference::GRPCInferenceService;
using inference::ModelInferRequest;
using inference::ModelInferResponse;
using testing::HasSubstr;

// A model that answers 4 MB to each request, as fast as can be.
class LargeAnswersTest : public testing::Test {
 protected:
  static constexpr int64_t kOutputs = 1000000;

  explicit LargeAnswersTest(size_t max_unread_bytes = InferenceService::kMaxUnreadBytes)
      : config_(ParseConfig("inputs { name: 'x' shape: 1 } num_outputs: 1000000")),
        model_(
            std::make_shared<PuppetModel>([this](absl::Span<const Tensor> inputs, Model::States*) {
              const int64_t rows = inputs[0].shape()[0];
              computed_ += static_cast<int>(rows);
              return Model::Logits{Tensor::Zeros(DT_FLOAT, {rows, kOutputs}), rows};
            })),
        fixture_(model_, config_, /*max_queue=*/1000, max_unread_bytes) {
    request_.set_model_name("alpha");
    AddInput("x", FloatTensor({1, 1}, {5}), &request_);
  }

  // Another client, with a connection of its own.
  std::unique_ptr<GRPCInferenceService::Stub> Other() {
    return GRPCInferenceService::NewStub(
        MakeChannel(fixture_.server_->address(), ChannelUse::kPrediction));
  }
  // Until so much was computed, and then nothing for a while.
  void AwaitStandstill(int least = 1) {
    AwaitComputed(least);
    int before = -1;
    while (before != computed_) {
      before = computed_;
      absl::SleepFor(absl::Milliseconds(200));
    }
  }

  void AwaitComputed(int least) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (computed_ < least && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(1));
    ASSERT_GE(computed_, least);
  }

  std::atomic<int> computed_{0};
  const ModelConfig config_;
  const std::shared_ptr<PuppetModel> model_;
  Fixture fixture_;
  ModelInferRequest request_;
};

TEST_F(LargeAnswersTest, AStreamThatNobodyReadsStandsStill) {
  const auto context = MakeContext(absl::Now() + absl::Seconds(60));
  const auto stub = Other();
  const auto stream = stub->ModelStreamInfer(context.get());
  constexpr int kRequests = 200;
  std::thread writer([&] {
    for (int i = 0; i < kRequests && stream->Write(request_); ++i) {
    }
    stream->WritesDone();
  });
  AwaitStandstill();
  // 64 MiB of answers, those that the connection has taken, and the ones the limit is learnt from.
  EXPECT_LE(computed_, 40);
  // Others are served meanwhile.
  ModelInferResponse response;
  EXPECT_TRUE(fixture_.Infer(request_, &response).ok());
  // Once it is read, it goes on.
  int answers = 0;
  inference::ModelStreamInferResponse message;
  while (stream->Read(&message)) {
    EXPECT_EQ(message.error_message(), "");
    ++answers;
  }
  EXPECT_EQ(answers, kRequests);
  writer.join();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(LargeAnswersTest, AStreamThatNobodyReadsEndsWithItsDeadlineOrItsServer) {
  const auto stub = Other();
  for (const bool drained : {false, true}) {
    const auto context =
        MakeContext(absl::Now() + (drained ? absl::Seconds(60) : absl::Seconds(1)));
    const auto stream = stub->ModelStreamInfer(context.get());
    std::thread writer([&] {
      while (stream->Write(request_)) {
      }
    });
    while (fixture_.service_->registry()->size() == 0) absl::SleepFor(absl::Milliseconds(1));
    if (drained) {
      AwaitStandstill();
      fixture_.server_->Shutdown(absl::Now() + absl::Milliseconds(500));
    }
    writer.join();
    while (fixture_.service_->registry()->size() != 0) absl::SleepFor(absl::Milliseconds(1));
  }
}

// Calls of ModelInfer whose client never takes the answer off the connection.
TEST_F(LargeAnswersTest, CallsThatNobodyReadsEndWithTheirDeadline) {
  grpc::GenericStub stub(MakeChannel(fixture_.server_->address(), ChannelUse::kPrediction));
  const std::string bytes = request_.SerializeAsString();
  const grpc::Slice slice(bytes.data(), bytes.size());
  const grpc::ByteBuffer message(&slice, 1);
  constexpr int kCalls = 20;
  grpc::CompletionQueue queue;
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::GenericClientAsyncReaderWriter>> calls;
  void* tag = nullptr;
  bool ok = false;
  for (int i = 0; i < kCalls; ++i) {
    contexts.push_back(MakeContext(absl::Now() + absl::Seconds(2)));
    calls.push_back(stub.PrepareCall(contexts.back().get(),
                                     "/inference.GRPCInferenceService/ModelInfer", &queue));
    calls.back()->StartCall(nullptr);
    ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
    calls.back()->WriteLast(message, grpc::WriteOptions(), nullptr);
    ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  }
  AwaitComputed(kCalls);
  ModelInferResponse response;
  EXPECT_TRUE(fixture_.Infer(request_, &response).ok());
  std::vector<grpc::Status> statuses(kCalls);
  for (int i = 0; i < kCalls; ++i) calls[i]->Finish(&statuses[i], nullptr);
  for (int i = 0; i < kCalls; ++i) ASSERT_TRUE(queue.Next(&tag, &ok));
  while (fixture_.service_->registry()->size() != 0) absl::SleepFor(absl::Milliseconds(1));
}

class FewUnreadTest : public LargeAnswersTest {
 protected:
  FewUnreadTest() : LargeAnswersTest(32 << 20) {}
};

TEST_F(FewUnreadTest, AClientThatReadsNothingIsRefusedWhenEnoughWaits) {
  const auto stub = Other();
  struct Call {
    std::unique_ptr<grpc::ClientContext> context = MakeContext(absl::Now() + absl::Seconds(60));
    std::unique_ptr<
        grpc::ClientReaderWriter<ModelInferRequest, inference::ModelStreamInferResponse>>
        stream;
  };
  constexpr int kStreams = 50, kRequests = 12;
  std::vector<Call> calls(kStreams);
  for (Call& call : calls) {
    call.stream = stub->ModelStreamInfer(call.context.get());
    for (int i = 0; i < kRequests; ++i) {
      request_.set_id(absl::StrCat("request ", i));
      ASSERT_TRUE(call.stream->Write(request_));
    }
  }
  AwaitStandstill(9);
  // On the way to the client there may be an answer or two a stream, with the server as much as the
  // limit says and the pass that exceeded it.
  EXPECT_LT(computed_, kStreams * kRequests / 2);
  // Others are served.
  ModelInferResponse response;
  EXPECT_TRUE(fixture_.Infer(request_, &response).ok());
  // Once it reads, it is told what it has missed.
  int answers = 0, refused = 0;
  for (Call& call : calls) {
    EXPECT_TRUE(call.stream->WritesDone());
    inference::ModelStreamInferResponse message;
    std::set<std::string> ids;  // of each of its requests, whatever became of it
    while (call.stream->Read(&message)) {
      ++answers;
      ids.insert(message.infer_response().id());
      if (message.error_message().empty()) continue;
      ++refused;
      EXPECT_THAT(message.error_message(), HasSubstr("wait to be read"));
      const auto& parameters = message.infer_response().parameters();
      EXPECT_EQ(parameters.at("status").string_param(), "RESOURCE_EXHAUSTED");
      EXPECT_GT(parameters.at("retry_after_ms").int64_param(), 0);
    }
    EXPECT_TRUE(call.stream->Finish().ok());
    EXPECT_EQ(ids.size(), kRequests);
    EXPECT_EQ(ids.count(""), 0u);
  }
  EXPECT_EQ(answers, kStreams * kRequests);
  EXPECT_GT(refused, 0);
  // And is welcome again.
  const auto context = MakeContext(absl::Now() + absl::Seconds(30));
  const absl::Status again = FromGrpcStatus(stub->ModelInfer(context.get(), request_, &response));
  EXPECT_TRUE(again.ok()) << again;
}

}  // namespace
}  // namespace codistill
