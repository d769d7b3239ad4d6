#include "worker/external_answer.h"

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/teacher_client_fixture.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::FloatNear;
using ::testing::HasSubstr;
using ::testing::Pointwise;

TEST(LogitsOfProbabilitiesTest, SoftmaxAtAnyTemperatureIsThatOfTheTeachersOwnLogits) {
  const std::vector<double> logits = {2.5, -1, 0.25, -7};
  const auto softmax = [](const std::vector<double>& x, double temperature) {
    std::vector<double> p;
    double sum = 0;
    for (const double v : x) sum += std::exp(v / temperature);
    for (const double v : x) p.push_back(std::exp(v / temperature) / sum);
    return p;
  };
  std::vector<float> values;
  for (const double p : softmax(logits, 1)) values.push_back(static_cast<float>(p));
  ASSERT_TRUE(LogitsOfProbabilities(SOFTMAX_CROSS_ENTROPY, absl::MakeSpan(values)).ok());
  const std::vector<double> from(values.begin(), values.end());
  for (const double temperature : {0.5, 1.0, 4.0}) {
    const std::vector<double> expected = softmax(logits, temperature);
    const std::vector<double> got = softmax(from, temperature);
    for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], expected[i], 1e-6);
  }
}

TEST(LogitsOfProbabilitiesTest, ZeroHasAFloorAndOneOutputIsALogit) {
  std::vector<float> values = {0, 1};
  ASSERT_TRUE(LogitsOfProbabilities(SOFTMAX_CROSS_ENTROPY, absl::MakeSpan(values)).ok());
  EXPECT_NEAR(values[0], std::log(1e-10), 1e-4);
  EXPECT_EQ(values[1], 0);
  values = {0, 0.5, 0.75, 1};
  ASSERT_TRUE(LogitsOfProbabilities(SIGMOID_CROSS_ENTROPY, absl::MakeSpan(values)).ok());
  EXPECT_NEAR(values[0], std::log(1e-10), 1e-4);
  EXPECT_EQ(values[1], 0);
  EXPECT_NEAR(values[2], std::log(3), 1e-6);
  EXPECT_NEAR(values[3], -std::log(1e-10), 1e-4);
}

