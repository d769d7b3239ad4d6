#include "worker/inference_messages.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/rpc/frame.h"
#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "proto/open_inference.pb.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kRows = 2, kClasses = 5;

class InferenceMessagesTest : public ::testing::Test {
 protected:
  InferenceMessagesTest() {
    auto config = std::make_shared<ModelConfig>();
    config->set_num_outputs(kClasses);
    config->add_inputs()->set_name("x");
    auto batch = std::make_shared<TeacherBatch>();
    batch->inputs = {Tensor::Zeros(DT_FLOAT, {kRows, 1})};
    batch->examples = batch->rows = kRows;
    question_.config = std::move(config);
    question_.batch = std::move(batch);
    auto dialect = std::make_shared<TeacherDialect>();
    dialect->model = "alpha";
    question_.dialect = std::move(dialect);
  }

  inference::ModelInferRequest Asked() const {
    grpc::ByteBuffer buffer = EncodeQuestion(question_);
    DecodedPayload payload;
    inference::ModelInferRequest request;
    EXPECT_TRUE(DecodedPayload::Decode(&buffer, 7, &request, &payload).ok());
    return request;
  }

  template <typename T>
  void Add(const std::string& name, const std::string& datatype, const std::vector<int64_t>& shape,
           const std::vector<T>& values) {
    auto* output = response_.add_outputs();
    output->set_name(name);
    output->set_datatype(datatype);
    for (int64_t size : shape) output->add_shape(size);
    response_.add_raw_output_contents(values.data(), values.size() * sizeof(T));
  }

  absl::StatusOr<InferenceAnswer> Decode() {
    // In small slices, so that values lie across their borders.
    const std::string bytes = response_.SerializeAsString();
    std::vector<grpc::Slice> slices;
    for (size_t i = 0; i < bytes.size(); i += 7) {
      slices.emplace_back(bytes.data() + i, std::min<size_t>(7, bytes.size() - i));
    }
    grpc::ByteBuffer buffer(slices.data(), slices.size());
    return DecodeAnswer(&buffer, question_);
  }

  std::string Problem() {
    const absl::Status status = Decode().status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  }

  // A right answer of top-k 2.
  void AnswerTopK(const std::vector<int32_t>& index = {4, 0, 1, 2}) {
    question_.format.top_k = 2;
    response_.Clear();
    Add<int32_t>("topk_index", "INT32", {kRows, 2}, index);
    Add<float>("topk_value", "FP32", {kRows, 2}, {0.5f, 0.25f, 0.75f, 0.125f});
    Add<float>("tail_mass", "FP32", {kRows}, {0.25f, 0.125f});
  }

  InferenceQuestion question_;
  inference::ModelInferResponse response_;
};

std::vector<float> Values(const Tensor& tensor) {
  std::vector<float> values(tensor.elements());
  const auto* const narrow = static_cast<const uint16_t*>(tensor.data());
  if (tensor.dtype() == DT_HALF) {
    FromFloat16(narrow, values.size(), values.data());
  } else if (tensor.dtype() == DT_BFLOAT16) {
    FromBfloat16(narrow, values.size(), values.data());
  } else {
    values.assign(tensor.As<float>().begin(), tensor.As<float>().end());
  }
  return values;
}

TEST_F(InferenceMessagesTest, AsksForWhatTheJobSays) {
  EXPECT_EQ(Asked().parameters_size(), 0);
  CodistillationConfig config;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(
      "teacher_output: ALL_LOGITS teacher_dtype: DT_INT8 temperature: 2", &config));
  question_.format = AnswerFormatOf(config);
  inference::ModelInferRequest asked = Asked();
  EXPECT_EQ(asked.parameters_size(), 1);  // logits have no temperature
  EXPECT_EQ(asked.parameters().at("format").string_param(), "INT8");

  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(
      "teacher_output: TOP_K top_k: 3 teacher_dtype: DT_HALF temperature: 2", &config));
  question_.format = AnswerFormatOf(config);
  asked = Asked();
  EXPECT_EQ(asked.parameters().at("format").string_param(), "FP16");
  EXPECT_EQ(asked.parameters().at("top_k").int64_param(), 3);
  EXPECT_EQ(asked.parameters().at("temperature").double_param(), 2);
  EXPECT_EQ(asked.outputs_size(), 0);  // the server's choice: top-k, and states

  auto dialect = std::make_shared<TeacherDialect>(*question_.dialect);
  dialect->codistill_server = false;
  question_.dialect = dialect;
  EXPECT_EQ(Asked().parameters_size(), 0);  // not everybody knows these
}

