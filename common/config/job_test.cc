#include "common/config/job.h"

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/file.h"
#include "gmock/gmock.h"
#include "google/protobuf/util/message_differencer.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::google::protobuf::util::MessageDifferencer;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kGood[] = R"pb(
  name: "job"
  model {
    export {
      module: "mlp"
      options { key: "in_features" value: "32" }
    }
    inputs { name: "x" shape: 32 }
    num_outputs: 20
  }
  data {
    train { synthetic { hidden: 64 } }
    validation { synthetic { hidden: 64 stream: 1 } }
  }
  groups { name: "alpha" num_shards: 2 }
  groups { name: "beta" num_shards: 2 }
  training { batch_size: 32 publish_every_steps: 10 }
  codistillation { burn_in_steps: 30 }
  evaluation { every_steps: 20 }
  stop { steps: 100 }
)pb";

constexpr char kCsv[] = R"pb(
  name: "csv"
  model {
    export { module: "ctr" }
    inputs { name: "numeric" shape: 2 }
    inputs { name: "categorical" dtype: DT_INT64 shape: 1 }
    num_outputs: 1
    label_loss: SIGMOID_CROSS_ENTROPY
  }
  data {
    train {
      csv {
        files: "train.csv"
        columns { name: "age" kind: NUMERIC }
        columns { name: "work" kind: CATEGORICAL }
        columns { name: "id" }
        columns { name: "gain" kind: NUMERIC log1p: true }
        columns {
          name: "income"
          kind: LABEL
          label_values { text: "<=50K" }
          label_values { text: ">50K" text: ">50K." }
        }
      }
    }
    validation {
      csv {
        files: "test.csv"
        fit_files: "train.csv"
        columns { name: "age" kind: NUMERIC }
        columns { name: "work" kind: CATEGORICAL }
        columns { name: "id" }
        columns { name: "gain" kind: NUMERIC log1p: true }
        columns {
          name: "income"
          kind: LABEL
          label_values { text: "<=50K" }
          label_values { text: ">50K" text: ">50K." }
        }
      }
    }
  }
  groups { name: "only" }
  training { batch_size: 32 }
  stop { steps: 100 }
)pb";

constexpr char kText[] = R"pb(
  name: "text"
  model {
    export { module: "lstm_lm" }
    inputs { name: "tokens" dtype: DT_INT64 shape: 32 }
    states { name: "h" shape: 1 shape: -1 shape: 8 }
    num_outputs: 100
  }
  data {
    train { text { files: "a.txt" } }
    validation { text { files: "b.txt" vocabulary_files: "a.txt" } }
  }
  groups { name: "only" }
  training { batch_size: 8 }
  stop { steps: 10 }
)pb";

constexpr char kImage[] = R"pb(
  name: "image"
  model {
    export { module: "resnet" }
    inputs { name: "image" shape: 3 shape: 32 shape: 32 }
    num_outputs: 10
  }
  data {
    train { image { files: "train.tar" random_flip: true random_crop_padding: 4 } }
    validation { image { files: "test.tar" } }
  }
  groups { name: "only" }
  training { batch_size: 8 }
  stop { steps: 10 }
)pb";

std::string WriteJob(const std::string& text) {
  const std::string path = JoinPath(std::getenv("TEST_TMPDIR"), "job.textproto");
  EXPECT_TRUE(WriteFileAtomically(path, text).ok());
  return path;
}

JobConfig Good(const std::string& text = kGood) {
  auto job = LoadJob(WriteJob(text));
  EXPECT_TRUE(job.ok()) << job.status();
  return job.ok() ? *std::move(job) : JobConfig();
}

// The messages about `text` with `overrides`, without the heading.
std::vector<std::string> Mistakes(const std::string& text,
                                  const std::vector<std::string>& overrides = {}) {
  const auto job = LoadJob(WriteJob(text), overrides);
  if (job.ok()) return {};
  std::vector<std::string> lines = absl::StrSplit(job.status().message(), '\n');
  EXPECT_THAT(lines[0], HasSubstr("job.textproto:"));
  lines.erase(lines.begin());
  return lines;
}

