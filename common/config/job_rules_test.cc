#include <string>
#include <vector>

#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "common/config/job.h"
#include "common/config/test_jobs.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

// The rules of a job, each with the message of the job that breaks it.
namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

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
        {kGood,
         {"model.label_smoothing_prior=UNIGRAM"},
         "model.label_smoothing_prior: without effect (UNIGRAM): nothing is smoothed; a "
         "label_smoothing above 0 would be right"},
        {kCsv,
         {"model.ignored_label=1"},
         "model.ignored_label: not possible with label_loss SIGMOID_CROSS_ENTROPY (1)"},
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
        {kGood,
         {"groups[0].devices=gpu"},
         "groups[0].devices[0]: unknown device (gpu); cpu or cuda:N would be right"},
        {kGood, {"training.micro_batches=0"}, "training.micro_batches: too small (0); at least 1"},
        {kGood,
         {"training.micro_batches=3"},
         "training.micro_batches: does not divide training.batch_size into equal parts (3 of 32); "
         "a divisor of 32 would be right"},
        {kText, {"training.micro_batches=16"}, "training.micro_batches: does not divide"},
        {kGood, {"groups[0].devices=cuda:-1"}, "groups[0].devices[0]: unknown device (cuda:-1)"},
        {kGood,
         {"groups[1].prediction_devices=cuda:0,gpu", "groups[1].num_prediction_servers=2"},
         "groups[1].prediction_devices[1]: unknown device (gpu); cpu or cuda:N would be right"},
        {kGood,
         {"groups[1].prediction_devices=cuda:0,cuda:1"},
         "groups[1].prediction_devices: wrong number of devices (2); 1, as num_prediction_servers"},
        {kGood,
         {"evaluator.device=cuda"},
         "evaluator.device: unknown device (cuda); cpu or cuda:N would be right"},
        {kGood,
         {"training.update_mode=ASYNC", "groups.num_workers=4", "stop.steps=1000",
          "codistillation.burn_in_steps=300"},
         "codistillation.burn_in_steps: no step would use a teacher (300): ASYNC counts each"},
        {kGood,
         {"groups[0].devices=cpu,cpu"},
         "groups[0].devices: wrong number of devices (2); 1, as num_workers says, or one for all"},
        {kGood,
         {"training.update_mode=BOUNDED_STALENESS"},
         "training.max_staleness: missing; the steps a worker may be ahead"},
        {kGood,
         {"training.update_mode=BOUNDED_STALENESS", "training.max_staleness=-1"},
         "training.max_staleness: too small (-1)"},
        {kGood,
         {"training.update_mode=ASYNC", "training.max_staleness=3"},
         "training.max_staleness: given (3) with update_mode ASYNC; it belongs to"},
        {kText,
         {"training.membership=ELASTIC"},
         "training.membership: ELASTIC cannot share out a text source, whose lanes"},
        {kText,
         {"training.backup_workers=1", "groups.num_workers=2"},
         "training.backup_workers: not with recurrent state (1): a straggler skips steps"},
        {kGood,
         {"training.backup_workers=2", "groups[0].num_workers=3", "groups[1].num_workers=2"},
         "training.backup_workers: nobody's push would be waited for (2); fewer than the 2 of"},
        {kGood, {"training.backup_workers=-1"}, "training.backup_workers: too small (-1)"},
        {kGood,
         {"training.backup_workers=1", "groups.num_workers=2", "training.update_mode=ASYNC"},
         "training.backup_workers: without meaning in ASYNC (1): nobody waits for others"},
        {kGood, {"training.weights_lag=2"}, "training.weights_lag: out of range (2)"},
        {kGood, {"training.weights_lag=-1"}, "training.weights_lag: out of range (-1)"},
        {kGood,
         {"training.weights_lag=1", "training.backup_workers=1", "groups.num_workers=2"},
         "training.weights_lag: not with backup_workers (1): a straggler would find"},
        {kGood,
         {"training.weights_lag=1", "training.membership=ELASTIC"},
         "training.weights_lag: not with ELASTIC membership in SYNC"},
        {kGood, {"training.lease_s=0"}, "training.lease_s: out of range (0)"},
        {kGood,
         {"groups[0].max_workers=3"},
         "groups[0].max_workers: without meaning under FIXED membership; leave it out, or"},
        {kGood,
         {"training.membership=ELASTIC", "groups.num_workers=3", "groups[0].max_workers=2"},
         "groups[0].max_workers: out of range (2); 3 to"},
        {kGood,
         {"training.membership=ELASTIC", "groups[1].min_workers=2"},
         "groups[1].min_workers: out of range (2); 1 to 1"},
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
         {"training.optimizer.kind=FTRL"},
         "training.optimizer.kind: for rows of embedding tables only (FTRL), where"},
        {kGood,
         {"training.optimizer.kind=LARS", "training.update_mode=ASYNC"},
         "training.optimizer.kind: not possible with training.update_mode ASYNC (LARS): its rates "
         "come from the norms of whole tensors"},
        {kGood,
         {"training.optimizer.clip_norm=-1"},
         "training.optimizer.clip_norm: out of range (-1); 0 or more"},
        {kGood,
         {"training.optimizer.initial_accumulator=-1"},
         "training.optimizer.initial_accumulator: out of range (-1)"},
        {kGood,
         {"training.optimizer.trust_coefficient=0"},
         "training.optimizer.trust_coefficient: out of range (0)"},
        {kGood,
         {"training.optimizer.weight_decay_schedule.kind=STEP"},
         "training.optimizer.weight_decay_schedule.step_boundaries: missing; the steps"},
        {kGood, {"training.server_threads=0"}, "training.server_threads: out of range (0); 1 to"},
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
        {kGood, {"codistillation.hedge_after_ms=-1"}, "codistillation.hedge_after_ms: too small"},
        {kGood,
         {"codistillation.teacher_dtype=DT_DOUBLE"},
         "codistillation.teacher_dtype: is DT_DOUBLE; DT_FLOAT, DT_HALF, DT_BFLOAT16 or DT_INT8"},
        {kGood,
         {"codistillation.teacher_output=TOP_K", "codistillation.top_k=5",
          "codistillation.teacher_dtype=DT_INT8"},
         "codistillation.teacher_dtype: is DT_INT8, which logits have a scale for, with"},
        {kGood,
         {"codistillation.teacher_output=TOP_K", "codistillation.top_k=21"},
         "codistillation.top_k: out of range (21); 1 to the 20 of model.num_outputs"},
        {kGood,
         {"codistillation.teacher_output=TOP_K", "codistillation.top_k=0"},
         "codistillation.top_k: out of range (0)"},
        {kGood,
         {"codistillation.teacher_output=TOP_K", "codistillation.top_k=5",
          "codistillation.teacher_loss=KL_STUDENT_TEACHER"},
         "codistillation.teacher_loss: needs what teachers say of every class "
         "(KL_STUDENT_TEACHER)"},
        {kGood,
         {"codistillation.teacher_output=TOP_K", "codistillation.top_k=5",
          "codistillation.teacher_loss=SQUARED_ERROR_LOGITS"},
         "codistillation.teacher_loss: needs what teachers say of every class"},
        {kGood,
         {"codistillation.teacher_output=TOP_K", "codistillation.top_k=5",
          "codistillation.average=LOGITS"},
         "codistillation.average: is LOGITS, which teachers do not give"},
        {kCsv,
         {"codistillation.teacher_output=TOP_K", "codistillation.top_k=1"},
         "codistillation.teacher_output: is TOP_K, and a model of label_loss SIGMOID_CROSS_ENTROPY "
         "has no classes"},
        {kGood, {"codistillation.teacher_wait_ms=-1"}, "codistillation.teacher_wait_ms: too small"},
        {kGood,
         {"evaluation.every_steps=15"},
         "evaluation.every_steps: not a published step (15); a multiple of the 10 of training."},
        {kGood, {"evaluation.batch_size=0"}, "evaluation.batch_size: too small (0)"},
        {kGood, {"evaluation.max_examples=-1"}, "evaluation.max_examples: too small (-1)"},
        {kGood, {"checkpoint.every_steps=-1"}, "checkpoint.every_steps: too small (-1)"},
        {kGood, {"checkpoint.keep=0"}, "checkpoint.keep: too small (0)"},
        {kGood, {"prediction.max_queue=0"}, "prediction.max_queue: out of range (0)"},
        {kGood, {"prediction.max_queue=1048577"}, "prediction.max_queue: out of range (1048577)"},
        {kGood, {"prediction.threads=0"}, "prediction.threads: out of range (0)"},
        {kGood,
         {"prediction.transfer_dtype=DT_HALF"},
         "prediction.transfer_dtype: is DT_HALF; DT_FLOAT or DT_BFLOAT16 is right"},
        {kGood, {"prediction.max_batch_size=0"}, "prediction.max_batch_size: too small (0)"},
        {kGood,
         {"prediction.max_batch_delay_us=-1"},
         "prediction.max_batch_delay_us: out of range (-1)"},
        {kGood, {"prediction.cache_bytes=-1"}, "prediction.cache_bytes: too small (-1)"},
        {kText,
         {"prediction.cache_bytes=1000000"},
         "prediction.cache_bytes: not possible with recurrent state (1000000)"},
        {kGood,
         {"prediction.cache_window_steps=-1"},
         "prediction.cache_window_steps: too small (-1)"},
        {kGood,
         {"prediction.weights=DT_HALF"},
         "prediction.weights: is DT_HALF; DT_FLOAT, DT_BFLOAT16 or DT_INT8 is right"},
        {kGood, {"prediction.held_versions=0"}, "prediction.held_versions: out of range (0)"},
        {kGood, {"prediction.held_versions=1001"}, "prediction.held_versions: out of range (1001)"},
        {kGood, {"prediction.compute_threads=0"}, "prediction.compute_threads: out of range (0)"},
        {kGood,
         {"transport.push_dtype=DT_BFLOAT16"},
         "transport.push_dtype: is DT_BFLOAT16; DT_FLOAT or DT_HALF is right"},
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
  job.mutable_training()->set_precision(BF16);
  EXPECT_THAT(std::string(ValidateJob(job).message()),
              HasSubstr("training.precision: too coarse for label_loss SQUARED_ERROR (BF16)"));

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

