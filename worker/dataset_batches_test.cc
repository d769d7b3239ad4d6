#include "worker/dataset_batches.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

JobConfig Job() {
  JobConfig job;
  auto* input = job.mutable_model()->add_inputs();
  input->set_name("x");
  input->add_shape(6);
  job.mutable_model()->set_num_outputs(4);
  auto* synthetic = job.mutable_data()->mutable_train()->mutable_synthetic();
  synthetic->set_inputs(6);
  synthetic->add_hidden(5);
  synthetic->set_classes(4);
  synthetic->set_examples(40);
  job.add_groups()->set_name("alpha");
  job.add_groups()->set_name("beta");
  job.mutable_training()->set_batch_size(8);
  return job;
}

TEST(DatasetBatchesTest, ABatchIsAFunctionOfItsPlaceInTheStream) {
  const JobConfig job = Job();
  DatasetOptions options;
  options.job = &job;
  auto dataset = CreateDataset(options);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  const ExampleOrder order = TrainingOrder(job, 0, **dataset);
  DatasetBatches batches(job.model(), dataset->get(), order);
  auto first = batches.Build(24, 8);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->examples, 8);
  EXPECT_EQ(first->rows, 8);
  ASSERT_EQ(first->inputs.size(), 1u);
  EXPECT_THAT(first->inputs[0].shape(), ElementsAre(8, 6));
  EXPECT_THAT(first->labels.shape(), ElementsAre(8));
  EXPECT_TRUE(first->targets.empty());
  EXPECT_FALSE(first->starts_epoch);
  for (int64_t label : first->labels.As<int64_t>()) EXPECT_TRUE(label >= 0 && label < 4);

  // The same however it is come by, and part of a larger one.
  ASSERT_TRUE(batches.Build(0, 8).ok());
  auto again = batches.Build(20, 16);
  ASSERT_TRUE(again.ok());
  const auto part = again->inputs[0].As<float>().subspan(4 * 6, 8 * 6);
  EXPECT_EQ(first->inputs[0].As<float>(), part);
  EXPECT_EQ(first->example_ids.As<int64_t>(), again->example_ids.As<int64_t>().subspan(4, 8));
}

TEST(DatasetBatchesTest, TargetsAreNumbersWhereTheLossIsNoSoftmax) {
  JobConfig job = Job();
  job.mutable_model()->set_label_loss(SIGMOID_CROSS_ENTROPY);
  job.mutable_model()->set_num_outputs(1);
  job.mutable_data()->mutable_train()->mutable_synthetic()->set_classes(2);
  DatasetOptions options;
  options.job = &job;
  auto dataset = CreateDataset(options);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  DatasetBatches batches(job.model(), dataset->get(), TrainingOrder(job, 0, **dataset));
  auto batch = batches.Build(0, 8);
  ASSERT_TRUE(batch.ok()) << batch.status();
  EXPECT_TRUE(batch->labels.empty());
  EXPECT_EQ(batch->targets.As<float>().size(), 8u);
}

TEST(ToStudentBatchTest, InputsThatDoNotFitAreNamed) {
  const JobConfig job = Job();
  DatasetOptions options;
  options.job = &job;
  auto dataset = CreateDataset(options);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  Batch batch;
  const std::vector<ExampleRef> refs = {{0, 0}, {3, 0}};
  ASSERT_TRUE((*dataset)->Fill(refs, &batch).ok());

  ModelConfig other = job.model();
  other.mutable_inputs(0)->set_name("image");
  EXPECT_THAT(ToStudentBatch(other, batch).status().ToString(), HasSubstr("no field \"image\""));
  other = job.model();
  other.mutable_inputs(0)->set_shape(0, 7);
  EXPECT_THAT(ToStudentBatch(other, batch).status().ToString(), HasSubstr("x"));
  EXPECT_TRUE(ToStudentBatch(job.model(), std::move(batch)).ok());
}

}  // namespace
}  // namespace codistill