TEST(LoadJob, AcceptsGoodJobs) {
  for (const char* text : {kGood, kCsv, kText, kImage}) EXPECT_THAT(Mistakes(text), IsEmpty());
  const JobConfig job = Good();
  EXPECT_EQ(job.groups(1).name(), "beta");
  EXPECT_EQ(job.codistillation().prefetch(), 2);
  EXPECT_TRUE(ValidateJob(job).ok());
}

TEST(LoadJob, NamesAMissingFile) {
  const absl::Status status = LoadJob("/nonexistent/job.textproto").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nonexistent/job.textproto"));
}

TEST(LoadJob, FiveMistakesGiveFiveMessages) {
  EXPECT_THAT(
      Mistakes(R"pb(
        name: "job"
        model {
          export { module: "mlp" }
          inputs { name: "x" shape: 31 }
          num_outputs: 20
        }
        data {
          train { synthetic {} }
          validation { synthetic { stream: 1 } }
        }
        groups { name: "alpha" }
        groups { name: "alpha" }
        training {
          batch_size: 0
          optimizer { kind: ADAMM }
        }
        codistillation { burn_in: 5 }
        stop { steps: 100 }
      )pb"),
      ElementsAre(HasSubstr("training.optimizer.kind: wrong value (ADAMM)"),
                  HasSubstr("codistillation.burn_in: no field of this name"),
                  "model.inputs[0].shape: not that of the field ([31]); [32] would be right",
                  "groups[1].name: used twice (alpha); unique names would be right",
                  "training.batch_size: too small (0); at least 1 would be right"));
}

TEST(LoadJob, SaysNothingTwice) {
  // A misspelt required field is not missing as well, nor is one whose value was not understood.
  std::string text = kGood;
  text.replace(text.find("batch_size: 32"), 14, "batchsize: 32");
  text.replace(text.find("steps: 100"), 10, "steps: many");
  text.replace(text.find("num_outputs"), 11, "num_output");
  EXPECT_THAT(Mistakes(text), ElementsAre(HasSubstr("model.num_output: no field"),
                                          HasSubstr("training.batchsize: no field"),
                                          HasSubstr("stop.steps: wrong value (many)")));
}

TEST(LoadJob, ReportsNothingMissingFromHalfAFile) {
  EXPECT_THAT(Mistakes("name: 'job'\nmodel {\n  num_outputs: 2\n"),
              ElementsAre(HasSubstr("4:1: model: the file ends inside this message")));
}

TEST(LoadJob, AppliesOverridesBeforeValidation) {
  const auto job = LoadJob(
      WriteJob(kGood), {"stop.steps=50", "groups.num_workers=3", "training.optimizer.kind=ADAM"});
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->stop().steps(), 50);
  EXPECT_EQ(job->groups(1).num_workers(), 3);
  EXPECT_THAT(
      Mistakes(kGood, {"stop.steps=20", "nosuch=1", "seed=x"}),
      ElementsAre(HasSubstr("override nosuch=1: nosuch: no field"),
                  "override seed=x: seed: wrong value (x); it must be a 64-bit integer, not "
                  "negative",
                  HasSubstr("codistillation.burn_in_steps: no step would use a teacher (30)"
                            "; fewer than the 20 of stop.steps")));
}

// One rule a line: a good job, one override that breaks it, the one message that must follow.
struct Rule {
  const char* text;
  std::vector<std::string> overrides;
  const char* message;
};

class Rules : public testing::TestWithParam<Rule> {};

TEST_P(Rules, AreEnforced) {
  EXPECT_THAT(Mistakes(GetParam().text, GetParam().overrides),
              ElementsAre(testing::StartsWith(GetParam().message)));
}

