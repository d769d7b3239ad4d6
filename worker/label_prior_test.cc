#include "worker/label_prior.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/data/test_files.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::unique_ptr<Dataset> Read(const JobConfig& job, int group) {
  DatasetOptions options;
  options.job = &job;
  options.group = group;
  options.data_dir = TestDir();
  auto dataset = CreateDataset(options);
  EXPECT_TRUE(dataset.ok()) << dataset.status();
  return *std::move(dataset);
}

// Three classes in two groups' turns: alpha has examples 0, 2 and 4, beta 1, 3 and 5.
JobConfig CsvJob(const std::string& model) {
  WriteTestFile("labels.csv", "1,a\n2,b\n3,a\n4,c\n5,b\n6,c\n");
  return ParseJob(absl::StrCat("model { num_outputs: 3 ", model, R"pb(
    }
    groups { name: "alpha" }
    groups { name: "beta" }
    data {
      train {
        csv {
          files: "labels.csv"
          columns { name: "x" kind: NUMERIC }
          columns {
            name: "y"
            kind: LABEL
            label_values { text: "a" }
            label_values { text: "b" }
            label_values { text: "c" }
          }
        }
      }
    })pb"));
}

TEST(LabelPriorTest, IsTheFrequencyOfTheGroupsLabels) {
  const JobConfig job = CsvJob("label_smoothing: 0.1 label_smoothing_prior: UNIGRAM");
  const auto alpha = LabelPriorOf(job, 0, *Read(job, 0));
  ASSERT_TRUE(alpha.ok()) << alpha.status();
  EXPECT_THAT(*alpha, ElementsAre(2.0f / 3, 1.0f / 3, 0));
  const auto beta = LabelPriorOf(job, 1, *Read(job, 1));
  ASSERT_TRUE(beta.ok()) << beta.status();
  EXPECT_THAT(*beta, ElementsAre(0, 1.0f / 3, 2.0f / 3));
}

TEST(LabelPriorTest, LeavesIgnoredLabelsOut) {
  JobConfig job = CsvJob("label_smoothing: 0.1 label_smoothing_prior: UNIGRAM ignored_label: 0");
  const auto prior = LabelPriorOf(job, 0, *Read(job, 0));
  ASSERT_TRUE(prior.ok()) << prior.status();
  EXPECT_THAT(*prior, ElementsAre(0, 1, 0));
  WriteTestFile("labels.csv", "1,a\n2,b\n3,a\n");
  const auto nothing = LabelPriorOf(job, 0, *Read(job, 0));
  EXPECT_EQ(nothing.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(nothing.status().message()),
              HasSubstr("model.ignored_label: 0 is every label of data.train"));
}

TEST(LabelPriorTest, IsEmptyUnlessAskedFor) {
  for (const std::string model : {"", "label_smoothing: 0.1", "label_smoothing_prior: UNIGRAM"}) {
    const JobConfig job = CsvJob(model);
    const auto prior = LabelPriorOf(job, 0, *Read(job, 0));
    ASSERT_TRUE(prior.ok()) << prior.status();
    EXPECT_THAT(*prior, IsEmpty());
  }
}

// What Fill gives, counted.
void ExpectCounts(const JobConfig& job, int group) {
  const std::unique_ptr<Dataset> dataset = Read(job, group);
  const ExampleOrder order = TrainingOrder(job, group, *dataset);
  Batch batch;
  ASSERT_TRUE(dataset->Fill(order.Range(0, order.epoch_size()), &batch).ok());
  std::vector<int64_t> expected(dataset->num_classes());
  for (int64_t label : batch.labels.As<int64_t>()) ++expected[label];
  EXPECT_EQ(TrainingLabelCounts(job, group, *dataset), expected);
}

TEST(TrainingLabelCountsTest, AreThoseOfTheBatches) {
  const JobConfig synthetic = ParseJob(R"pb(
    model { num_outputs: 20 }
    groups { name: "alpha" }
    groups { name: "beta" }
    data { train { synthetic { inputs: 8 classes: 20 examples: 9000 } } })pb");
  WriteTestFile("words.txt", "a b c a b d a b e a b c d e a a b a c a d a b e b a\n");
  const JobConfig text = ParseJob(R"pb(
    model { num_outputs: 6 }
    groups { name: "alpha" num_workers: 1 }
    groups { name: "beta" num_workers: 1 }
    training { batch_size: 2 }
    data { train { text { files: "words.txt" unroll: 2 } } })pb");
  for (int group : {0, 1}) {
    ExpectCounts(synthetic, group);
    ExpectCounts(text, group);
    ExpectCounts(CsvJob(""), group);
  }
}

}  // namespace
}  // namespace codistill