TEST(Rules, LetOneProcessBeAPredictionServerOfSeveralGroups) {
  JobConfig job = Good();
  for (GroupConfig& group : *job.mutable_groups()) {
    group.set_num_prediction_servers(1);
    group.add_prediction_servers()->set_address("h:1");
  }
  EXPECT_TRUE(ValidateJob(job).ok()) << ValidateJob(job);
  job.mutable_groups(0)->add_shards()->set_address("h:1");
  job.mutable_groups(0)->add_shards()->set_address("h:2");
  job.mutable_groups(1)->set_num_prediction_servers(2);
  job.mutable_groups(1)->add_prediction_servers()->set_address("h:1");
  const std::vector<std::string> lines =
      absl::StrSplit(std::string(ValidateJob(job).message()), '\n');
  EXPECT_THAT(lines,
              ElementsAre(HasSubstr("groups[0].prediction_servers[0].address: used twice (h:1)"),
                          HasSubstr("groups[1].prediction_servers[0].address: used twice (h:1)"),
                          HasSubstr("groups[1].prediction_servers[1].address: used twice (h:1)")));
}

TEST(Rules, LetProcessesComputeOnDevices) {
  EXPECT_THAT(Mistakes(kGood, {"groups[0].num_workers=2", "groups[0].devices=cuda:0,cuda:1",
                               "groups[1].devices=cuda:3", "groups[1].prediction_devices=cuda:1",
                               "evaluator.device=cuda:0", "prediction.precision=BF16"}),
              IsEmpty());
}

