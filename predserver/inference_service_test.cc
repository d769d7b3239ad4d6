// The service over a real socket, driven as any other client of the protocol would: with plain
// generated stubs, on both sides of whose messages stand our own encoder and decoder.

#include "predserver/inference_service.h"

#include <cstring>
#include <set>
#include <thread>

#include "absl/time/clock.h"
#include "common/base/retry_after.h"
#include "common/model/test_archive.h"
#include "common/rpc/channel.h"
#include "gmock/gmock.h"
#include "grpcpp/generic/generic_stub.h"
#include "gtest/gtest.h"
#include "predserver/inference_service_fixture.h"

namespace codistill {
namespace {

using inference::GRPCInferenceService;
using inference::ModelInferRequest;
using inference::ModelInferResponse;
using testing::ElementsAre;
using testing::HasSubstr;

std::shared_ptr<const Model> LoadModel(const std::string& folder, const ModelConfig& config) {
  Model::Options options;
  options.archive = folder + "/m.pt";
  options.config = config;
  auto model = Model::Load(options);
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

std::vector<float> Floats(const std::string& bytes) {
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

void ExpectNear(absl::Span<const float> got, absl::Span<const float> want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-6) << i;
}

class MlpTest : public testing::Test {
 protected:
  MlpTest()
      : config_(ParseConfig("inputs { name: 'x' shape: 16 } num_outputs: 300")),
        model_(LoadModel(Folder(), config_)),
        fixture_(model_, config_) {}

  static std::string Folder() {
    static const std::string folder =
        ExportForTest("m", "mlp", {"in_features=16", "hidden=8", "num_classes=300"});
    return folder;
  }

  ModelInferRequest Request(const Tensor& x) {
    ModelInferRequest request;
    request.set_model_name("alpha");
    request.set_id("request-7");
    AddInput("x", x, &request);
    return request;
  }

  const ModelConfig config_;
  const std::shared_ptr<const Model> model_;
  Fixture fixture_;
};

TEST_F(MlpTest, RawContentsGiveWhatTheModelSays) {
  const Tensor x = RandomFloats({50, 16}, 1);
  ModelInferRequest request = Request(x);
  AddInput("example_id", Int64Tensor({50}, std::vector<int64_t>(50, 9)), &request);
  ModelInferResponse response;
  const absl::Status status = fixture_.Infer(request, &response);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(response.model_name(), "alpha");
  EXPECT_EQ(response.model_version(), "2.30");
  EXPECT_EQ(response.id(), "request-7");
  ASSERT_EQ(response.outputs_size(), 1);
  EXPECT_EQ(response.outputs(0).name(), "logits");
  EXPECT_EQ(response.outputs(0).datatype(), "FP32");
  EXPECT_THAT(response.outputs(0).shape(), ElementsAre(50, 300));
  ASSERT_EQ(response.raw_output_contents_size(), 1);
  ExpectNear(Floats(response.raw_output_contents(0)),
             model_->Predict({x}, nullptr)->values.As<float>());
  auto parameter = [&](const char* name) { return response.parameters().at(name); };
  EXPECT_EQ(parameter("generation").int64_param(), 2);
  EXPECT_EQ(parameter("step").int64_param(), 30);
  EXPECT_EQ(parameter("latest_step").int64_param(), 33);
  EXPECT_EQ(parameter("staleness_steps").int64_param(), 3);
  EXPECT_GE(parameter("age_ms").int64_param(), 0);
  EXPECT_EQ(parameter("precision").string_param(), "FP32");
}

TEST_F(MlpTest, TypedContentsAreTheSameQuestion) {
  const Tensor x = RandomFloats({3, 16}, 2);
  ModelInferRequest request = Request(x);
  request.clear_raw_input_contents();
  for (float value : x.As<float>()) {
    request.mutable_inputs(0)->mutable_contents()->add_fp32_contents(value);
  }
  ModelInferResponse response;
  const absl::Status status = fixture_.Infer(request, &response);
  ASSERT_TRUE(status.ok()) << status;
  ExpectNear(Floats(response.raw_output_contents(0)),
             model_->Predict({x}, nullptr)->values.As<float>());
}

TEST_F(MlpTest, LargeMessagesTravelWhole) {
  const Tensor x = RandomFloats({40000, 16}, 3);  // 2.5 MB in, 48 MB out
  ModelInferResponse response;
  const absl::Status status = fixture_.Infer(Request(x), &response);
  ASSERT_TRUE(status.ok()) << status;
  const std::vector<float> got = Floats(response.raw_output_contents(0));
  const Tensor want = model_->Predict({x}, nullptr)->values;
  ASSERT_EQ(got.size(), want.As<float>().size());
  double largest = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(got[i]) - want.As<float>()[i]));
  }
  EXPECT_LT(largest, 1e-6);
}

