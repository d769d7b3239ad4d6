#include "common/config/text_proto.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "google/protobuf/util/message_differencer.h"
#include "gtest/gtest.h"
#include "proto/job.pb.h"

namespace codistill {
namespace {

using ::google::protobuf::TextFormat;
using ::google::protobuf::util::MessageDifferencer;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;

std::vector<std::string> Errors(const std::string& text, JobConfig* job) {
  std::vector<std::string> errors;
  for (const TextProtoError& error : ParseTextProto(text, job)) errors.push_back(error.ToString());
  return errors;
}

TEST(TextProto, ReadsWhatProtobufReads) {
  const std::string text = R"pb(
    # A comment, then every kind of value.
    name: "a"
          'b'
          "\"\x41\n"
    seed: 0x10,
    model { inputs {
      name: "x"
      dtype: DT_INT64
      shape: [ 3, 32, 010 ]
    }
            inputs: { name: "y" shape: 1 shape: 2 }
    ;
      label_smoothing: 1e-1
      states < shape: -1 >
    }
    groups [ { name: "alpha" }, { name: "beta" } ]
    training { optimizer { learning_rate: .5f epsilon: 3 } rejoin_timeout_s: inf }
    codistillation { enabled: false temperature: -2.5 }
  )pb";
  JobConfig ours, theirs;
  EXPECT_THAT(Errors(text, &ours), IsEmpty());
  ASSERT_TRUE(TextFormat::ParseFromString(text, &theirs));
  EXPECT_TRUE(MessageDifferencer::Equals(ours, theirs)) << ours.DebugString();
}

TEST(TextProto, ReadsBackWhatProtobufPrints) {
  JobConfig job;
  job.set_name("quotes \" and \xc3\xa9 \t");
  job.mutable_training()->mutable_optimizer()->set_learning_rate(0.1f);
  job.mutable_training()->set_rejoin_timeout_s(1.0 / 3);
  job.set_seed(18446744073709551615u);
  job.mutable_stop()->set_steps(-9223372036854775807 - 1);
  std::string text;
  ASSERT_TRUE(TextFormat::PrintToString(job, &text));
  JobConfig read;
  EXPECT_THAT(Errors(text, &read), IsEmpty());
  EXPECT_TRUE(MessageDifferencer::Equals(job, read)) << text;
}

TEST(TextProto, GoesOnAfterMistakes) {
  JobConfig job;
  const std::vector<std::string> errors = Errors(R"(name: alpha
training {
  batchsize: { a: [1, 2] b < > }
  optimizer { kind: ADAMM learning_rate: "0.1" }
  worker_threads: 99999999999
}
groups { nmae: "x" }
stop { steps: 7 }
seed 5
)",
                                                 &job);
  EXPECT_THAT(
      errors,
      ElementsAre(
          "1:7: name: wrong value (alpha); a string needs quotes: \"alpha\"",
          "3:3: training.batchsize: no field of this name; did you mean batch_size?",
          "4:21: training.optimizer.kind: wrong value (ADAMM); it must be one of SGD, MOMENTUM, "
          "ADAM, "
          "NESTEROV, ADAGRAD, ADAMW, LARS, FTRL; did you mean ADAM?",
          "4:42: training.optimizer.learning_rate: wrong value (\"0.1\"); only strings are quoted, "
          "and this is none",
          "5:19: training.worker_threads: wrong value (99999999999); it must be an integer from "
          "-2147483648 to 2147483647",
          "7:10: groups[0].nmae: no field of this name; did you mean name?",
          "9:6: seed: unexpected 5; a \":\" and a value must stand here"));
  EXPECT_EQ(job.stop().steps(), 7);  // what came after was read
  EXPECT_EQ(job.seed(), 5);
}

TEST(TextProto, PointsToTheFieldThatWasMeant) {
  JobConfig job;
  std::vector<TextProtoError> errors = ParseTextProto("groups { num_shard: 2 }", &job);
  ASSERT_EQ(errors.size(), 1u);
  EXPECT_EQ(errors[0].path, "groups[0].num_shard");
  EXPECT_EQ(errors[0].meant, "groups[0].num_shards");

  // A field that exists elsewhere, and a name that is like none.
  EXPECT_THAT(Errors("learning_rate: 1 zzz: 2", &job),
              ElementsAre(HasSubstr("there is a training.optimizer.learning_rate"),
                          HasSubstr("there are name, seed, run_id")));
}

TEST(TextProto, RefusesWhatIsGivenTwice) {
  JobConfig job;
  EXPECT_THAT(Errors("name: 'a'\nname: 'b'", &job),
              ElementsAre("2:1: name: given twice; once would be right"));
  EXPECT_THAT(Errors("data { train { synthetic {} csv {} } }", &job),
              ElementsAre(HasSubstr("data.train.csv: excludes synthetic")));
}

TEST(TextProto, NamesThePlaceOfABrokenStructure) {
  JobConfig job;
  struct Case {
    const char* text;
    const char* error;
  };
  for (const Case& c : {
           Case{"model {\n  num_outputs: 2\n", "3:1: model: the file ends inside this message"},
           Case{"model {\n}\n}", "3:1: unexpected \"}\""},
           Case{"model { num_outputs: }", "1:22: model.num_outputs: unexpected }; a value"},
           Case{"name: \"open\n", "1:12: String literals cannot cross line boundaries."},
           Case{"model 5", "1:7: model: unexpected 5; this field is a message"},
           Case{"groups { devices: [\"cpu\" \"x\", }", "1:31: groups[0].devices[1]: unexpected }"},
           Case{"stop { steps: [1] }", "1:15: stop.steps: a list, but the field takes one value"},
           Case{"seed:", "1:6: seed: unexpected the end of the file; a value must stand here"},
           Case{"nosuch {", "the file ends inside this field"},
           Case{"@", "1:1: "},
       }) {
    const std::vector<std::string> errors = Errors(c.text, &job);
    ASSERT_THAT(errors, Not(IsEmpty())) << c.text;
    bool found = false;
    for (const std::string& error : errors) found = found || error.find(c.error) != error.npos;
    EXPECT_TRUE(found) << c.text << "\n" << testing::PrintToString(errors);
  }
}

TEST(TextProto, EndsOnHostileInput) {
  JobConfig job;
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += "x{";
  EXPECT_THAT(Errors(deep, &job), Not(IsEmpty()));
  std::string many;
  for (int i = 0; i < 10000; ++i) many += "zzzz: 1\n";
  EXPECT_EQ(ParseTextProto(many, &job).size(), 100u);
  EXPECT_THAT(Errors(std::string(1000, '\0'), &job), Not(IsEmpty()));
  const std::string good = "groups { name: 'a' devices: ['cpu'] shards { address: 'h:1' } }";
  for (size_t n = 0; n < good.size(); ++n) ParseTextProto(good.substr(0, n), &job);
}

}  // namespace
}  // namespace codistill