INSTANTIATE_TEST_SUITE_P(
    Job, Rules,
    testing::ValuesIn(std::vector<Rule>{
        {kGood, {"name="}, "name: missing; a name of letters"},
        {kGood, {"name=a/b"}, "name: unsafe name (a/b); letters"},
        {kGood, {"name=.."}, "name: unsafe name (..); letters"},
        {kGood, {"run_id="}, "run_id: missing"},
        {kGood, {"model.archive_dir=x"}, "model: both export and archive_dir given; exactly one"},
        {kGood, {"model.export.module="}, "model.export.module: missing; mlp, ctr"},
        {kGood, {"model.export.options[0].key="}, "model.export.options[0].key: missing"},
        {kGood,
         {"model.inputs[0].name=tokens"},
         "model.inputs[0].name: no field of data.train (tokens); x would be right"},
        {kGood,
         {"model.inputs[0].dtype=DT_INT64"},
         "model.inputs[0].dtype: not that of the field (DT_INT64); DT_FLOAT would be right"},
        {kGood,
         {"model.inputs[0].shape="},
         "model.inputs[0].shape: not that of the field ([]); [32] would be right"},
        {kGood,
         {"model.num_outputs=19"},
         "model.num_outputs: not the number of classes (19); the "
         "20 of data.train would be right"},
        {kImage,
         {"model.num_outputs=1"},
         "model.num_outputs: does not fit label_loss SOFTMAX_CROSS_ENTROPY (1); at least 2"},
        {kCsv,
         {"model.num_outputs=2"},
         "model.num_outputs: does not fit label_loss SIGMOID_CROSS_ENTROPY (2); 1 would"},
        {kGood, {"model.label_smoothing=1"}, "model.label_smoothing: out of range (1); at least 0"},
        {kCsv,
         {"model.label_smoothing=0.1"},
         "model.label_smoothing: not possible with label_loss"},
        {kText, {"model.states[0].shape=1,8"}, "model.states[0].shape: wrong shape; positive"},
        {kText, {"model.states[0].name=tokens"}, "model.states[0].name: used twice (tokens)"},
        {kGood,
         {"data.train.synthetic.inputs=0", "model.inputs[0].shape=0"},
         "data.train.synthetic.inputs: too small (0)"},
        {kGood,
         {"data.train.synthetic.examples=999999999999"},
         "data.train.synthetic.examples: too many to hold in memory (999999999999); at most "},
        {kGood,
         {"data.train.synthetic.label_noise=nan"},
         "data.train.synthetic.label_noise: out of range (nan); 0 to 1"},
        {kGood,
         {"data.train.synthetic.seed=7"},
         "data.validation.synthetic.seed: differs from data.train.synthetic.seed; the same"},
        {kGood,
         {"data.train.synthetic.hidden=64,64"},
         "data.validation.synthetic.hidden: differs from"},
        {kCsv, {"data.train.csv.files="}, "data.train.csv.files: missing; one file or more"},
        {kCsv,
         {"data.validation.csv.fit_files="},
         "data.validation.csv.fit_files: not what the training set is fitted on (none); train.csv "
         "would be right"},
        {kCsv,
         {"data.validation.csv.columns[0].log1p=true"},
         "data.validation.csv.columns: differs from data.train.csv.columns"},
        {kCsv, {"data.validation.csv.skip_lines=1"}, "data.validation.csv.skip_lines: differs"},
        {kCsv,
         {"data.train.csv.columns[1].cardinality=1",
          "data.validation.csv.columns[1].cardinality=100", "evaluator.enabled=false"},
         "data.train.csv.columns[1].cardinality: leaves no index"},
        {kText, {"data.train.text.files="}, "data.train.text.files: missing"},
        {kText,
         {"data.validation.text.vocabulary_files=c.txt"},
         "data.validation.text.vocabulary_files: not what the training set is fitted on (c.txt); "
         "a.txt would be right"},
        {kText, {"data.validation.text.unroll=16"}, "data.validation.text.unroll: differs"},
        {kText,
         {"data.train.text.unknown=a b", "data.validation.text.unknown=<unk>"},
         "data.train.text.unknown: no word (\"a b\"); text without blanks"},
        {kImage,
         {"data.validation.image.random_flip=true"},
         "data.validation.image.random_flip: only possible in data.train (true)"},
        {kImage,
         {"data.validation.image.random_crop_padding=1"},
         "data.validation.image.random_crop_padding: only possible in data.train (1)"},
        {kImage,
         {"data.train.image.random_crop_padding=33"},
         "data.train.image.random_crop_padding: out of range (33); 0 to 32"},
        {kImage, {"data.validation.image.height=64"}, "data.validation.image.height: differs"},
        {kGood, {"groups[1].name=alpha"}, "groups[1].name: used twice (alpha)"},
        {kGood, {"groups[0].name=a b"}, "groups[0].name: unsafe name (a b)"},
        {kGood, {"groups[0].num_shards=0"}, "groups[0].num_shards: out of range (0); 1 to"},
        {kGood, {"groups[0].num_workers=-1"}, "groups[0].num_workers: out of range (-1); 1 to"},
        {kGood,
         {"groups[1].num_prediction_servers=0"},
         "groups[1].num_prediction_servers: out of range (0); 1 to"},
        {kGood, {"groups[0].devices=gpu"}, "groups[0].devices[0]: unknown device (gpu); cpu or"},
        {kGood, {"groups[0].devices=cuda:-1"}, "groups[0].devices[0]: unknown device (cuda:-1)"},
        {kGood,
         {"groups[0].devices=cpu,cpu"},
         "groups[0].devices: wrong number of devices (2); 1, as num_workers says, or one for all"},
        {kGood,
         {"training.update_mode=BOUNDED_STALENESS"},
         "training.update_mode: not supported by this version (BOUNDED_STALENESS); use SYNC or"},
        {kGood,
         {"training.membership=ELASTIC"},
         "training.membership: not supported by this version (ELASTIC); use FIXED"},
        {kText,
         {"training.update_mode=ASYNC", "groups[0].num_workers=2"},
         "groups[0].num_workers: recurrent state cannot be carried by several ASYNC workers (2); 1,"
         " or training.update_mode: SYNC"},
        {kGood, {"training.batch_size=-5"}, "training.batch_size: too small (-5)"},
        {kGood,
         {"training.optimizer.learning_rate=0"},
         "training.optimizer.learning_rate: out of range (0); a number greater than 0"},
        {kGood,
         {"training.optimizer.learning_rate=inf"},
         "training.optimizer.learning_rate: out of range (inf)"},
        {kGood, {"training.optimizer.momentum=1"}, "training.optimizer.momentum: out of range (1)"},
        {kGood, {"training.optimizer.beta2=1.5"}, "training.optimizer.beta2: out of range (1.5)"},
        {kGood,
         {"training.optimizer.schedule.kind=STEP"},
         "training.optimizer.schedule.step_boundaries: missing; the steps"},
        {kGood,
         {"training.optimizer.schedule.step_boundaries=5,5"},
         "training.optimizer.schedule.step_boundaries[1]: not growing (5); more than 5"},
        {kGood, {"training.rejoin_timeout_s=0"}, "training.rejoin_timeout_s: out of range (0)"},
        {kGood, {"training.publish_every_steps=0"}, "training.publish_every_steps: too small (0)"},
        {kGood, {"training.held_cuts=0"}, "training.held_cuts: too small (0)"},
        {kGood, {"training.log_every_steps=0"}, "training.log_every_steps: too small (0)"},
        {kGood, {"training.worker_threads=0"}, "training.worker_threads: out of range (0)"},
        {kGood,
         {"codistillation.burn_in_steps=100"},
         "codistillation.burn_in_steps: no step would use a teacher (100); fewer than the 100 of"},
        {kGood,
         {"codistillation.weight=-1"},
         "codistillation.weight: out of range (-1); 0 or more"},
        {kGood, {"codistillation.temperature=0"}, "codistillation.temperature: out of range (0)"},
        {kGood,
         {"codistillation.prefetch=0"},
         "codistillation.prefetch: out of range (0); 1 to 64"},
        {kGood,
         {"codistillation.max_staleness_steps=9"},
         "codistillation.max_staleness_steps: predictions would mostly be too old (9); at least "
         "the 10 of training.publish_every_steps"},
        {kGood,
         {"codistillation.request_timeout_ms=0"},
         "codistillation.request_timeout_ms: too small (0)"},
        {kGood, {"codistillation.teacher_wait_ms=-1"}, "codistillation.teacher_wait_ms: too small"},
        {kGood,
         {"evaluation.every_steps=15"},
         "evaluation.every_steps: not a published step (15); a multiple of the 10 of training."},
        {kGood, {"evaluation.batch_size=0"}, "evaluation.batch_size: too small (0)"},
        {kGood, {"evaluation.max_examples=-1"}, "evaluation.max_examples: too small (-1)"},
        {kGood, {"checkpoint.every_steps=-1"}, "checkpoint.every_steps: too small (-1)"},
        {kGood, {"checkpoint.keep=0"}, "checkpoint.keep: too small (0)"},
        {kGood, {"prediction.max_queue=0"}, "prediction.max_queue: too small (0)"},
        {kGood, {"prediction.threads=0"}, "prediction.threads: out of range (0)"},
    }));

