#include "predserver/request_check.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

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
  EXPECT_EQ(plan->example_id, 0);
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
  EXPECT_EQ(Error(r),
            "output \"loss\": the model has none of that name; it gives logits, logits_scale, "
            "probabilities, topk_index, topk_value, tail_mass, h");
}

TEST(RequestCheckTest, OutputsFollowTheFormat) {
  Request r = Good();
  r.request.format.top_k = 5;
  auto plan = CheckRequest(Config(), r.Done());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_FALSE(plan->want_logits);
  EXPECT_TRUE(plan->want_top_k_index && plan->want_top_k_value && plan->want_tail_mass);
  EXPECT_THAT(plan->want_states, ElementsAre(true));

  r = Good();
  r.request.outputs = {"topk_value", "probabilities"};
  r.request.format = {DT_HALF, 2.5, 1};
  plan = CheckRequest(Config(), r.Done());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_TRUE(plan->want_probabilities && plan->want_top_k_value && plan->want_top_k());
  EXPECT_FALSE(plan->want_logits || plan->want_top_k_index || plan->want_tail_mass);

  r = Good();
  r.request.outputs = {"logits"};
  r.request.format.dtype = DT_INT8;
  plan = CheckRequest(Config(), r.Done());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_TRUE(plan->want_logits && plan->want_logits_scale);
}

TEST(RequestCheckTest, FormatsThatMakeNoSenseAreRefused) {
  Request r = Good();
  r.request.format.dtype = DT_DOUBLE;
  EXPECT_EQ(Error(r), "parameter format: \"FP64\"; it must be FP32, FP16, BF16 or INT8");
  for (const double temperature : {0.0, -1.0, 1e-7, 2e6, std::nan(""), 1.0 / 0.0}) {
    r = Good();
    r.request.outputs = {"probabilities"};
    r.request.format.temperature = temperature;
    EXPECT_THAT(Error(r), testing::HasSubstr("it must be between 1e-6 and 1e6"));
  }
  r = Good();
  r.request.format.temperature = 2;
  EXPECT_THAT(Error(r), testing::StartsWith("parameter temperature: is given, but neither"));
  r = Good();
  r.request.format.top_k = 6;
  EXPECT_EQ(Error(r), "parameter top_k: 6; it must be from 1 to the model's 5 outputs");
  r = Good();
  r.request.outputs = {"topk_index"};
  EXPECT_EQ(Error(r), "output topk_index, topk_value or tail_mass: needs the parameter top_k");
  r = Good();
  r.request.outputs = {"logits"};
  r.request.format.top_k = 2;
  EXPECT_THAT(Error(r), testing::StartsWith("parameter top_k: is given, but none of"));
  for (const char* output : {"probabilities", "topk_value"}) {
    r = Good();
    r.request.outputs = {output};
    r.request.format = {DT_INT8, 1, output[0] == 't' ? 2 : 0};
    EXPECT_THAT(Error(r), testing::StartsWith("parameter format: INT8 is for logits only"));
  }
  r = Good();
  r.request.outputs = {"logits", "logits_scale"};
  EXPECT_THAT(Error(r), testing::StartsWith("output logits_scale: comes with logits"));
  r = Good();
  r.request.sequence = true;
  EXPECT_THAT(Error(r), testing::StartsWith("parameter sequence_id: no state is kept here"));
}