TEST(LogitsOfProbabilitiesTest, NamesWhatIsNone) {
  for (const float bad : {-0.1f, 2.0f, std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> values = {0.5, bad};
    EXPECT_THAT(LogitsOfProbabilities(SOFTMAX_CROSS_ENTROPY, absl::MakeSpan(values)).ToString(),
                HasSubstr("value 1 is"));
  }
}

// A teacher at somebody else's server, which calls things as it likes.
class ExternalTeacherTest : public TeacherClientTest {
 protected:
  std::unique_ptr<ScriptedInferenceServer> AddExternal(ScriptedInferenceServer::Answer answer) {
    auto server = AddTeacher("theirs", std::move(answer));
    TeacherDialect& dialect = options_.teachers.back().dialect;
    dialect.model = "resnet152";
    dialect.inputs = {"INPUT__0"};
    dialect.output = "OUTPUT__0";
    dialect.codistill_server = false;
    return server;
  }
  TeacherDialect& dialect() { return options_.teachers.back().dialect; }
};

TEST_F(ExternalTeacherTest, AsksByItsNamesAndNothingElse) {
  inference::ModelInferRequest seen;
  auto server = AddExternal(
      [&](const inference::ModelInferRequest& request, inference::ModelInferResponse* response) {
        seen = request;
        AddFp32Output("something_else", {1}, {7}, response);
        AddFp32Output("OUTPUT__0", {kRows, kOutputs}, {1, 2, 3, 4, 5, 6}, response);
        // Whatever it means there.
        SetVersion(3, 10, 1000, response);
        return absl::OkStatus();
      });
  dialect().version = "3.10";
  auto client = Create();
  const auto predictions = client->Take(Batch(5, 0.5));
  ASSERT_TRUE(predictions.ok()) << predictions.status();
  ASSERT_EQ(predictions->logits.size(), 1u) << client->counters().last_error;
  EXPECT_THAT(Values(predictions->logits[0]), ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_EQ(predictions->staleness_steps, 0) << "it is no server of ours";
  EXPECT_EQ(seen.model_name(), "resnet152");
  EXPECT_EQ(seen.model_version(), "3.10");
  EXPECT_TRUE(seen.parameters().empty());
  ASSERT_EQ(seen.inputs_size(), 1) << "example_id is ours";
  EXPECT_EQ(seen.inputs(0).name(), "INPUT__0");
  EXPECT_THAT(Fp32Input(seen, "INPUT__0"), ElementsAre(0.5f, 0.5f));
  ASSERT_EQ(seen.outputs_size(), 1);
  EXPECT_EQ(seen.outputs(0).name(), "OUTPUT__0");
}

TEST_F(ExternalTeacherTest, TypedContents) {
  auto server =
      AddExternal([](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        auto* output = response->add_outputs();
        output->set_name("OUTPUT__0");
        output->set_datatype("FP32");
        output->add_shape(kRows);
        output->add_shape(kOutputs);
        for (int i = 0; i < 6; ++i) output->mutable_contents()->add_fp32_contents(i);
        return absl::OkStatus();
      });
  EXPECT_THAT(Values(Create()->Take(Batch(1))->logits.at(0)), ElementsAre(0, 1, 2, 3, 4, 5));
}

TEST_F(ExternalTeacherTest, HalfPrecisionProbabilities) {
  auto server =
      AddExternal([](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        auto* output = response->add_outputs();
        output->set_name("OUTPUT__0");
        output->set_datatype("FP16");
        output->add_shape(kRows);
        output->add_shape(kOutputs);
        // 0.5, 0.25, 0.25; 1, 0, 0.
        const uint16_t halves[] = {0x3800, 0x3400, 0x3400, 0x3c00, 0, 0};
        response->add_raw_output_contents(halves, sizeof(halves));
        return absl::OkStatus();
      });
  dialect().probabilities = true;
  const std::vector<float> expected = {std::log(0.5f),   std::log(0.25f), std::log(0.25f), 0,
                                       std::log(1e-10f), std::log(1e-10f)};
  EXPECT_THAT(Values(Create()->Take(Batch(1))->logits.at(0)), Pointwise(FloatNear(1e-5), expected));
}

TEST_F(ExternalTeacherTest, ServersOfOursKeepTheirStaleness) {
  inference::ModelInferRequest seen;
  auto server = AddExternal(
      [&](const inference::ModelInferRequest& request, inference::ModelInferResponse* response) {
        seen = request;
        AddFp32Output("OUTPUT__0", {kRows, kOutputs}, std::vector<float>(6, 1), response);
        SetVersion(3, 40, 47, response);
        return absl::OkStatus();
      });
  dialect().codistill_server = true;
  auto client = Create();
  EXPECT_EQ(client->Take(Batch(1))->staleness_steps, 7);
  EXPECT_EQ(seen.inputs_size(), 2);
  EXPECT_EQ(seen.parameters().at("max_staleness_steps").int64_param(), 10);
}

struct Mismatch {
  std::string name;
  std::function<void(inference::ModelInferResponse*)> answer;
  std::string message;
};

class MismatchTest : public ExternalTeacherTest, public ::testing::WithParamInterface<Mismatch> {};

TEST_P(MismatchTest, IsNamed) {
  auto server =
      AddExternal([](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        AddFp32Output("OUTPUT__0", {kRows, kOutputs}, std::vector<float>(6, 0.25), response);
        GetParam().answer(response);
        return absl::OkStatus();
      });
  dialect().version = "3";
  dialect().probabilities = true;
  auto client = Create();
  client->Request(Batch(1));
  ASSERT_TRUE(Eventually([&] { return client->counters().failures > 0; }));
  EXPECT_THAT(client->counters().last_error, HasSubstr(GetParam().message));
  EXPECT_THAT(client->counters().last_error, HasSubstr("teacher theirs at " + server->address()));
}

INSTANTIATE_TEST_SUITE_P(
    All, MismatchTest,
    ::testing::Values(
        Mismatch{"Model", [](inference::ModelInferResponse* r) { r->set_model_name("other"); },
                 "answered by model \"other\"; \"resnet152\" was asked"},
        Mismatch{"Version", [](inference::ModelInferResponse* r) { r->set_model_version("4"); },
                 "answered with version \"4\"; \"3\" was asked for"},
        Mismatch{"Output",
                 [](inference::ModelInferResponse* r) { r->mutable_outputs(0)->set_name("probs"); },
                 "no output \"OUTPUT__0\"; it has [probs]"},
        Mismatch{"Shape",
                 [](inference::ModelInferResponse* r) { r->mutable_outputs(0)->set_shape(1, 2); },
                 "has the shape [2, 2]; [2, 3] is expected"},
        Mismatch{
            "Type",
            [](inference::ModelInferResponse* r) { r->mutable_outputs(0)->set_datatype("INT32"); },
            "is INT32; FP32 or FP16 is expected"},
        Mismatch{
            "Length",
            [](inference::ModelInferResponse* r) { r->mutable_outputs(0)->set_datatype("FP16"); },
            "has 24 bytes where its shape takes 12"},
        Mismatch{"Value",
                 [](inference::ModelInferResponse* r) {
                   const float values[] = {0, 0, 0, 0, 7, 0};
                   r->set_raw_output_contents(0, values, sizeof(values));
                 },
                 "output \"OUTPUT__0\": value 4 is 7, which is no probability"}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace codistill