TEST_F(InferenceMessagesTest, LogitsAreTakenAsTheyAreButForIntegers) {
  std::vector<float> logits;
  std::vector<uint16_t> halves, bfloats;
  std::vector<int8_t> integers;
  for (int i = 0; i < kRows * kClasses; ++i) {
    logits.push_back(0.75f * static_cast<float>(i) - 3);
    halves.push_back(ToFloat16(logits[i]));
    bfloats.push_back(ToBfloat16(logits[i]));
    integers.push_back(static_cast<int8_t>(3 * i - 12));
  }
  Add("logits", "FP32", {kRows, kClasses}, logits);
  EXPECT_EQ(Values(Decode()->logits), logits);

  response_.Clear();
  question_.format.dtype = DT_HALF;
  Add("logits", "FP16", {kRows, kClasses}, halves);
  EXPECT_EQ(Decode()->logits.dtype(), DT_HALF);
  EXPECT_EQ(Values(Decode()->logits), logits);  // all are halves

  response_.Clear();
  question_.format.dtype = DT_BFLOAT16;
  Add("logits", "BF16", {1, kRows, kClasses}, bfloats);
  EXPECT_EQ(Decode()->logits.dtype(), DT_BFLOAT16);
  const std::vector<float> widened = Values(Decode()->logits);
  for (size_t i = 0; i < logits.size(); ++i) EXPECT_EQ(widened[i], FromBfloat16(bfloats[i]));

  response_.Clear();
  question_.format.dtype = DT_INT8;
  Add<float>("logits_scale", "FP32", {kRows}, {0.5f, 0.25f});
  Add("logits", "INT8", {kRows, kClasses}, integers);
  const absl::StatusOr<InferenceAnswer> answer = Decode();
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_TRUE(answer->top_k.empty());
  EXPECT_THAT(answer->logits.shape(), ElementsAre(kRows, kClasses));
  for (int i = 0; i < kRows * kClasses; ++i) {
    EXPECT_EQ(Values(answer->logits)[i],
              static_cast<float>(integers[i]) * (i < kClasses ? 0.5f : 0.25f));
  }
}

TEST_F(InferenceMessagesTest, ManyHalvesComeInPortions) {
  auto config = std::make_shared<ModelConfig>(*question_.config);
  config->set_num_outputs(9001);
  question_.config = config;
  question_.format.dtype = DT_HALF;
  std::vector<uint16_t> halves;
  for (int i = 0; i < kRows * 9001; ++i) halves.push_back(static_cast<uint16_t>(i));
  Add("logits", "FP16", {kRows, 9001}, halves);
  const std::vector<float> values = Values(Decode()->logits);
  for (size_t i = 0; i < halves.size(); ++i) ASSERT_EQ(values[i], FromFloat16(halves[i])) << i;
}

TEST_F(InferenceMessagesTest, TopKIsTakenAsItIs) {
  AnswerTopK();
  absl::StatusOr<InferenceAnswer> answer = Decode();
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_TRUE(answer->logits.empty());
  EXPECT_THAT(answer->top_k.index.As<int32_t>(), ElementsAre(4, 0, 1, 2));
  EXPECT_THAT(Values(answer->top_k.value), ElementsAre(0.5f, 0.25f, 0.75f, 0.125f));
  EXPECT_THAT(Values(answer->top_k.tail), ElementsAre(0.25f, 0.125f));

  for (const DataType dtype : {DT_HALF, DT_BFLOAT16}) {
    question_.format.dtype = dtype;
    const auto narrow = dtype == DT_HALF ? static_cast<uint16_t (*)(float)>(ToFloat16)
                                         : static_cast<uint16_t (*)(float)>(ToBfloat16);
    response_.Clear();
    Add<uint16_t>("topk_value", std::string(DataTypeName(dtype)), {kRows, 2},
                  {narrow(0.5f), narrow(0.25f), narrow(0.75f), narrow(0.125f)});
    Add<float>("tail_mass", "FP32", {kRows}, {0.25f, 0.125f});
    Add<int32_t>("topk_index", "INT32", {kRows, 2}, {4, 0, 1, 2});
    answer = Decode();
    ASSERT_TRUE(answer.ok()) << answer.status();
    EXPECT_THAT(Values(answer->top_k.value), ElementsAre(0.5f, 0.25f, 0.75f, 0.125f));
  }
}