TEST(Rules, OfAnEmptyJobAreAllReported) {
  EXPECT_THAT(Mistakes(""),
              ElementsAre(HasSubstr("name: missing"), HasSubstr("model: missing"),
                          HasSubstr("data.train: missing"), HasSubstr("data.validation: missing"),
                          HasSubstr("groups: missing"), HasSubstr("training.batch_size: missing"),
                          HasSubstr("stop.steps: missing")));
}

TEST(Rules, OfCsvColumns) {
  JobConfig job = Good(kCsv);
  job.mutable_evaluator()->set_enabled(false);
  job.mutable_data()->clear_validation();
  CsvConfig* csv = job.mutable_data()->mutable_train()->mutable_csv();
  csv->set_delimiter(", ");
  csv->mutable_columns(1)->set_log1p(true);
  csv->mutable_columns(2)->set_cardinality(10);
  csv->mutable_columns(4)->mutable_label_values(1)->set_text(1, "<=50K");
  csv->mutable_columns(4)->mutable_label_values(0)->set_text(0, " <=50K");
  csv->mutable_columns(3)->set_kind(CsvColumn::LABEL);
  const std::vector<std::string> lines =
      absl::StrSplit(std::string(ValidateJob(job).message()), '\n');
  EXPECT_THAT(lines,
              ElementsAre(HasSubstr("csv.delimiter: wrong delimiter (\", \"); one character"),
                          HasSubstr("columns[1].log1p: only possible with kind NUMERIC (kind is "
                                    "CATEGORICAL)"),
                          HasSubstr("columns[2].cardinality: only possible with kind CATEGORICAL "
                                    "(kind is IGNORED)"),
                          HasSubstr("columns[3].log1p: only possible with kind NUMERIC"),
                          HasSubstr("columns[4].label_values[0].text: blanks around the text"),
                          HasSubstr("csv.columns: wrong number of columns of kind LABEL (gain, "
                                    "income); exactly one"),
                          HasSubstr("csv.columns: wrong number of classes (0); 2, as "
                                    "SIGMOID_CROSS_ENTROPY"),
                          HasSubstr("model.inputs[0].shape: not that of the field ([2]); [1]")));
}

