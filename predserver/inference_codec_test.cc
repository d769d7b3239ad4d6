#include "predserver/inference_codec.h"

#include <cstring>
#include <vector>

#include "common/base/retry_after.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "google/protobuf/util/message_differencer.h"
#include "gtest/gtest.h"
#include "proto/open_inference.pb.h"

namespace codistill {
namespace {

using inference::ModelInferRequest;
using inference::ModelStreamInferResponse;
using testing::ElementsAre;
using testing::HasSubstr;

ModelInferRequest Parse(const std::string& text) {
  ModelInferRequest request;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &request)) << text;
  return request;
}

grpc::ByteBuffer Bytes(const std::string& bytes) {
  const grpc::Slice slice(bytes.data(), bytes.size());
  return grpc::ByteBuffer(&slice, 1);
}

std::string Text(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}

InferenceRequest Decode(const std::string& text) {
  InferenceRequest request;
  const absl::Status status =
      DecodeInferenceRequest(Bytes(Parse(text).SerializeAsString()), &request);
  EXPECT_TRUE(status.ok()) << status;
  return request;
}

std::string Error(const std::string& text) {
  InferenceRequest request;
  const absl::Status status =
      DecodeInferenceRequest(Bytes(Parse(text).SerializeAsString()), &request);
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  return std::string(status.message());
}

std::string Parameter(const std::string& name, const std::string& value) {
  return "parameters { key: '" + name + "' value { " + value + " } }";
}

std::string Content(const PredictionRequest::Input& input) {
  std::string bytes;
  for (const auto& part : input.parts) {
    bytes.append(reinterpret_cast<const char*>(part.data()), part.size());
  }
  return bytes;
}

TEST(InferenceCodecTest, ReadsTheParametersThatMeanSomething) {
  const InferenceRequest request =
      Decode("model_name: 'alpha' model_version: '2.30' id: 'seven' " +
             Parameter("max_staleness_steps", "uint64_param: 5") +
             Parameter("temperature", "double_param: 2.5") + Parameter("top_k", "int64_param: 3") +
             Parameter("format", "string_param: 'FP16'") +
             Parameter("timeout", "int64_param: 2000") + "outputs { name: 'topk_value' }");
  EXPECT_EQ(request.id, "seven");
  EXPECT_EQ(request.timeout, absl::Milliseconds(2));
  const PredictionRequest& prediction = request.prediction;
  EXPECT_EQ(prediction.model, "alpha");
  EXPECT_EQ(prediction.version, "2.30");
  EXPECT_EQ(prediction.max_staleness_steps, 5);
  EXPECT_EQ(prediction.format.temperature, 2.5);
  EXPECT_EQ(prediction.format.top_k, 3);
  EXPECT_EQ(prediction.format.dtype, DT_HALF);
  EXPECT_THAT(prediction.outputs, ElementsAre("topk_value"));
  EXPECT_FALSE(prediction.sequence);
}

TEST(InferenceCodecTest, NumbersMayBeStringsAndTemperaturesIntegers) {
  const InferenceRequest request =
      Decode(Parameter("max_staleness_steps", "string_param: '5'") +
             Parameter("temperature", "int64_param: 2") + Parameter("top_k", "string_param: '3'") +
             Parameter("format", "string_param: 'INT8'"));
  EXPECT_EQ(request.prediction.max_staleness_steps, 5);
  EXPECT_EQ(request.prediction.format.temperature, 2);
  EXPECT_EQ(request.prediction.format.top_k, 3);
  EXPECT_EQ(request.prediction.format.dtype, DT_INT8);
  EXPECT_EQ(Decode(Parameter("temperature", "string_param: '0.5'")).prediction.format.temperature,
            0.5);
}

