// CreateDataset on delimited text.

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "common/base/random.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/data/dataset.h"
#include "worker/data/test_files.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::FloatNear;
using ::testing::HasSubstr;
using ::testing::Pointwise;

JobConfig Job() {
  JobConfig job = ParseJob(R"pb(
    model { num_outputs: 1 label_loss: SIGMOID_CROSS_ENTROPY }
    data {
      train {
        csv {
          files: "train.csv"
          missing: "?"
          missing: "NA"
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
    groups { name: "a" }
  )pb");
  *job.mutable_data()->mutable_validation() = job.data().train();
  CsvConfig* validation = job.mutable_data()->mutable_validation()->mutable_csv();
  validation->set_files(0, "test.csv");
  validation->add_fit_files("train.csv");
  return job;
}

constexpr char kTrain[] =
    "10, red, x, 0, <=50K\r\n"
    "\n"
    "20, ?, y, -3, >50K\n"
    "?,red,z,NA,<=50K\n"
    "   \n"
    "30,blue,,3,>50K";

absl::StatusOr<std::unique_ptr<Dataset>> Create(const JobConfig& job, bool training = true) {
  DatasetOptions options;
  options.job = &job;
  options.training = training;
  options.data_dir = TestDir();
  return CreateDataset(options);
}

Batch FillAll(const Dataset& dataset) {
  std::vector<ExampleRef> refs;
  for (int64_t i = 0; i < dataset.size(); ++i) refs.push_back({i, 0});
  Batch batch;
  EXPECT_TRUE(dataset.Fill(refs, &batch).ok());
  return batch;
}

template <typename T>
std::vector<T> Values(const Tensor& tensor) {
  const auto span = tensor.As<T>();
  return std::vector<T>(span.begin(), span.end());
}

std::string ErrorOf(const std::string& train) {
  WriteTestFile("train.csv", train);
  const absl::Status status = Create(Job()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()), testing::StartsWith(TestDir() + "/train.csv:"));
  return std::string(status.message());
}

TEST(Csv, EncodesRecords) {
  WriteTestFile("train.csv", kTrain);
  const auto dataset = Create(Job());
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  EXPECT_EQ((*dataset)->size(), 4);
  EXPECT_EQ((*dataset)->num_classes(), 2);
  EXPECT_THAT((*dataset)->summary(), HasSubstr("4 records of"));
  EXPECT_THAT((*dataset)->summary(), HasSubstr("categorical indices: 4"));
  const Batch batch = FillAll(**dataset);
  // Mean 20, variance 200 / 3 over the three that are there; log1p(3) for the gains, mean 0.
  const float age = static_cast<float>(10 / std::sqrt(200.0 / 3));
  const float gain = static_cast<float>(1 / std::sqrt(2.0 / 3));
  EXPECT_THAT(batch.field("numeric")->shape(), ElementsAre(4, 2));
  EXPECT_THAT(Values<float>(*batch.field("numeric")),
              Pointwise(FloatNear(1e-6f), std::vector<float>{-age, 0, 0, -gain, 0, 0, age, gain}));
  EXPECT_THAT(batch.field("categorical")->shape(), ElementsAre(4, 1));
  EXPECT_THAT(Values<int64_t>(*batch.field("categorical")), ElementsAre(1, 2, 1, 3));
  EXPECT_THAT(Values<float>(batch.labels), ElementsAre(0, 1, 0, 1));
}

TEST(Csv, ValidationIsEncodedAsTheTrainingSetWas) {
  WriteTestFile("train.csv", kTrain);
  WriteTestFile("test.csv", "20,blue,q,0,>50K.\n30,green,q,3,<=50K\n10,NA,q,?,>50K\n");
  const auto dataset = Create(Job(), false);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  const Batch batch = FillAll(**dataset);
  const float age = static_cast<float>(10 / std::sqrt(200.0 / 3));
  const float gain = static_cast<float>(1 / std::sqrt(2.0 / 3));
  EXPECT_THAT(Values<float>(*batch.field("numeric")),
              Pointwise(FloatNear(1e-6f), std::vector<float>{0, 0, age, gain, -age, 0}));
  // blue, unseen, missing (however it is spelt).
  EXPECT_THAT(Values<int64_t>(*batch.field("categorical")), ElementsAre(3, 0, 2));
  EXPECT_THAT(Values<float>(batch.labels), ElementsAre(1, 0, 1));
}

TEST(Csv, HashesToKeysWithoutAVocabulary) {
  JobConfig job = Job();
  for (DatasetConfig* set :
       {job.mutable_data()->mutable_train(), job.mutable_data()->mutable_validation()}) {
    set->mutable_csv()->mutable_columns(1)->set_kind(CsvColumn::HASHED);
    set->mutable_csv()->mutable_columns(2)->set_kind(CsvColumn::HASHED);
  }
  WriteTestFile("train.csv", kTrain);
  WriteTestFile("test.csv", "20,green,x,0,>50K.\n20,red,NA,0,>50K\n");
  const auto train = Create(job);
  const auto test = Create(job, false);
  ASSERT_TRUE(train.ok()) << train.status();
  ASSERT_TRUE(test.ok()) << test.status();
  EXPECT_EQ(FillAll(**train).field("categorical"), nullptr);
  const Batch of_train = FillAll(**train);
  const Batch of_test = FillAll(**test);
  ASSERT_NE(of_train.field("hashed"), nullptr);
  EXPECT_THAT(of_train.field("hashed")->shape(), ElementsAre(4, 2));
  const std::vector<int64_t> a = Values<int64_t>(*of_train.field("hashed"));
  const std::vector<int64_t> b = Values<int64_t>(*of_test.field("hashed"));
  const auto key = [](absl::string_view text) { return static_cast<int64_t>(HashString(text)); };
  // Trimmed, whatever the file; a value that the training set lacks has a key of its own.
  EXPECT_THAT(a, ElementsAre(key("red"), key("x"), testing::_, key("y"), key("red"), key("z"),
                             key("blue"), key("")));
  EXPECT_THAT(b, ElementsAre(key("green"), key("x"), key("red"), a[2]));
}

TEST(Csv, ReadsGzipTabsHeadersAndSeveralFiles) {
  JobConfig job = ParseJob(R"pb(
    model { num_outputs: 3 }
    data {
      train {
        csv {
          files: "a.tsv.gz"
          files: "b.tsv"
          delimiter: "\t"
          skip_lines: 1
          columns { kind: NUMERIC }
          columns {
            kind: LABEL
            label_values { text: "x" }
            label_values { text: "y" }
            label_values { text: "z" }
          }
        }
      }
    }
    groups { name: "a" }
  )pb");
  WriteTestFile("a.tsv.gz", Gzip("head\tline\n1\tx\n2\tz\n"));
  WriteTestFile("b.tsv", "head\tline\n3\ty\n");
  const auto dataset = Create(job);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  const Batch batch = FillAll(**dataset);
  EXPECT_THAT(Values<int64_t>(batch.labels), ElementsAre(0, 2, 1));
  EXPECT_EQ(batch.fields.size(), 1u);
  const std::string whole = Gzip("head\tline\n1\tx\n2\tz\n");
  WriteTestFile("a.tsv.gz", whole.substr(0, whole.size() - 9));
  const absl::Status status = Create(job).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("a.tsv.gz: truncated"));
}

TEST(Csv, HashesValuesBeyondTheCardinality) {
  JobConfig job = Job();
  for (DatasetConfig* data :
       {job.mutable_data()->mutable_train(), job.mutable_data()->mutable_validation()}) {
    data->mutable_csv()->mutable_columns(1)->set_cardinality(4);
  }
  std::string train;
  for (const char* word : {"a", "b", "c", "d", "e", "f", "g", "h"}) {
    train += std::string("1,") + word + ",,0,<=50K\n";
  }
  WriteTestFile("train.csv", train);
  WriteTestFile("test.csv", train + "1,unseen,,0,<=50K\n");
  const auto dataset = Create(job, false);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  const std::vector<int64_t> indices = Values<int64_t>(*FillAll(**dataset).field("categorical"));
  EXPECT_THAT(std::vector<int64_t>(indices.begin(), indices.begin() + 3), ElementsAre(1, 2, 3));
  for (int i = 3; i < 8; ++i) {
    EXPECT_GE(indices[i], 1);
    EXPECT_LT(indices[i], 4);
  }
  EXPECT_EQ(indices[8], 0);
}

TEST(Csv, ConstantColumnsBecomeZero) {
  WriteTestFile("train.csv", "5,a,,1,<=50K\n5,a,,1,>50K\n");
  const auto dataset = Create(Job());
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  EXPECT_THAT(Values<float>(*FillAll(**dataset).field("numeric")), ElementsAre(0, 0, 0, 0));
}

TEST(Csv, ReadsNumericLabels) {
  JobConfig job = Job();
  job.mutable_model()->set_label_loss(SQUARED_ERROR);
  job.mutable_data()->mutable_train()->mutable_csv()->mutable_columns(4)->clear_label_values();
  WriteTestFile("train.csv", "1,a,,0,2.5\n2,b,,0,-1e3\n");
  auto dataset = Create(job);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  EXPECT_EQ((*dataset)->num_classes(), 0);
  EXPECT_THAT(Values<float>(FillAll(**dataset).labels), ElementsAre(2.5f, -1000));
  WriteTestFile("train.csv", "1,a,,0,high\n");
  EXPECT_THAT(std::string(Create(job).status().message()),
              HasSubstr("train.csv:1: column 5 (income): \"high\" is no number"));
}

TEST(Csv, NamesABadRecord) {
  EXPECT_THAT(ErrorOf("1,a,,0,<=50K\n\n1,a,0,<=50K\n"),
              HasSubstr("train.csv:3: 4 values; 5, one a column, would be right"));
  EXPECT_THAT(ErrorOf("1,a,,0,<=50K,\n"), HasSubstr("train.csv:1: 6 values; 5"));
  EXPECT_THAT(
      ErrorOf("old,a,,0,<=50K\n"),
      HasSubstr("train.csv:1: column 1 (age): \"old\" is no number; a finite number, or ? or "
                "NA where it is missing, would be right"));
  EXPECT_THAT(ErrorOf("1,a,,inf,<=50K\n"), HasSubstr("column 4 (gain): \"inf\" is no number"));
  EXPECT_THAT(ErrorOf("1,a,,,<=50K\n"), HasSubstr("column 4 (gain): \"\" is no number"));
  EXPECT_THAT(ErrorOf("1,a,,0,<=50K\n1,a,,0,60K\n"),
              HasSubstr("train.csv:2: column 5 (income): unknown label \"60K\"; one of <=50K, "
                        ">50K, >50K. would be right"));
  EXPECT_THAT(ErrorOf("1,a,,0,?\n"), HasSubstr("unknown label \"?\""));
}

TEST(Csv, NamesAMissingFile) {
  JobConfig job = Job();
  job.mutable_data()->mutable_validation()->mutable_csv()->set_fit_files(0, "gone.csv");
  WriteTestFile("test.csv", "1,a,,0,<=50K\n");
  const absl::Status status = Create(job, false).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("data.validation.csv.fit_files[0]: no file " + TestDir() + "/gone.csv"));
}

TEST(Csv, RefusesAnEmptyFile) {
  WriteTestFile("train.csv", "\n");
  EXPECT_THAT(std::string(Create(Job()).status().message()),
              HasSubstr("data.train: only 0 examples"));
}

}  // namespace
}  // namespace codistill
