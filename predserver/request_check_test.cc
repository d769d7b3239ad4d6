#include "predserver/request_check.h"

#include <cstring>
#include <limits>

#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::ElementsAre;

ModelConfig Config() {
  ModelConfig config;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
      "inputs { name: 'x' shape: 3 } inputs { name: 'id' dtype: DT_INT64 }"
      "states { name: 'h' shape: [2, -1, 4] } num_outputs: 5",
      &config));
  return config;
}

// A request whose bytes live in the test.
struct Request {
  std::vector<std::string> bytes;
  PredictionRequest request;

  PredictionRequest::Input* Add(const std::string& name, const std::string& datatype,
                                std::vector<int64_t> shape, size_t size) {
    bytes.emplace_back(size, '\0');
    PredictionRequest::Input& input = request.inputs.emplace_back();
    input.name = name;
    input.datatype = datatype;
    input.shape = std::move(shape);
    return &input;
  }
  const PredictionRequest& Done() {
    for (size_t i = 0; i < bytes.size(); ++i) {
      request.inputs[i].parts = {
          {reinterpret_cast<const uint8_t*>(bytes[i].data()), bytes[i].size()}};
    }
    return request;
  }
};

Request Good() {
  Request r;
  r.Add("x", "FP32", {2, 3}, 24);
  r.Add("id", "INT64", {2}, 16);
  return r;
}

std::string Error(Request r) {
  const auto plan = CheckRequest(Config(), r.Done());
  EXPECT_TRUE(absl::IsInvalidArgument(plan.status())) << plan.status();
  return std::string(plan.status().message());
}

TEST(RequestCheckTest, FindsInputsInAnyOrder) {
  Request r;
  r.Add("example_id", "INT64", {2}, 16);
  r.Add("h", "FP32", {2, 2, 4}, 64);
  r.Add("id", "INT64", {2}, 16);
  r.Add("x", "FP32", {2, 3}, 24);
  const auto plan = CheckRequest(Config(), r.Done());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->batch, 2);
  EXPECT_THAT(plan->inputs, ElementsAre(3, 2));
  EXPECT_THAT(plan->states, ElementsAre(1));
  EXPECT_TRUE(plan->want_logits);
  EXPECT_THAT(plan->want_states, ElementsAre(true));
}

TEST(RequestCheckTest, StatesMayBeAbsent) {
  Request r = Good();
  const auto plan = CheckRequest(Config(), r.Done());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->states, ElementsAre(-1));
}

TEST(RequestCheckTest, OutputsMayBeChosen) {
  Request r = Good();
  r.request.outputs = {"h"};
  const auto plan = CheckRequest(Config(), r.Done());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_FALSE(plan->want_logits);
  EXPECT_THAT(plan->want_states, ElementsAre(true));
  r.request.outputs = {"logits"};
  EXPECT_THAT(CheckRequest(Config(), r.Done())->want_states, ElementsAre(false));
  r.request.outputs = {"loss"};
  EXPECT_EQ(Error(r), "output \"loss\": the model has none of that name; it gives logits, h");
}

TEST(RequestCheckTest, NamesWhatIsWrong) {
  Request r = Good();
  r.request.inputs[0].name = "y";
  EXPECT_EQ(Error(r), "input \"y\": the model has none of that name; it takes x, id, h");
  r = Good();
  r.request.inputs.pop_back();
  r.bytes.pop_back();
  EXPECT_EQ(Error(r), "input id: is missing; the model takes x, id, h");
  r = Good();
  r.Add("x", "FP32", {2, 3}, 24);
  EXPECT_EQ(Error(r), "input x: is given twice");
  r = Good();
  r.request.inputs[0].datatype = "FP64";
  EXPECT_EQ(Error(r), "input x: datatype is \"FP64\"; it must be \"FP32\"");
  r = Good();
  r.request.inputs[0].shape = {2, 4};
  EXPECT_EQ(Error(r), "input x: shape is [2, 4]; it must be [B, 3] with B >= 1");
  r = Good();
  r.request.inputs[0].shape = {0, 3};
  EXPECT_EQ(Error(r), "input x: shape is [0, 3]; it must be [B, 3] with B >= 1");
  r = Good();
  r.request.inputs[0].shape = {-1, 3};
  EXPECT_EQ(Error(r), "input x: shape is [-1, 3]; it must be [B, 3] with B >= 1");
  r = Good();
  r.request.inputs[0].shape = {3};
  EXPECT_EQ(Error(r), "input x: shape is [3]; it must be [B, 3] with B >= 1");
  r = Good();
  r.request.inputs[1].shape = {3};
  EXPECT_EQ(Error(r), "input id: has 3 examples where the first input has 2");
  r = Good();
  r.bytes[0].pop_back();
  EXPECT_EQ(Error(r), "input x: contents are 23 bytes; shape [2, 3] of FP32 takes 24");
  r = Good();
  r.Add("h", "FP32", {2, 3, 4}, 96);
  EXPECT_EQ(Error(r), "input h: has 3 examples where the first input has 2");
  r = Good();
  r.Add("h", "FP32", {1, 2, 4}, 32);
  EXPECT_EQ(Error(r), "input h: shape is [1, 2, 4]; it must be [2, B, 4] with B >= 1");
  r = Good();
  r.Add("example_id", "INT32", {2}, 8);
  EXPECT_EQ(Error(r), "input example_id: datatype is \"INT32\"; it must be \"INT64\"");
}

TEST(RequestCheckTest, HugeShapesAreRefusedWithoutAllocating) {
  Request r = Good();
  r.request.inputs[0].shape = {int64_t{1} << 62, 3};
  EXPECT_EQ(
      Error(r),
      "input x: contents are 24 bytes; shape [4611686018427387904, 3] of FP32 takes more than "
      "there can be");
  // So large that the number of bytes alone would wrap around to what came.
  r.request.inputs[0].shape = {(int64_t{1} << 61) / 3 + 1, 3};
  EXPECT_NE(Error(r), "");
}

TEST(RequestCheckTest, ReadInputPutsPartsTogether) {
  const float values[] = {1, 2, 3, 4};
  const auto* bytes = reinterpret_cast<const uint8_t*>(values);
  PredictionRequest::Input input{"x", "FP32", {4}, {{bytes, 3}, {bytes + 3, 0}, {bytes + 3, 13}}};
  const auto tensor = ReadInput(input);
  ASSERT_TRUE(tensor.ok()) << tensor.status();
  EXPECT_THAT(tensor->As<float>(), ElementsAre(1, 2, 3, 4));
}

TEST(RequestCheckTest, ReadInputRefusesWhatIsNotFinite) {
  float values[] = {1, 2, std::numeric_limits<float>::quiet_NaN()};
  const PredictionRequest::Input input{
      "x", "FP32", {3}, {{reinterpret_cast<const uint8_t*>(values), sizeof(values)}}};
  EXPECT_EQ(ReadInput(input).status(),
            absl::InvalidArgumentError("input x: has a NaN or an infinity; values must be finite"));
  double doubles[] = {std::numeric_limits<double>::infinity()};
  EXPECT_FALSE(
      ReadInput({"x", "FP64", {1}, {{reinterpret_cast<const uint8_t*>(doubles), 8}}}).ok());
  doubles[0] = 1e300;
  EXPECT_TRUE(ReadInput({"x", "FP64", {1}, {{reinterpret_cast<const uint8_t*>(doubles), 8}}}).ok());
}

}  // namespace
}  // namespace codistill