TEST(InferenceCodecTest, WhatStockClientsSendIsNoObstacle) {
  const InferenceRequest request = Decode(
      Parameter("priority", "uint64_param: 1") + Parameter("binary_data_output", "bool_param: 1") +
      Parameter("timeout", "int64_param: 0") + Parameter("sequence_id", "int64_param: 0") +
      Parameter("sequence_start", "bool_param: true") +
      Parameter("sequence_end", "bool_param: false") +
      Parameter("triton_enable_empty_final_response", "bool_param: true") +
      "outputs { name: 'y' parameters { key: 'binary_data' value { bool_param: true } } "
      "parameters { key: 'classification' value { int64_param: 0 } } }");
  EXPECT_EQ(request.timeout, absl::InfiniteDuration());
  EXPECT_FALSE(request.prediction.sequence);
  EXPECT_TRUE(request.mark_final);
  EXPECT_TRUE(Decode(Parameter("sequence_id", "string_param: 's'")).prediction.sequence);
  EXPECT_TRUE(Decode(Parameter("sequence_id", "uint64_param: 4")).prediction.sequence);
}

TEST(InferenceCodecTest, ParametersThatMakeNoSenseAreNamed) {
  EXPECT_EQ(Error(Parameter("max_staleness_steps", "int64_param: -1")),
            "parameter max_staleness_steps: int64_param: -1; it must be an integer >= 0");
  for (const char* value : {"string_param: 'few'", "bool_param: true", "double_param: 1.5",
                            "uint64_param: 18446744073709551615"}) {
    EXPECT_THAT(Error(Parameter("max_staleness_steps", value)), HasSubstr("an integer >= 0"));
  }
  for (const char* value : {"double_param: 0", "double_param: -1", "double_param: nan",
                            "string_param: 'inf'", "string_param: 'hot'", "bool_param: true", ""}) {
    EXPECT_THAT(Error(Parameter("temperature", value)), HasSubstr("a finite number above 0"));
  }
  EXPECT_THAT(Error(Parameter("top_k", "int64_param: 0")), HasSubstr("an integer >= 1"));
  EXPECT_THAT(Error(Parameter("format", "string_param: 'FP64'")),
              HasSubstr("FP32, FP16, BF16 or INT8"));
  EXPECT_THAT(Error(Parameter("format", "int64_param: 16")), HasSubstr("FP32, FP16"));
  EXPECT_THAT(Error(Parameter("timeout", "int64_param: -5")), HasSubstr("microseconds >= 0"));
  EXPECT_THAT(Error(Parameter("temprature", "double_param: 2")),
              HasSubstr("parameter \"temprature\": unknown"));
  EXPECT_THAT(Error("inputs { name: 'x' parameters { key: 'shared_memory_region' value { "
                    "string_param: 'r' } } }"),
              HasSubstr("input x: parameter shared_memory_region: there is no shared memory"));
  EXPECT_THAT(Error("outputs { name: 'y' parameters { key: 'shared_memory_region' value { "
                    "string_param: 'r' } } }"),
              HasSubstr("output y: parameter shared_memory_region"));
  EXPECT_THAT(Error("outputs { name: 'y' parameters { key: 'classification' value { "
                    "int64_param: 3 } } }"),
              HasSubstr("output y: parameter classification"));
}

TEST(InferenceCodecTest, TypedContentsBecomeTheBytesThatRawOnesWouldBe) {
  const InferenceRequest request = Decode(
      "inputs { name: 'f' datatype: 'FP32' contents { fp32_contents: [1, -2] } }"
      "inputs { name: 'i' datatype: 'INT64' contents { int64_contents: 7 } }"
      "inputs { name: 'u' datatype: 'UINT8' contents { uint_contents: [255, 0] } }"
      "inputs { name: 's' datatype: 'INT8' contents { int_contents: [-128, 127] } }"
      "inputs { name: 'b' datatype: 'BOOL' contents { bool_contents: [true, false] } }");
  const auto& inputs = request.prediction.inputs;
  ASSERT_EQ(inputs.size(), 5);
  const float floats[] = {1, -2};
  EXPECT_EQ(Content(inputs[0]), std::string(reinterpret_cast<const char*>(floats), 8));
  const int64_t seven = 7;
  EXPECT_EQ(Content(inputs[1]), std::string(reinterpret_cast<const char*>(&seven), 8));
  EXPECT_EQ(Content(inputs[2]), std::string("\xff\0", 2));
  EXPECT_EQ(Content(inputs[3]), std::string("\x80\x7f", 2));
  EXPECT_EQ(Content(inputs[4]), std::string("\1\0", 2));
  EXPECT_THAT(Error("inputs { name: 'u' datatype: 'UINT8' contents { uint_contents: 256 } }"),
              HasSubstr("input u: contents have 256"));
  EXPECT_THAT(Error("inputs { name: 'h' datatype: 'FP16' contents { fp32_contents: 1 } }"),
              HasSubstr("input h: datatype \"FP16\" has no typed contents"));
}