TEST(Rules, OfLabelsFollowTheLoss) {
  JobConfig job = Good(kCsv);
  job.mutable_model()->set_label_loss(SQUARED_ERROR);
  EXPECT_THAT(
      std::string(ValidateJob(job).message()),
      HasSubstr("data.train.csv.columns: the LABEL column has label_values (2 classes), but "
                "SQUARED_ERROR needs numeric labels"));
  for (DatasetConfig* data :
       {job.mutable_data()->mutable_train(), job.mutable_data()->mutable_validation()}) {
    data->mutable_csv()->mutable_columns(4)->clear_label_values();
  }
  EXPECT_TRUE(ValidateJob(job).ok()) << ValidateJob(job);

  // Two groups of regressions can only compare their outputs.
  *job.add_groups() = job.groups(0);
  job.mutable_groups(1)->set_name("second");
  EXPECT_THAT(std::string(ValidateJob(job).message()),
              HasSubstr("codistillation.teacher_loss: needs probabilities"));
  job.mutable_codistillation()->set_teacher_loss(CodistillationConfig::SQUARED_ERROR_LOGITS);
  EXPECT_TRUE(ValidateJob(job).ok()) << ValidateJob(job);

  JobConfig text = Good(kText);
  text.mutable_model()->set_label_loss(SIGMOID_CROSS_ENTROPY);
  text.mutable_model()->set_num_outputs(1);
  EXPECT_THAT(std::string(ValidateJob(text).message()),
              HasSubstr("model.label_loss: does not fit text"));

  JobConfig image = Good(kImage);
  *image.mutable_model()->add_states() = text.model().states(0);
  EXPECT_THAT(std::string(ValidateJob(image).message()),
              HasSubstr("model.states: recurrent state needs lanes of text"));
}

