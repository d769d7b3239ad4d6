// CreateDataset on text, and the vocabulary.

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/data/dataset.h"
#include "worker/data/test_files.h"
#include "worker/data/vocabulary.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(Vocabulary, NumbersWordsByAppearance) {
  const std::string path = WriteTestFile("v.txt", " = the =\n\nthe\tcat  <unk> \r\ncaf\xc3\xa9");
  const auto vocabulary = Vocabulary::Read({path}, "<unk>");
  ASSERT_TRUE(vocabulary.ok()) << vocabulary.status();
  EXPECT_EQ(vocabulary->size(), 6);  // = the cat <unk> café <eos>
  std::vector<int32_t> tokens;
  int64_t unknown = 0;
  ASSERT_TRUE(vocabulary->Tokenize(path, &tokens, &unknown).ok());
  EXPECT_THAT(tokens, ElementsAre(0, 1, 0, 5, 5, 1, 2, 3, 5, 4, 5));
  EXPECT_EQ(unknown, 0);
  tokens.clear();
  ASSERT_TRUE(vocabulary->Tokenize(WriteTestFile("w.txt", "the dog\n"), &tokens, &unknown).ok());
  EXPECT_THAT(tokens, ElementsAre(1, 3, 5));
  EXPECT_EQ(unknown, 1);
}

TEST(Vocabulary, NamesAnUnknownWordWithoutASubstitute) {
  const auto vocabulary = Vocabulary::Read({WriteTestFile("v.txt", "a b\n")}, "<unk>");
  ASSERT_TRUE(vocabulary.ok());
  std::vector<int32_t> tokens;
  int64_t unknown = 0;
  const absl::Status status =
      vocabulary->Tokenize(WriteTestFile("w.txt", "a\nb c\n"), &tokens, &unknown);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("w.txt:2: \"c\" is not in the vocabulary, nor is <unk>"));
}

// Text whose token at position i is i: one line of so many words, all different.
std::string Counting(int words) {
  std::string text;
  for (int i = 0; i + 1 < words; ++i) absl::StrAppend(&text, "w", i, " ");
  return text + "\n";
}

JobConfig Job(int64_t num_outputs, int64_t batch_size, Partition partition) {
  JobConfig job = ParseJob(R"pb(
    data {
      train { text { files: "train.txt" unroll: 3 } }
      validation { text { files: "test.txt" vocabulary_files: "train.txt" unroll: 3 } }
    }
    groups { name: "a" }
    groups { name: "b" num_workers: 2 }
    evaluation { batch_size: 2 }
  )pb");
  job.mutable_model()->set_num_outputs(num_outputs);
  job.mutable_training()->set_batch_size(batch_size);
  job.mutable_data()->set_partition(partition);
  return job;
}

absl::StatusOr<std::unique_ptr<Dataset>> Create(const JobConfig& job, bool training = true,
                                                int group = 0) {
  DatasetOptions options;
  options.job = &job;
  options.training = training;
  options.group = group;
  options.data_dir = TestDir();
  return CreateDataset(options);
}

std::vector<int64_t> Values(const Tensor& tensor) {
  const auto span = tensor.As<int64_t>();
  return std::vector<int64_t>(span.begin(), span.end());
}

TEST(Text, LaysLanesOut) {
  WriteTestFile("train.txt", Counting(30));
  const JobConfig job = Job(30, 4, SAME);
  const auto dataset = Create(job);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  // 29 labels over 4 lanes of segments of 3: 2 segments, 5 tokens left over.
  EXPECT_EQ((*dataset)->lanes(), 4);
  EXPECT_EQ((*dataset)->size(), 8);
  EXPECT_EQ((*dataset)->labels_per_example(), 3);
  EXPECT_EQ((*dataset)->num_classes(), 30);
  EXPECT_THAT((*dataset)->summary(),
              HasSubstr("30 of the 30 tokens of " + TestDir() +
                        "/train.txt; vocabulary 30, 0 unknown words; 4 lanes of 6 tokens, 5 left "
                        "over at the end"));
  const ExampleOrder order = TrainingOrder(job, 0, **dataset);
  EXPECT_EQ(order.epoch_size(), 8);

  Batch batch;
  ASSERT_TRUE((*dataset)->Fill(order.Range(0, 4), &batch).ok());
  EXPECT_THAT(batch.field("tokens")->shape(), ElementsAre(4, 3));
  EXPECT_THAT(Values(*batch.field("tokens")),
              ElementsAre(0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20));
  EXPECT_THAT(batch.labels.shape(), ElementsAre(4, 3));
  EXPECT_THAT(Values(batch.labels), ElementsAre(1, 2, 3, 7, 8, 9, 13, 14, 15, 19, 20, 21));
  EXPECT_EQ(batch.examples, 4);
  EXPECT_EQ(batch.rows, 12);
  EXPECT_TRUE(batch.reset_state);

  // The next batch goes on in every lane; the one after begins the second epoch.
  ASSERT_TRUE((*dataset)->Fill(order.Range(4, 4), &batch).ok());
  EXPECT_THAT(Values(*batch.field("tokens")),
              ElementsAre(3, 4, 5, 9, 10, 11, 15, 16, 17, 21, 22, 23));
  EXPECT_FALSE(batch.reset_state);
  ASSERT_TRUE((*dataset)->Fill(order.Range(8, 4), &batch).ok());
  EXPECT_THAT(Values(*batch.field("tokens")),
              ElementsAre(0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20));
  EXPECT_TRUE(batch.reset_state);
}