TEST_F(MlpTest, MistakesAreNamed) {
  const Tensor x = RandomFloats({2, 16}, 1);
  ModelInferResponse response;
  auto error = [&](const ModelInferRequest& request) {
    const absl::Status status = fixture_.Infer(request, &response);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    return std::string(status.message());
  };
  ModelInferRequest request = Request(RandomFloats({2, 15}, 1));
  EXPECT_EQ(error(request), "input x: shape is [2, 15]; it must be [B, 16] with B >= 1");
  request = Request(x);
  request.add_raw_input_contents("more");
  EXPECT_THAT(error(request), HasSubstr("raw_input_contents: has 2 entries for 1 inputs"));
  request = Request(x);
  request.mutable_inputs(0)->mutable_contents()->add_fp32_contents(1);
  EXPECT_THAT(error(request), HasSubstr("input x: has contents although"));
  request = Request(x);
  request.clear_raw_input_contents();
  EXPECT_THAT(error(request), HasSubstr("input x: contents are 0 bytes"));
  request = Request(x);
  (*request.mutable_parameters())["max_staleness_steps"].set_string_param("few");
  EXPECT_THAT(error(request), HasSubstr("parameter max_staleness_steps"));

  request = Request(x);
  request.set_model_name("beta");
  EXPECT_TRUE(absl::IsNotFound(fixture_.Infer(request, &response)));
  request = Request(x);
  request.set_model_version("1.30");
  EXPECT_TRUE(absl::IsNotFound(fixture_.Infer(request, &response)));
  request = Request(x);
  (*request.mutable_parameters())["max_staleness_steps"].set_int64_param(2);
  EXPECT_TRUE(absl::IsFailedPrecondition(fixture_.Infer(request, &response)));
  (*request.mutable_parameters())["max_staleness_steps"].set_string_param("3");
  EXPECT_TRUE(fixture_.Infer(request, &response).ok());
}