TEST(Rules, OfEndpoints) {
  JobConfig job = Good();
  for (const char* address : {"h0:1", "h0:1", "nohost", "h:70000", ":5"}) {
    job.mutable_groups(0)->add_shards()->set_address(address);
  }
  const std::vector<std::string> lines =
      absl::StrSplit(std::string(ValidateJob(job).message()), '\n');
  EXPECT_THAT(
      lines,
      ElementsAre(HasSubstr("groups[0].shards: wrong number of endpoints (5); 2, as "
                            "num_shards says, or none"),
                  HasSubstr("groups[0].shards[1].address: used twice (h0:1)"),
                  HasSubstr("groups[0].shards[2].address: wrong address (nohost); host:port"),
                  HasSubstr("groups[0].shards[3].address: wrong address (h:70000)"),
                  HasSubstr("groups[0].shards[4].address: wrong address (:5)")));
}

TEST(Rules, LetOneGroupHaveSettingsForTeachers) {
  JobConfig job = Good();
  job.mutable_groups()->RemoveLast();
  job.mutable_groups(0)->set_num_prediction_servers(0);
  job.mutable_codistillation()->set_burn_in_steps(1000);
  EXPECT_TRUE(ValidateJob(job).ok()) << ValidateJob(job);
  JobConfig off = Good();
  off.mutable_codistillation()->set_enabled(false);
  off.mutable_codistillation()->set_burn_in_steps(1000);
  off.mutable_codistillation()->set_max_staleness_steps(0);
  EXPECT_TRUE(ValidateJob(off).ok()) << ValidateJob(off);
}

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

TEST(SaveJob, WritesWhatLoadJobReads) {
  const JobConfig job = Good(kCsv);
  const std::string path = JoinPath(std::getenv("TEST_TMPDIR"), "saved.textproto");
  ASSERT_TRUE(SaveJob(job, path).ok());
  const auto read = LoadJob(path);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_TRUE(MessageDifferencer::Equals(job, *read));
  EXPECT_THAT(std::string(SaveJob(job, "/nonexistent/x").message()), HasSubstr("/nonexistent"));
}

TEST(Job, FindsGroupsAndTeachers) {
  JobConfig job = Good();
  job.add_groups()->set_name("gamma");
  EXPECT_EQ(*FindGroup(job, "beta"), 1);
  const absl::Status status = FindGroup(job, "delta").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("alpha, beta, gamma"));

  EXPECT_THAT(TeachersOf(job, 1), ElementsAre(0, 2));
  job.mutable_codistillation()->set_topology(CodistillationConfig::RING);
  EXPECT_THAT(TeachersOf(job, 1), ElementsAre(2));
  EXPECT_THAT(TeachersOf(job, 2), ElementsAre(0));
  job.mutable_codistillation()->set_enabled(false);
  EXPECT_THAT(TeachersOf(job, 1), IsEmpty());
  JobConfig one = Good(kCsv);
  EXPECT_THAT(TeachersOf(one, 0), IsEmpty());
}

TEST(Job, NamesItsFiles) {
  JobConfig job = Good();
  job.mutable_model()->set_archive_dir("out/models");
  EXPECT_EQ(ArchivePath(job, 0), "out/models/alpha.pt");
  EXPECT_EQ(WeightsPath(job, 1), "out/models/beta.safetensors");
  EXPECT_EQ(TensorListPath(job, 1), "out/models/beta.tensors.textproto");
  EXPECT_EQ(CheckpointDirectory(job, 0), "");
  job.mutable_checkpoint()->set_directory("/ck");
  EXPECT_EQ(CheckpointDirectory(job, 0), "/ck/alpha");
  EXPECT_EQ(RunId(job), "job");
  job.set_run_id("run-1");
  EXPECT_EQ(RunId(job), "run-1");
}

}  // namespace
}  // namespace codistill