TEST(Rules, LetTeachersAnswerBriefly) {
  EXPECT_THAT(Mistakes(kGood, {"codistillation.teacher_dtype=DT_INT8"}), IsEmpty());
  EXPECT_THAT(Mistakes(kGood, {"codistillation.teacher_output=TOP_K", "codistillation.top_k=20",
                               "codistillation.teacher_loss=KL_TEACHER_STUDENT",
                               "codistillation.teacher_dtype=DT_HALF"}),
              IsEmpty());
  // top_k has a default that need not fit those who do not use it.
  EXPECT_THAT(Mistakes(kGood, {"codistillation.top_k=64"}), IsEmpty());
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

TEST(RulesOfParameterGroups, AreEnforced) {
  const std::string text = absl::StrReplaceAll(
      kGood,
      {{"training {", R"pb(training { optimizer {
                             parameter_groups { frozen: true learning_rate_multiplier: 2 }
                             parameter_groups { pattern: "*.bias" weight_decay_multiplier: -1 }
                             parameter_groups { pattern: "*" learning_rate_multiplier: -1 }
                           })pb"}});
  EXPECT_THAT(
      Mistakes(text, {}),
      ElementsAre(testing::StartsWith("training.optimizer.parameter_groups[0].pattern: missing"),
                  testing::StartsWith("training.optimizer.parameter_groups[0].frozen: a multiplier "
                                      "beside it"),
                  testing::StartsWith("training.optimizer.parameter_groups[1].weight_decay_"
                                      "multiplier: out of range (-1)"),
                  testing::StartsWith("training.optimizer.parameter_groups[2].learning_rate_"
                                      "multiplier: out of range (-1)")));
}

}  // namespace
}  // namespace codistill