TEST_F(InferenceMessagesTest, TypedContentsAreTakenToo) {
  question_.format.top_k = 2;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(
      R"pb(
        outputs {
          name: "topk_index"
          datatype: "INT32"
          shape: [ 2, 2 ]
          contents { int_contents: [ 4, 0, 1, 2 ] }
        }
        outputs {
          name: "topk_value"
          datatype: "FP32"
          shape: [ 2, 2 ]
          contents { fp32_contents: [ 0.5, 0.25, 0.75, 0.125 ] }
        }
        outputs {
          name: "tail_mass"
          datatype: "FP32"
          shape: 2
          contents { fp32_contents: [ 0.25, 0.125 ] }
        })pb",
      &response_));
  const absl::StatusOr<InferenceAnswer> answer = Decode();
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_THAT(answer->top_k.index.As<int32_t>(), ElementsAre(4, 0, 1, 2));
  EXPECT_THAT(Values(answer->top_k.value), ElementsAre(0.5f, 0.25f, 0.75f, 0.125f));
  response_.mutable_outputs(0)->mutable_contents()->add_int_contents(3);
  EXPECT_THAT(Problem(), HasSubstr("\"topk_index\" has 20 bytes where its shape takes 16"));
}

TEST_F(InferenceMessagesTest, NamesTheLogitsThatAreNotWhatWasAskedFor) {
  const std::vector<float> logits(kRows * kClasses);
  Add("scores", "FP32", {kRows, kClasses}, logits);
  EXPECT_THAT(Problem(), HasSubstr("no output \"logits\"; it has [scores]"));
  response_.Clear();
  Add("logits", "FP32", {kRows, kClasses + 1}, logits);
  EXPECT_THAT(Problem(), HasSubstr("\"logits\" has the shape [2, 6]; [2, 5] is expected"));
  response_.Clear();
  Add("logits", "FP32", {kRows, kClasses}, std::vector<float>(9));
  EXPECT_THAT(Problem(), HasSubstr("\"logits\" has 36 bytes where its shape takes 40"));
  response_.clear_raw_output_contents();
  EXPECT_THAT(Problem(), HasSubstr("brings 0 raw contents; \"logits\" has none"));
  question_.format.dtype = DT_HALF;
  EXPECT_THAT(Problem(), HasSubstr("\"logits\" is FP32; FP16 is expected"));

  question_.format.dtype = DT_INT8;
  response_.Clear();
  Add("logits", "INT8", {kRows, kClasses}, std::vector<int8_t>(10));
  EXPECT_THAT(Problem(), HasSubstr("no output \"logits_scale\""));
  for (const float bad : {-1.0f, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    response_.Clear();
    Add("logits", "INT8", {kRows, kClasses}, std::vector<int8_t>(10));
    Add<float>("logits_scale", "FP32", {kRows}, {1, bad});
    EXPECT_THAT(Problem(), HasSubstr("in row 1, which is no scale"));
  }
}

TEST_F(InferenceMessagesTest, NamesTheTopKThatIsNotWhatWasAskedFor) {
  AnswerTopK();
  response_.mutable_outputs(0)->set_datatype("INT64");
  EXPECT_THAT(Problem(), HasSubstr("\"topk_index\" is INT64; INT32 is expected"));
  AnswerTopK();
  response_.mutable_outputs(1)->set_shape(1, 3);
  EXPECT_THAT(Problem(), HasSubstr("\"topk_value\" has the shape [2, 3]; [2, 2] is expected"));
  AnswerTopK();
  question_.format.top_k = 3;
  EXPECT_THAT(Problem(), HasSubstr("\"topk_index\" has the shape [2, 2]; [2, 3] is expected"));
  AnswerTopK();
  response_.mutable_outputs(2)->set_name("rest");
  EXPECT_THAT(Problem(), HasSubstr("no output \"tail_mass\""));
  AnswerTopK({4, 0, 1, 5});
  EXPECT_THAT(Problem(), HasSubstr("row 1 has the index 5; want 0 to 4"));
  AnswerTopK({4, -1, 1, 2});
  EXPECT_THAT(Problem(), HasSubstr("row 0 has the index -1"));
  AnswerTopK({4, 4, 1, 2});
  EXPECT_THAT(Problem(), HasSubstr("row 0 names class 4 twice"));
  AnswerTopK();
  (*response_.mutable_raw_output_contents(2))[3] ^= 0x80;  // the sign of the first tail
  EXPECT_THAT(Problem(), HasSubstr("row 0 has the tail mass -0.25"));
}

}  // namespace
}  // namespace codistill