TEST_F(MlpTest, TellsWhatItIs) {
  auto context = [] { return MakeContext(absl::Now() + absl::Seconds(30)); };
  inference::ServerLiveResponse live;
  ASSERT_TRUE(fixture_.stub_->ServerLive(context().get(), {}, &live).ok());
  EXPECT_TRUE(live.live());
  inference::ServerReadyResponse ready;
  ASSERT_TRUE(fixture_.stub_->ServerReady(context().get(), {}, &ready).ok());
  EXPECT_TRUE(ready.ready());
  inference::ServerMetadataResponse server;
  ASSERT_TRUE(fixture_.stub_->ServerMetadata(context().get(), {}, &server).ok());
  EXPECT_EQ(server.name(), "codistill");

  inference::ModelReadyRequest model;
  model.set_name("alpha");
  inference::ModelReadyResponse model_ready;
  ASSERT_TRUE(fixture_.stub_->ModelReady(context().get(), model, &model_ready).ok());
  EXPECT_TRUE(model_ready.ready());
  model.set_version("2.29");
  ASSERT_TRUE(fixture_.stub_->ModelReady(context().get(), model, &model_ready).ok());
  EXPECT_FALSE(model_ready.ready());

  inference::ModelMetadataRequest metadata;
  metadata.set_name("alpha");
  inference::ModelMetadataResponse description;
  ASSERT_TRUE(fixture_.stub_->ModelMetadata(context().get(), metadata, &description).ok());
  EXPECT_THAT(description.versions(), ElementsAre("2.30"));
  ASSERT_EQ(description.inputs_size(), 1);
  EXPECT_EQ(description.inputs(0).name(), "x");
  EXPECT_EQ(description.inputs(0).datatype(), "FP32");
  EXPECT_THAT(description.inputs(0).shape(), ElementsAre(-1, 16));
  EXPECT_EQ(description.platform(), "codistill_torchscript");
  std::vector<std::string> outputs;
  for (const auto& output : description.outputs()) {
    outputs.push_back(output.name() + " " + output.datatype());
  }
  EXPECT_THAT(outputs, ElementsAre("logits FP32", "logits_scale FP32", "probabilities FP32",
                                   "topk_index INT32", "topk_value FP32", "tail_mass FP32"));
  EXPECT_THAT(description.outputs(0).shape(), ElementsAre(-1, 300));
  EXPECT_THAT(description.outputs(3).shape(), ElementsAre(-1, -1));
  metadata.set_name("beta");
  EXPECT_EQ(fixture_.stub_->ModelMetadata(context().get(), metadata, &description).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(MlpTest, TellsConfigurationIndexAndStatistics) {
  auto context = [] { return MakeContext(absl::Now() + absl::Seconds(30)); };
  ModelInferResponse answer;
  ASSERT_TRUE(fixture_.Infer(Request(RandomFloats({4, 16}, 1)), &answer).ok());
  EXPECT_FALSE(fixture_.Infer(Request(RandomFloats({4, 15}, 1)), &answer).ok());

  inference::ModelConfigRequest config_request;
  config_request.set_name("alpha");
  inference::ModelConfigResponse config_response;
  ASSERT_TRUE(fixture_.stub_->ModelConfig(context().get(), config_request, &config_response).ok());
  const inference::ModelConfig& config = config_response.config();
  EXPECT_EQ(config.name(), "alpha");
  EXPECT_EQ(config.backend(), "codistill");
  EXPECT_EQ(config.max_batch_size(), 256);
  EXPECT_EQ(config.dynamic_batching().max_queue_delay_microseconds(), 1000);
  EXPECT_EQ(config.version_policy().latest().num_versions(), 1);
  EXPECT_EQ(config.input(0).data_type(), inference::TYPE_FP32);
  EXPECT_THAT(config.input(0).dims(), ElementsAre(16));
  EXPECT_THAT(config.output(0).dims(), ElementsAre(300));
  config_request.set_name("beta");
  EXPECT_EQ(
      fixture_.stub_->ModelConfig(context().get(), config_request, &config_response).error_code(),
      grpc::StatusCode::NOT_FOUND);

  inference::RepositoryIndexResponse index;
  ASSERT_TRUE(fixture_.stub_->RepositoryIndex(context().get(), {}, &index).ok());
  ASSERT_EQ(index.models_size(), 1);
  EXPECT_EQ(index.models(0).name(), "alpha");
  EXPECT_EQ(index.models(0).version(), "2.30");
  EXPECT_EQ(index.models(0).state(), "READY");
  inference::RepositoryIndexRequest elsewhere;
  elsewhere.set_repository_name("attic");
  EXPECT_FALSE(fixture_.stub_->RepositoryIndex(context().get(), elsewhere, &index).ok());

  inference::ModelStatisticsResponse statistics;
  ASSERT_TRUE(fixture_.stub_->ModelStatistics(context().get(), {}, &statistics).ok());
  ASSERT_EQ(statistics.model_stats_size(), 1);
  EXPECT_EQ(statistics.model_stats(0).name(), "alpha");
  EXPECT_EQ(statistics.model_stats(0).version(), "2.30");
  EXPECT_EQ(statistics.model_stats(0).inference_stats().success().count(), 1);
  EXPECT_EQ(statistics.model_stats(0).inference_stats().fail().count(), 1);
  EXPECT_EQ(statistics.model_stats(0).inference_count(), 4);
  EXPECT_EQ(statistics.model_stats(0).execution_count(), 1);
  EXPECT_GT(statistics.model_stats(0).inference_stats().compute_infer().ns(), 0);
  EXPECT_GT(statistics.model_stats(0).last_inference(), 0);
  ASSERT_EQ(statistics.model_stats(0).batch_stats_size(), 1);
  EXPECT_EQ(statistics.model_stats(0).batch_stats(0).batch_size(), 4);
  inference::ModelStatisticsRequest nobody;
  nobody.set_name("beta");
  EXPECT_FALSE(fixture_.stub_->ModelStatistics(context().get(), nobody, &statistics).ok());
}

TEST_F(MlpTest, StreamsAnswerEveryRequestByItsId) {
  constexpr int kRequests = 50;
  const auto context = MakeContext(absl::Now() + absl::Seconds(60));
  const auto stream = fixture_.stub_->ModelStreamInfer(context.get());
  std::thread writer([&] {
    for (int i = 0; i < kRequests; ++i) {
      ModelInferRequest request = Request(RandomFloats({1 + i % 3, 16}, i));
      request.set_id(std::to_string(i));
      if (i % 7 == 3) request.set_model_name("beta");
      EXPECT_TRUE(stream->Write(request));
    }
    EXPECT_TRUE(stream->WritesDone());
  });
  std::set<std::string> answered;
  inference::ModelStreamInferResponse message;
  while (stream->Read(&message)) {
    const ModelInferResponse& response = message.infer_response();
    EXPECT_TRUE(answered.insert(response.id()).second) << response.id();
    const int i = std::stoi(response.id());
    if (i % 7 == 3) {
      EXPECT_THAT(message.error_message(), HasSubstr("no model \"beta\""));
      EXPECT_EQ(response.parameters().at("status").string_param(), "NOT_FOUND");
      continue;
    }
    EXPECT_EQ(message.error_message(), "");
    const Tensor x = RandomFloats({1 + i % 3, 16}, i);
    ExpectNear(Floats(response.raw_output_contents(0)),
               model_->Predict({x}, nullptr)->values.As<float>());
  }
  writer.join();
  EXPECT_EQ(answered.size(), kRequests);
  const grpc::Status status = stream->Finish();
  EXPECT_TRUE(status.ok()) << status.error_message();
  while (fixture_.service_->registry()->size() != 0) absl::SleepFor(absl::Milliseconds(1));
}

// As a stock client writes to a server that it does not trust with its own messages.
absl::Status SendBytes(const std::string& address, const std::string& bytes) {
  grpc::GenericStub stub(MakeChannel(address, ChannelUse::kPrediction));
  const auto context = MakeContext(absl::Now() + absl::Seconds(30));
  const grpc::Slice slice(bytes.data(), bytes.size());
  const grpc::ByteBuffer request(&slice, 1);
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareUnaryCall(
      context.get(), "/inference.GRPCInferenceService/ModelInfer", request, &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  EXPECT_TRUE(queue.Next(&tag, &ok));
  return FromGrpcStatus(status);
}

TEST_F(MlpTest, GarbageIsRefusedOnCallsAndStreams) {
  for (const std::string& garbage : {std::string("garbage"), std::string(100, '\xff')}) {
    const absl::Status status = SendBytes(fixture_.server_->address(), garbage);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  }
  // No bytes at all are a request that asks for nothing.
  EXPECT_TRUE(absl::IsNotFound(SendBytes(fixture_.server_->address(), "")));
  ModelInferResponse response;
  EXPECT_TRUE(fixture_.Infer(Request(RandomFloats({2, 16}, 1)), &response).ok());
}

TEST(InferenceServiceTest, ResponsesThatFitNoMessageAreRefusedByName) {
  const ModelConfig config = ParseConfig("inputs { name: 'x' shape: 1 } num_outputs: 1000");
  std::atomic<int> passes{0};
  const auto model = std::make_shared<PuppetModel>(
      [&](absl::Span<const Tensor> inputs, Model::States*) -> absl::StatusOr<Model::Logits> {
        ++passes;
        const int64_t rows = inputs[0].shape()[0];
        return Model::Logits{Tensor::Zeros(DT_FLOAT, {rows, 1000}), rows};
      });
  Fixture fixture(model, config);
  ModelInferRequest request;
  request.set_model_name("alpha");
  AddInput("x", Tensor::Zeros(DT_FLOAT, {17000, 1}), &request);
  ModelInferResponse response;
  const absl::Status status = fixture.Infer(request, &response);
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("input x: has 17000 examples, with 4000 bytes of outputs each"));
  EXPECT_EQ(passes, 0);
}

TEST(InferenceServiceTest, RecurrentStateContinuesOverTheWire) {
  const ModelConfig config = ParseConfig(
      "inputs { name: 'tokens' dtype: DT_INT64 shape: 3 } states { name: 'h' shape: [1, -1, 4] }"
      "states { name: 'c' shape: [1, -1, 4] } num_outputs: 7");
  const auto model =
      LoadModel(ExportForTest("m", "lstm_lm", {"vocabulary=7", "embedding=4", "hidden=4"}), config);
  Fixture fixture(model, config);
  Model::States states;
  ModelInferResponse response;
  for (int i = 0; i < 3; ++i) {
    const Tensor tokens = Int64Tensor({2, 3}, {i, 1, 2, 3, 4, 5});
    ModelInferRequest request;
    request.set_model_name("alpha");
    AddInput("tokens", tokens, &request);
    for (int s = 0; s < 2 && i > 0; ++s) {
      auto* state = request.add_inputs();
      state->set_name(s == 0 ? "h" : "c");
      state->set_datatype("FP32");
      for (int64_t size : {1, 2, 4}) state->add_shape(size);
      request.add_raw_input_contents(response.raw_output_contents(s + 1));
    }
    response.Clear();
    const absl::Status status = fixture.Infer(request, &response);
    ASSERT_TRUE(status.ok()) << status;
    const auto want = model->Predict({tokens}, &states);
    ASSERT_TRUE(want.ok()) << want.status();
    ASSERT_EQ(response.outputs_size(), 3);
    EXPECT_THAT(response.outputs(0).shape(), ElementsAre(6, 7));
    EXPECT_EQ(response.outputs(1).name(), "h");
    EXPECT_EQ(response.outputs(2).name(), "c");
    ExpectNear(Floats(response.raw_output_contents(0)), want->values.As<float>());
    ExpectNear(Floats(response.raw_output_contents(1)), states[0].As<float>());
    ExpectNear(Floats(response.raw_output_contents(2)), states[1].As<float>());
  }

  // Words that the model does not know, in a batch with words that it knows.
  const auto ask = [&](int64_t word) {
    ModelInferRequest request;
    request.set_model_name("alpha");
    AddInput("tokens", Int64Tensor({1, 3}, {word, 1, 2}), &request);
    ModelInferResponse answer;
    return fixture.Infer(request, &answer);
  };
  std::vector<std::thread> callers;
  for (const int64_t word : {0, 7, 6, -1, 5, 1 << 30}) {
    callers.emplace_back([&ask, word] {
      for (int i = 0; i < 20; ++i) {
        const absl::Status status = ask(word);
        EXPECT_EQ(status.code(), word >= 0 && word < 7 ? absl::StatusCode::kOk
                                                       : absl::StatusCode::kInvalidArgument)
            << word << ": " << status;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void AwaitQueued(const Fixture& fixture, int64_t requests) {
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  int64_t queued = -1;
  while (queued != requests && absl::Now() < deadline) {
    ServedModelStatus status;
    (*fixture.models_->Find("alpha"))->FillStatus(&status);
    queued = status.queued();
  }
  ASSERT_EQ(queued, requests);
}

// Passes that take as long as the test likes.
class SlowTest : public testing::Test {
 protected:
  SlowTest()
      : config_(ParseConfig("inputs { name: 'x' shape: 1 } num_outputs: 1")),
        model_(std::make_shared<PuppetModel>([](absl::Span<const Tensor> inputs, Model::States*) {
          return Model::Logits{inputs[0], inputs[0].shape()[0]};
        })),
        fixture_(model_, config_, /*max_queue=*/1) {
    request_.set_model_name("alpha");
    AddInput("x", FloatTensor({1, 1}, {5}), &request_);
    model_->HoldUp();
  }
  ~SlowTest() override { model_->LetGo(); }

  const ModelConfig config_;
  const std::shared_ptr<PuppetModel> model_;
  Fixture fixture_;
  ModelInferRequest request_;
};

TEST_F(SlowTest, CallsWaitingForComputeEndWithTheirDeadlineOrTheirServer) {
  ModelInferResponse response;
  EXPECT_TRUE(
      absl::IsDeadlineExceeded(fixture_.Infer(request_, &response, absl::Milliseconds(200))));
  while (fixture_.service_->registry()->size() != 0) absl::SleepFor(absl::Milliseconds(1));
  absl::Status parked;
  std::thread caller([&] { parked = fixture_.Infer(request_, &response); });
  while (fixture_.service_->registry()->size() == 0) absl::SleepFor(absl::Milliseconds(1));
  const absl::Time start = absl::Now();
  fixture_.server_->Shutdown(absl::Now() + absl::Seconds(1));
  caller.join();
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
  EXPECT_TRUE(absl::IsUnavailable(parked)) << parked;
  // The pass that was held up ends after its call and its server have gone.
  model_->LetGo();
  fixture_.models_->Drain();
}

TEST(InferenceServiceTest, StreamsGetTheirAnswersWhenTheServerGoes) {
  const auto model =
      std::make_shared<PuppetModel>([](absl::Span<const Tensor> inputs, Model::States*) {
        return Model::Logits{inputs[0], inputs[0].shape()[0]};
      });
  Fixture fixture(model, ParseConfig("inputs { name: 'x' shape: 1 } num_outputs: 1"));
  model->HoldUp();
  const auto context = MakeContext(absl::Now() + absl::Seconds(60));
  const auto stream = fixture.stub_->ModelStreamInfer(context.get());
  constexpr int kRequests = 5;
  for (int i = 0; i < kRequests; ++i) {
    ModelInferRequest request;
    request.set_model_name("alpha");
    request.set_id(std::to_string(i));
    AddInput("x", FloatTensor({1, 1}, {static_cast<float>(i)}), &request);
    ASSERT_TRUE(stream->Write(request));
    model->AwaitPasses(1);  // of the first alone
  }
  AwaitQueued(fixture, kRequests - 1);
  fixture.service_->registry()->FinishAll();
  model->LetGo();
  std::set<std::string> answered;
  inference::ModelStreamInferResponse message;
  while (stream->Read(&message)) {
    EXPECT_EQ(message.error_message(), "");
    answered.insert(message.infer_response().id());
  }
  EXPECT_EQ(answered.size(), kRequests);
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(SlowTest, FullQueueIsRefusedOverTheWire) {
  std::vector<std::thread> callers;
  std::vector<absl::Status> statuses(2);
  for (absl::Status& status : statuses) {
    callers.emplace_back([&] {
      ModelInferResponse response;
      status = fixture_.Infer(request_, &response);
    });
    // The first is being computed before the second comes.
    model_->AwaitPasses(1);
  }
  AwaitQueued(fixture_, 1);
  ModelInferResponse response;
  const absl::Status refused = fixture_.Infer(request_, &response);
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_TRUE(RetryAfter(refused).has_value());
  model_->LetGo();
  for (std::thread& caller : callers) caller.join();
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

}  // namespace
}  // namespace codistill
