// The readers on the real files, where CODISTILL_DATA names their folder.

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/data/dataset.h"
#include "worker/data/test_files.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

#define CODISTILL_NEEDS_DATA(directory, name)                                               \
  const std::string directory = RealData(name);                                             \
  if (directory.empty()) {                                                                  \
    GTEST_SKIP() << "no folder " << name                                                    \
                 << " with the real data: set --test_env=CODISTILL_DATA=/path/to/the/data"; \
  }                                                                                         \
  static_assert(true, "")

absl::StatusOr<std::unique_ptr<Dataset>> Create(const JobConfig& job, const std::string& data_dir,
                                                bool training) {
  DatasetOptions options;
  options.job = &job;
  options.training = training;
  options.data_dir = data_dir;
  options.threads = 2;
  return CreateDataset(options);
}

Batch FillAll(const Dataset& dataset) {
  std::vector<ExampleRef> refs;
  for (int64_t i = 0; i < dataset.size(); ++i) refs.push_back({i, 0});
  Batch batch;
  const absl::Status status = dataset.Fill(refs, &batch);
  EXPECT_TRUE(status.ok()) << status;
  return batch;
}

TEST(RealData, Adult) {
  CODISTILL_NEEDS_DATA(directory, "adult");
  JobConfig job = ParseJob(R"pb(
    model { num_outputs: 1 label_loss: SIGMOID_CROSS_ENTROPY }
    groups { name: "a" }
  )pb");
  CsvConfig* csv = job.mutable_data()->mutable_train()->mutable_csv();
  csv->add_missing("?");
  const std::string kinds = "NCNCNCCCCCNNNCL";
  for (const char kind : kinds) {
    CsvColumn* column = csv->add_columns();
    column->set_kind(kind == 'N'   ? CsvColumn::NUMERIC
                     : kind == 'C' ? CsvColumn::CATEGORICAL
                                   : CsvColumn::LABEL);
  }
  csv->mutable_columns(14)->add_label_values()->add_text("<=50K");
  csv->mutable_columns(14)->mutable_label_values(0)->add_text("<=50K.");
  csv->mutable_columns(14)->add_label_values()->add_text(">50K");
  csv->mutable_columns(14)->mutable_label_values(1)->add_text(">50K.");
  *job.mutable_data()->mutable_validation() = job.data().train();
  csv->add_files("adult-train.csv");
  job.mutable_data()->mutable_validation()->mutable_csv()->add_files("adult-test.csv");
  job.mutable_data()->mutable_validation()->mutable_csv()->add_fit_files("adult-train.csv");

  const auto train = Create(job, directory, true), test = Create(job, directory, false);
  ASSERT_TRUE(train.ok()) << train.status();
  ASSERT_TRUE(test.ok()) << test.status();
  EXPECT_EQ((*train)->size(), 32561);
  EXPECT_EQ((*test)->size(), 16281);
  // Indices of each categorical column, as counted independently.
  EXPECT_THAT((*train)->summary(), HasSubstr("categorical indices: 10,17,8,16,7,6,3,43"));

  const Batch batch = FillAll(**train);
  const auto labels = batch.labels.As<float>();
  EXPECT_EQ(std::count(labels.begin(), labels.end(), 1.0f), 7841);
  const auto numeric = batch.field("numeric")->As<float>();
  for (int column = 0; column < 6; ++column) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < batch.examples; ++i) {
      const double value = numeric[i * 6 + column];
      sum += value;
      squares += value * value;
    }
    EXPECT_NEAR(sum / 32561, 0, 1e-4) << column;
    EXPECT_NEAR(squares / 32561, 1, 1e-3) << column;
  }
  // The first record: 39 years among a mean of 38.58 and a deviation of 13.64.
  EXPECT_NEAR(numeric[0], 0.0307, 1e-4);
  const auto categorical = batch.field("categorical")->As<int64_t>();
  EXPECT_TRUE(std::all_of(categorical.begin(), categorical.begin() + 8,
                          [](int64_t index) { return index == 1; }));
  // All values of the test set were met in training.
  const Batch held_out = FillAll(**test);
  const auto seen = held_out.field("categorical")->As<int64_t>();
  EXPECT_EQ(std::count(seen.begin(), seen.end(), 0), 0);
}

