#include <string>
#include <utility>
#include <vector>

#include "common/config/job.h"
#include "common/config/test_jobs.h"
#include "gmock/gmock.h"
#include "google/protobuf/util/message_differencer.h"
#include "gtest/gtest.h"

// Overrides: FIELD.PATH=VALUE.
namespace codistill {
namespace {

using ::google::protobuf::util::MessageDifferencer;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(SetField, SetsEveryKindOfValue) {
  JobConfig job = Good();
  for (const char* assignment :
       {"name=new name = really", "seed=18446744073709551615", "model.label_smoothing=0.25",
        "training.rejoin_timeout_s=1e3", "codistillation.enabled=false",
        "training.optimizer.kind=ADAM", "groups[1].num_shards=4", "groups.num_workers=2",
        "groups[0].devices=cpu,cuda:1", "groups[0].devices[1]=cuda:3", "model.inputs.shape=3,32",
        "checkpoint.every_steps=5", " stop.steps =-1"}) {
    const absl::Status status = SetField(assignment, &job);
    EXPECT_TRUE(status.ok()) << status;
  }
  EXPECT_EQ(job.name(), "new name = really");
  EXPECT_EQ(job.seed(), 18446744073709551615u);
  EXPECT_EQ(job.model().label_smoothing(), 0.25f);
  EXPECT_EQ(job.training().rejoin_timeout_s(), 1000);
  EXPECT_FALSE(job.codistillation().enabled());
  EXPECT_EQ(job.training().optimizer().kind(), OptimizerConfig::ADAM);
  EXPECT_EQ(job.groups(0).num_shards(), 2);
  EXPECT_EQ(job.groups(1).num_shards(), 4);
  EXPECT_EQ(job.groups(0).num_workers(), 2);
  EXPECT_EQ(job.groups(1).num_workers(), 2);
  EXPECT_THAT(job.groups(0).devices(), ElementsAre("cpu", "cuda:3"));
  EXPECT_THAT(job.model().inputs(0).shape(), ElementsAre(3, 32));
  EXPECT_EQ(job.checkpoint().every_steps(), 5);
  EXPECT_EQ(job.stop().steps(), -1);
  EXPECT_TRUE(SetField("groups[0].devices=", &job).ok());
  EXPECT_EQ(job.groups(0).devices_size(), 0);
  // The other member of a oneof goes.
  EXPECT_TRUE(SetField("data.train.image.height=5", &job).ok());
  EXPECT_FALSE(job.data().train().has_synthetic());
}

TEST(SetField, SaysWhatIsWrongAndChangesNothing) {
  const JobConfig before = Good();
  for (const auto& [assignment, message] : std::vector<std::pair<std::string, std::string>>{
           {"stop.steps", "\"stop.steps\" has no \"=\"; field.path=value would be right"},
           {"=5", "\"=5\" names no field"},
           {"stop..steps=5", "\"stop..steps\": an empty name in the path"},
           {"stop.step=5", "stop.step: no field of this name; did you mean steps?"},
           {"learning_rate=5",
            "learning_rate: no field of this name here; there is a "
            "training.optimizer.learning_rate"},
           {"zzz=5", "zzz: no field of this name; there are name, seed"},
           {"stop=", "stop: is a message, not a value; set one of its fields: steps"},
           {"training.optimizer=ADAM",
            "training.optimizer: is a message, not a value; set one of its fields: kind, "},
           {"stop.steps.x=5", "stop.steps: is a value and has no field x"},
           {"stop.steps[0]=5", "stop.steps: takes one value, so an index ([0]) makes no sense"},
           {"groups[2].num_shards=5",
            "groups: index 2 does not exist; there are 2, counted from 0"},
           {"groups[-1].num_shards=5", "malformed index; NAME[0] would be right"},
           {"groups[0.num_shards=5", "malformed index"},
           {"model.states.name=h", "model.states: has no elements, so there is nothing to set"},
           {"stop.steps=", "stop.steps: wrong value (nothing); it must be a 64-bit integer"},
           {"stop.steps=1.5", "stop.steps: wrong value (1.5)"},
           {"stop.steps=99999999999999999999", "stop.steps: wrong value (99999999999999999999)"},
           {"training.held_cuts=3000000000", "it must be an integer from -2147483648 to"},
           {"codistillation.enabled=maybe", "wrong value (maybe); it must be true or false"},
           {"training.update_mode=sync",
            "it must be one of SYNC, ASYNC, BOUNDED_STALENESS; did "
            "you mean SYNC?"},
           {"groups.num_shards=x", "groups[0].num_shards: wrong value (x)"},
           {"model.inputs[0].shape=3,x", "model.inputs[0].shape: wrong value (x)"}}) {
    JobConfig job = before;
    const absl::Status status = SetField(assignment, &job);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << assignment;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
    EXPECT_TRUE(MessageDifferencer::Equals(job, before)) << assignment;
  }
}

}  // namespace
}  // namespace codistill