TEST(InferenceCodecTest, TypedContentsAreNotKeptTwice) {
  const ModelInferRequest typed =
      Parse("inputs { name: 'f' datatype: 'FP32' contents { fp32_contents: [1, -2] } }");
  const ModelInferRequest raw =
      Parse("inputs { name: 'f' datatype: 'FP32' } raw_input_contents: '12345678'");
  for (const ModelInferRequest* const message : {&typed, &raw}) {
    std::string bytes = message->SerializeAsString();
    bool let_go = false;
    grpc::ByteBuffer buffer;
    {
      const grpc::Slice slice(
          bytes.data(), bytes.size(), [](void* gone) { *static_cast<bool*>(gone) = true; },
          &let_go);
      buffer = grpc::ByteBuffer(&slice, 1);
    }
    InferenceRequest request;
    ASSERT_TRUE(DecodeInferenceRequest(buffer, &request).ok());
    buffer.Clear();
    EXPECT_EQ(let_go, message == &typed);
    request.prediction.owner.reset();
    EXPECT_TRUE(let_go);
  }
}

TEST(InferenceCodecTest, TheModelIsSeenFromOutside) {
  const auto peek = [](const std::string& text) {
    return PeekHead(Bytes(Parse(text).SerializeAsString()));
  };
  RequestHead head = peek("model_name: 'alpha' model_version: '3.1' id: 'x' inputs { name: 'a' }");
  EXPECT_EQ(head.model, "alpha");
  EXPECT_EQ(head.id, "x");
  head = peek("id: 'x'");
  EXPECT_EQ(head.model, "");
  EXPECT_EQ(head.id, "x");
  EXPECT_EQ(peek("model_name: 'alpha' id: '" + std::string(kMaxIdBytes + 1, 'x') + "'").id, "");
  EXPECT_EQ(PeekHead(Bytes("\x0a\x05"
                           "alph"))
                .model,
            "");
  EXPECT_EQ(PeekHead(Bytes("\x0a\xff")).model, "");
  EXPECT_EQ(PeekHead(Bytes("")).model, "");
  EXPECT_EQ(PeekHead(grpc::ByteBuffer()).model, "");
}