TEST(Text, WorkersTakeLanesOfTheirOwn) {
  WriteTestFile("train.txt", Counting(30));
  const JobConfig job = Job(30, 2, SAME);  // group b has two workers of two lanes
  const auto dataset = Create(job, true, 1);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  EXPECT_EQ((*dataset)->lanes(), 4);
  const ExampleOrder order = TrainingOrder(job, 1, **dataset);
  Batch batch;
  // The second worker's part of the first two steps.
  ASSERT_TRUE((*dataset)->Fill(order.Range(2, 2), &batch).ok());
  EXPECT_THAT(Values(*batch.field("tokens")), ElementsAre(12, 13, 14, 18, 19, 20));
  ASSERT_TRUE((*dataset)->Fill(order.Range(6, 2), &batch).ok());
  EXPECT_THAT(Values(*batch.field("tokens")), ElementsAre(15, 16, 17, 21, 22, 23));
}

TEST(Text, DisjointGroupsGetContiguousParts) {
  WriteTestFile("train.txt", Counting(40));
  const JobConfig job = Job(40, 1, DISJOINT);
  const auto a = Create(job, true, 0), b = Create(job, true, 1);
  ASSERT_TRUE(a.ok() && b.ok());
  Batch batch;
  const auto tokens = [&batch](const Dataset& dataset) {
    std::vector<ExampleRef> refs;
    for (int64_t i = 0; i < dataset.size(); ++i) refs.push_back({i, 0});
    EXPECT_TRUE(dataset.Fill(refs, &batch).ok());
    const std::vector<int64_t> inputs = Values(*batch.field("tokens"));
    const std::vector<int64_t> labels = Values(batch.labels);
    std::set<int64_t> result(inputs.begin(), inputs.end());
    result.insert(labels.begin(), labels.end());
    return result;
  };
  const std::set<int64_t> first = tokens(**a), second = tokens(**b);
  EXPECT_EQ(*first.begin(), 0);
  EXPECT_EQ(*first.rbegin(), 18);  // one lane: (20 - 1) / 3 segments of 3, and the last label
  EXPECT_EQ(*second.begin(), 20);
  EXPECT_EQ(*second.rbegin(), 38);
}

TEST(Text, ValidationHasTheLanesOfTheEvaluation) {
  WriteTestFile("train.txt", "w0 w1 w2 <unk>\n");
  WriteTestFile("test.txt", "w0 w1 x w2\nw0 w1 w2 y\nw0 w1 w2\n");
  const JobConfig job = Job(5, 100, SAME);
  const auto dataset = Create(job, false);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  EXPECT_EQ((*dataset)->lanes(), 2);
  EXPECT_EQ((*dataset)->size(), 4);  // 14 tokens
  EXPECT_THAT((*dataset)->summary(),
              HasSubstr("2 unknown words; 2 lanes of 6 tokens, 1 left over"));
  Batch batch;
  ASSERT_TRUE((*dataset)->Fill({{0, 0}, {2, 0}}, &batch).ok());
  EXPECT_THAT(Values(*batch.field("tokens")), ElementsAre(0, 1, 3, 2, 4, 0));
}

TEST(Text, IdsNameThePlaceInTheText) {
  WriteTestFile("train.txt", Counting(60));
  const JobConfig same = Job(60, 2, SAME);
  const auto a = Create(same, true, 0), b = Create(same, true, 1);
  ASSERT_TRUE(a.ok() && b.ok());
  Batch first, second;
  // Lane 0 starts at the beginning of the text for both; lane 1 does not, as they have 2 and 4
  // lanes.
  ASSERT_TRUE((*a)->Fill({{0, 0}, {1, 0}}, &first).ok());
  ASSERT_TRUE((*b)->Fill({{0, 5}, {1, 5}}, &second).ok());
  EXPECT_EQ(Values(first.example_ids)[0], Values(second.example_ids)[0]);
  EXPECT_NE(Values(first.example_ids)[1], Values(second.example_ids)[1]);
  EXPECT_NE(Values(first.example_ids)[0], Values(first.example_ids)[1]);
}

TEST(Text, RefusesWhatDoesNotFit) {
  WriteTestFile("train.txt", Counting(12));
  EXPECT_THAT(std::string(Create(Job(12, 4, SAME)).status().message()),
              HasSubstr("data.train.text.files: only 12 tokens for this group; at least 13, for 4 "
                        "lanes (workers x training.batch_size) of 3 tokens and one more"));
  EXPECT_THAT(std::string(Create(Job(100, 1, SAME)).status().message()),
              HasSubstr("model.num_outputs: 100 with label_loss SOFTMAX_CROSS_ENTROPY needs 100 "
                        "classes, but data.train has 12"));
  JobConfig job = Job(12, 1, SAME);
  job.mutable_data()->mutable_train()->mutable_text()->set_files(0, "gone.txt");
  EXPECT_EQ(Create(job).status().code(), absl::StatusCode::kNotFound);
  WriteTestFile("train.txt", "");
  EXPECT_THAT(std::string(Create(Job(12, 4, SAME)).status().message()), HasSubstr("only 0 tokens"));
}

}  // namespace
}  // namespace codistill