TEST(RequestCheckTest, KindsOfModelsGiveWhatTheyHave) {
  ModelConfig config = Config();
  config.set_num_outputs(1);
  config.set_label_loss(SIGMOID_CROSS_ENTROPY);
  Request r = Good();
  r.request.outputs = {"probabilities"};
  EXPECT_TRUE(CheckRequest(config, r.Done()).ok());
  r.request.format.top_k = 1;
  r.request.outputs.clear();
  EXPECT_FALSE(CheckRequest(config, r.Done()).ok());
  config.set_label_loss(SQUARED_ERROR);
  r = Good();
  r.request.outputs = {"probabilities"};
  EXPECT_FALSE(CheckRequest(config, r.Done()).ok());
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

TEST(RequestCheckTest, ValuesMustBeFiniteAndFlagsFlags) {
  float values[] = {1, 2, std::numeric_limits<float>::quiet_NaN()};
  EXPECT_TRUE(CheckValues("x", DT_FLOAT, values, 8).ok());
  EXPECT_EQ(CheckValues("x", DT_FLOAT, values, 12),
            absl::InvalidArgumentError("input x: has a NaN or an infinity; values must be finite"));
  double doubles[] = {std::numeric_limits<double>::infinity()};
  EXPECT_FALSE(CheckValues("x", DT_DOUBLE, doubles, 8).ok());
  doubles[0] = 1e300;
  EXPECT_TRUE(CheckValues("x", DT_DOUBLE, doubles, 8).ok());
  uint8_t bools[] = {0, 1};
  EXPECT_TRUE(CheckValues("x", DT_BOOL, bools, 2).ok());
  bools[1] = 2;
  EXPECT_EQ(CheckValues("x", DT_BOOL, bools, 2),
            absl::InvalidArgumentError("input x: has a BOOL that is neither 0 nor 1"));
  EXPECT_TRUE(CheckValues("x", DT_UINT8, bools, 2).ok());
}

TEST(RequestCheckTest, HalvesMustBeFiniteToo) {
  // The largest finite number, an infinity, and a NaN, of either sign.
  for (const uint16_t sign : {0, 0x8000}) {
    for (const auto& [dtype, bits, ok] : {std::tuple<DataType, int, bool>{DT_HALF, 0x7bff, true},
                                          {DT_HALF, 0x7c00, false},
                                          {DT_HALF, 0x7c01, false},
                                          {DT_BFLOAT16, 0x7f7f, true},
                                          {DT_BFLOAT16, 0x7f80, false},
                                          {DT_BFLOAT16, 0x7f81, false}}) {
      const uint16_t values[] = {0, static_cast<uint16_t>(sign | bits)};
      EXPECT_EQ(CheckValues("x", dtype, values, 4).ok(), ok) << dtype << " " << bits;
    }
  }
}

TEST(RequestCheckTest, OutputsThatFitNoResponseOrPassAreRefused) {
  ModelConfig config;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString("inputs { name: 'x' } num_outputs: 100",
                                                            &config));
  PredictionRequest request;
  RequestPlan plan;
  const OutputLimits limits{/*response_bytes=*/4000, /*logits_bytes=*/20000};
  const auto most = [&](int64_t rows) {
    plan.batch = 0;
    do {
      ++plan.batch;
    } while (CheckOutputBytes(config, request, plan, rows, limits).ok());
    return plan.batch - 1;
  };
  EXPECT_EQ(most(1), 10);
  EXPECT_EQ(
      std::string(CheckOutputBytes(config, request, plan, 1, limits).message()),
      "input x: has 11 examples, with 400 bytes of outputs each; send fewer, or ask for top-k "
      "or a smaller format: a response has room for 10 (4000 bytes)");
  EXPECT_EQ(most(2), 5);
  EXPECT_EQ(most(11), 0);
  request.format.dtype = DT_HALF;
  EXPECT_EQ(most(1), 20);
  plan.want_probabilities = true;
  EXPECT_EQ(most(1), 10);
  request.format.dtype = DT_INT8;
  plan.want_probabilities = false;
  plan.want_logits_scale = true;
  EXPECT_EQ(most(1), 4000 / 104);
  // All logits are computed, however few are asked for.
  plan = RequestPlan();
  plan.want_logits = false;
  plan.want_top_k_index = true;
  request.format.top_k = 1;
  EXPECT_EQ(most(1), 50);
  EXPECT_EQ(most(5), 10);
  EXPECT_EQ(std::string(CheckOutputBytes(config, request, plan, 5, limits).message()),
            "input x: has 11 examples, with 2000 bytes of outputs each; send fewer: a forward pass "
            "has room for 10 (20000 bytes)");
  plan.batch = std::numeric_limits<int64_t>::max();
  EXPECT_FALSE(CheckOutputBytes(config, request, plan, 1, limits).ok());
}

}  // namespace
}  // namespace codistill
