#include "control/json_output.h"

#include "google/protobuf/util/json_util.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "proto/run_summary.pb.h"

namespace codistill {
namespace {

TEST(JsonOutputTest, PrintsZerosAndNumbersByProtoName) {
  RunSummary summary;
  summary.set_job("a \"job\"");
  GroupSummary* group = summary.add_groups();
  group->set_name("alpha");
  group->set_steps(3000000000);
  group->mutable_final()->set_validation_accuracy(0.5);
  group->mutable_teacher();
  const auto json = nlohmann::json::parse(ToJson(summary));
  EXPECT_EQ(json["job"], "a \"job\"");
  EXPECT_EQ(json["wall_seconds"], 0);
  EXPECT_TRUE(json["groups"][0]["steps"].is_number_integer());
  EXPECT_EQ(json["groups"][0]["steps"], 3000000000);
  EXPECT_EQ(json["groups"][0]["examples_per_second"], 0);
  EXPECT_EQ(json["groups"][0]["push_bytes"], 0);
  EXPECT_EQ(json["groups"][0]["final"]["validation_loss"], 0);
  EXPECT_EQ(json["groups"][0]["final"]["validation_accuracy"], 0.5);
  EXPECT_FALSE(json["groups"][0]["final"].contains("validation_auc"));
  for (const char* name : {"requests", "failures", "skipped_steps", "first_step_used",
                           "max_staleness_steps", "mean_staleness_steps"}) {
    EXPECT_EQ(json["groups"][0]["teacher"][name], 0) << name;
  }
}

TEST(JsonOutputTest, ProtobufReadsItBack) {
  RunSummary summary;
  summary.set_group_disagreement(0.25);
  summary.add_groups()->set_push_bytes(1ull << 40);
  RunSummary back;
  ASSERT_TRUE(google::protobuf::util::JsonStringToMessage(ToJson(summary), &back).ok());
  EXPECT_EQ(back.SerializeAsString(), summary.SerializeAsString());
}

TEST(JsonOutputTest, OneLineAndNotANumber) {
  RunSummary summary;
  summary.set_wall_seconds(0.0 / 0.0);
  const std::string line = ToJson(summary, 0);
  EXPECT_EQ(line.find('\n'), std::string::npos);
  EXPECT_TRUE(nlohmann::json::parse(line)["wall_seconds"].is_null());
}

}  // namespace
}  // namespace codistill