TEST(RealData, WikiText2) {
  CODISTILL_NEEDS_DATA(directory, "wikitext2");
  const JobConfig job = ParseJob(R"pb(
    model { num_outputs: 13777 }
    data {
      train { text { files: "valid.txt" } }
      validation { text { files: "test.txt" vocabulary_files: "valid.txt" } }
      partition: SAME
    }
    groups { name: "a" }
    training { batch_size: 32 }
    evaluation { batch_size: 32 }
  )pb");
  const auto train = Create(job, directory, true), test = Create(job, directory, false);
  ASSERT_TRUE(train.ok()) << train.status();
  ASSERT_TRUE(test.ok()) << test.status();
  EXPECT_EQ((*train)->num_classes(), 13777);
  EXPECT_EQ((*train)->size(), 217645 / (32 * 32) * 32);
  EXPECT_EQ((*test)->size(), 245568 / (32 * 32) * 32);
  EXPECT_THAT((*train)->summary(), HasSubstr("217646 of the 217646 tokens"));
  EXPECT_THAT((*train)->summary(), HasSubstr(" 0 unknown words"));
  EXPECT_THAT((*test)->summary(), HasSubstr("245569 of the 245569 tokens"));
  // The validation set loses less than 32 lanes of 32 tokens.
  EXPECT_LT(245569 - (*test)->size() * 32, 1025);
  // " \n = Homarus gammarus = \n": <eos> is the last number, words count up.
  Batch batch;
  ASSERT_TRUE((*train)->Fill({{0, 0}}, &batch).ok());
  const auto tokens = batch.field("tokens")->As<int64_t>();
  EXPECT_THAT(std::vector<int64_t>(tokens.begin(), tokens.begin() + 7),
              ElementsAre(13776, 0, 1, 2, 0, 13776, 13776));
}

TEST(RealData, Cifar10) {
  CODISTILL_NEEDS_DATA(directory, "cifar10");
  JobConfig job = ParseJob(R"pb(
    model { num_outputs: 10 }
    data {
      train { image { files: "train.tar" } }
      validation { image { files: "test.tar" } }
    }
    groups { name: "a" }
    groups { name: "b" }
  )pb");
  const absl::Time start = absl::Now();
  const auto train = Create(job, directory, true), test = Create(job, directory, false);
  ASSERT_TRUE(train.ok()) << train.status();
  ASSERT_TRUE(test.ok()) << test.status();
  std::cout << "opened in " << absl::Now() - start << "\n";
  EXPECT_EQ((*train)->size(), 50000);
  EXPECT_EQ((*train)->num_classes(), 10);
  EXPECT_EQ((*test)->size(), 10000);

  // Every image of the test set decodes; classes are equally many, and ordered by name.
  const absl::Time decoding = absl::Now();
  const Batch batch = FillAll(**test);
  std::cout << (absl::Now() - decoding) / 10000 << " an image, " << 2 << " threads\n";
  const auto labels = batch.labels.As<int64_t>();
  for (int64_t i = 0; i < 10000; ++i) EXPECT_EQ(labels[i], i / 1000);
  const auto pixels = batch.field("image")->As<float>();
  double sum = 0;
  for (const float pixel : pixels) {
    ASSERT_GE(pixel, 0);
    ASSERT_LE(pixel, 1);
    sum += pixel;
  }
  EXPECT_NEAR(sum / static_cast<double>(pixels.size()), 0.4734, 0.01);  // CIFAR-10's mean

  // Both groups of a DISJOINT job see all classes equally often.
  for (int group = 0; group < 2; ++group) {
    std::vector<int> counts(10, 0);
    const ExampleOrder order = TrainingOrder(job, group, **train);
    for (const ExampleRef& ref : order.Range(0, order.epoch_size())) ++counts[ref.index / 5000];
    EXPECT_THAT(counts, testing::Each(2500));
  }
}

}  // namespace
}  // namespace codistill