TEST(InferenceCodecTest, LongIdsAreRefusedAndLongErrorsCutOff) {
  EXPECT_THAT(Error("id: '" + std::string(5000, 'x') + "'"),
              HasSubstr("id: has 5000 bytes; it may have at most 4096"));
  std::string long_text;
  for (int i = 0; i < 2000; ++i) long_text += "\xc3\xa9";  // two bytes each
  const grpc::ByteBuffer error = EncodeStreamError("7", absl::NotFoundError("x" + long_text));
  inference::ModelStreamInferResponse message;
  std::vector<grpc::Slice> slices;
  ASSERT_TRUE(error.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  ASSERT_TRUE(message.ParseFromString(bytes));  // which it is not if a character is cut in two
  EXPECT_LT(message.error_message().size(), 2200u);
  EXPECT_THAT(message.error_message(), HasSubstr("more bytes)"));
  EXPECT_EQ(message.infer_response().id(), "7");
}

TEST(InferenceCodecTest, GarbageIsRefused) {
  InferenceRequest request;
  for (const std::string& garbage :
       {std::string("garbage"), std::string("\xff\xff\xff\xff"), std::string("\x3a\x7f"),
        std::string(1000, '\x0a'), std::string("\x12\x04\xff\xff\xff\xff")}) {
    EXPECT_TRUE(absl::IsInvalidArgument(DecodeInferenceRequest(Bytes(garbage), &request)));
  }
  EXPECT_TRUE(absl::IsInvalidArgument(DecodeInferenceRequest(grpc::ByteBuffer(), &request)));
}

Prediction SomePrediction() {
  Prediction prediction;
  prediction.version.set_generation(2);
  prediction.version.set_step(30);
  prediction.latest_step = 33;
  prediction.staleness_steps = 3;
  prediction.age = absl::Milliseconds(1500);
  prediction.precision = DT_BFLOAT16;
  prediction.outputs.push_back({"logits", Tensor::Zeros(DT_FLOAT, {2, 300})});
  prediction.outputs.push_back({"topk_index", Tensor::Zeros(DT_INT32, {2, 1})});
  return prediction;
}

TEST(InferenceCodecTest, StreamResponsesAreResponsesInAnEnvelope) {
  InferenceRequest request;
  request.id = "seven";
  request.mark_final = true;
  const Prediction prediction = SomePrediction();
  EXPECT_EQ(ResponseBytes(prediction), 2408);
  const grpc::ByteBuffer response = EncodeInferenceResponse("alpha", request, prediction, nullptr);
  inference::ModelInferResponse plain;
  ASSERT_TRUE(plain.ParseFromString(Text(response)));
  EXPECT_EQ(plain.model_name(), "alpha");
  EXPECT_EQ(plain.model_version(), "2.30");
  EXPECT_EQ(plain.id(), "seven");
  EXPECT_EQ(plain.parameters().at("precision").string_param(), "BF16");
  EXPECT_EQ(plain.parameters().at("age_ms").int64_param(), 1500);
  EXPECT_TRUE(plain.parameters().at("triton_final_response").bool_param());
  ASSERT_EQ(plain.raw_output_contents_size(), 2);
  EXPECT_EQ(plain.raw_output_contents(0).size(), 2400);

  ModelStreamInferResponse message;
  ASSERT_TRUE(message.ParseFromString(Text(EncodeStreamResponse(response))));
  EXPECT_EQ(message.error_message(), "");
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(message.infer_response(), plain));
}

TEST(InferenceCodecTest, StreamErrorsSayWhichRequestFailedAndHow) {
  ModelStreamInferResponse message;
  const absl::Status status =
      WithRetryAfter(absl::ResourceExhaustedError("full"), absl::Milliseconds(250));
  ASSERT_TRUE(message.ParseFromString(Text(EncodeStreamError("seven", status))));
  EXPECT_EQ(message.error_message(), "[request id: seven] full");
  EXPECT_EQ(message.infer_response().id(), "seven");
  const auto& parameters = message.infer_response().parameters();
  EXPECT_EQ(parameters.at("status").string_param(), "RESOURCE_EXHAUSTED");
  EXPECT_EQ(parameters.at("retry_after_ms").int64_param(), 250);
  ASSERT_TRUE(message.ParseFromString(Text(EncodeStreamError("", absl::UnavailableError("")))));
  EXPECT_EQ(message.error_message(), "UNAVAILABLE");
}

TEST(InferenceCodecTest, ResponsesHoldWhatTheyAreGivenUntilTheyAreGone) {
  auto hold = std::make_shared<int>(1);
  {
    const grpc::ByteBuffer response = EncodeInferenceResponse("alpha", {}, SomePrediction(), hold);
    const grpc::ByteBuffer streamed = EncodeStreamResponse(response);
    EXPECT_GT(hold.use_count(), 1);
  }
  EXPECT_EQ(hold.use_count(), 1);
}

}  // namespace
}  // namespace codistill
