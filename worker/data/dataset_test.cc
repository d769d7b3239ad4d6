// CreateDataset as a worker sees it, on small files: synthetic data and images. CSV and text have
// files of their own.

#include "worker/data/dataset.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/data/test_files.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<std::unique_ptr<Dataset>> Create(const JobConfig& job, bool training = true,
                                                int group = 0) {
  DatasetOptions options;
  options.job = &job;
  options.training = training;
  options.group = group;
  options.data_dir = TestDir();
  options.threads = 2;
  return CreateDataset(options);
}

Batch Fill(const Dataset& dataset, const std::vector<ExampleRef>& refs) {
  Batch batch;
  const absl::Status status = dataset.Fill(refs, &batch);
  EXPECT_TRUE(status.ok()) << status;
  return batch;
}

std::vector<ExampleRef> All(const Dataset& dataset) {
  std::vector<ExampleRef> refs;
  for (int64_t i = 0; i < dataset.size(); ++i) refs.push_back({i, 0});
  return refs;
}

template <typename T>
std::vector<T> Values(const Tensor& tensor) {
  const auto span = tensor.As<T>();
  return std::vector<T>(span.begin(), span.end());
}

JobConfig SyntheticJob() {
  return ParseJob(R"pb(
    model { num_outputs: 20 }
    data {
      train { synthetic { hidden: 64 hidden: 64 examples: 2000 } }
      validation { synthetic { hidden: 64 hidden: 64 examples: 500 stream: 1 } }
    }
    groups { name: "a" }
    groups { name: "b" }
  )pb");
}

TEST(Synthetic, GivesStandardNormalInputsAndAllClasses) {
  const JobConfig job = SyntheticJob();
  const auto dataset = Create(job);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  EXPECT_EQ((*dataset)->size(), 2000);
  EXPECT_EQ((*dataset)->num_classes(), 20);
  EXPECT_FALSE((*dataset)->sequential());
  const Batch batch = Fill(**dataset, All(**dataset));
  ASSERT_EQ(batch.fields.size(), 1u);
  const Tensor* x = batch.field("x");
  ASSERT_NE(x, nullptr);
  EXPECT_EQ(batch.field("y"), nullptr);
  EXPECT_THAT(x->shape(), ElementsAre(2000, 32));
  EXPECT_THAT(batch.labels.shape(), ElementsAre(2000));
  EXPECT_EQ(batch.examples, 2000);
  EXPECT_EQ(batch.rows, 2000);
  EXPECT_FALSE(batch.reset_state);

  double sum = 0, squares = 0;
  for (const float value : Values<float>(*x)) {
    sum += value;
    squares += value * value;
  }
  const double n = 2000 * 32;
  EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(squares / n, 1, 10 / std::sqrt(n));
  std::map<int64_t, int> counts;
  for (const int64_t label : Values<int64_t>(batch.labels)) ++counts[label];
  EXPECT_EQ(counts.begin()->first, 0);
  EXPECT_EQ(counts.rbegin()->first, 19);
  const std::vector<int64_t> ids = Values<int64_t>(batch.example_ids);
  EXPECT_EQ(std::set<int64_t>(ids.begin(), ids.end()).size(), 2000u);
}

TEST(Synthetic, IsTheSameInEveryProcessAndGroup) {
  const JobConfig job = SyntheticJob();
  const auto a = Create(job), b = Create(job, true, 1);
  ASSERT_TRUE(a.ok() && b.ok());
  const Batch first = Fill(**a, {{7, 0}, {1999, 3}});
  const Batch second = Fill(**b, {{1999, 1}, {7, 9}});
  const std::vector<float> x = Values<float>(*first.field("x"));
  const std::vector<float> y = Values<float>(*second.field("x"));
  EXPECT_TRUE(std::equal(x.begin(), x.begin() + 32, y.begin() + 32));
  EXPECT_TRUE(std::equal(x.begin() + 32, x.end(), y.begin()));
  EXPECT_EQ(Values<int64_t>(first.labels)[0], Values<int64_t>(second.labels)[1]);
  EXPECT_EQ(Values<int64_t>(first.example_ids)[0], Values<int64_t>(second.example_ids)[1]);
}

// Values of an independent implementation of the same functions: a resumed job must see the same
// task.
TEST(Synthetic, DoesNotChange) {
  const JobConfig job = ParseJob(R"pb(
    model { num_outputs: 20 }
    data { train { synthetic { hidden: 128 hidden: 128 examples: 40000 label_noise: 0.1 } } }
    groups { name: "a" }
  )pb");
  const auto dataset = Create(job);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  std::vector<ExampleRef> refs = {{39999, 0}};
  for (int64_t i = 0; i < 12; ++i) refs.push_back({i, 0});
  const Batch batch = Fill(**dataset, refs);
  const std::vector<float> x = Values<float>(*batch.field("x"));
  EXPECT_NEAR(x[0], -0.48454514, 1e-6);
  EXPECT_NEAR(x[1], -0.25453472, 1e-6);
  EXPECT_NEAR(x[32], 1.3181151, 1e-6);
  EXPECT_NEAR(x[35], -0.8361841, 1e-6);
  const std::vector<int64_t> labels = Values<int64_t>(batch.labels);
  EXPECT_EQ(std::vector<int64_t>(labels.begin() + 1, labels.end()),
            (std::vector<int64_t>{14, 7, 17, 7, 12, 14, 13, 12, 10, 2, 19, 7}));
}

TEST(Synthetic, StreamsShareTheLabellingNetworkButNoExample) {
  JobConfig job = SyntheticJob();
  // A labelling network that one input decides: then both streams can be checked against it.
  for (DatasetConfig* data :
       {job.mutable_data()->mutable_train(), job.mutable_data()->mutable_validation()}) {
    data->mutable_synthetic()->clear_hidden();
    data->mutable_synthetic()->set_inputs(1);
    data->mutable_synthetic()->set_classes(2);
  }
  job.mutable_model()->set_num_outputs(2);
  const auto train = Create(job), validation = Create(job, false);
  ASSERT_TRUE(train.ok() && validation.ok());
  const Batch a = Fill(**train, All(**train)), b = Fill(**validation, All(**validation));
  const std::vector<float> xs = Values<float>(*a.field("x")), ys = Values<float>(*b.field("x"));
  const std::vector<int64_t> labels = Values<int64_t>(a.labels), others = Values<int64_t>(b.labels);
  const int64_t positive =
      labels[std::find_if(xs.begin(), xs.end(), [](float v) { return v > 0; }) - xs.begin()];
  for (size_t i = 0; i < xs.size(); ++i) EXPECT_EQ(labels[i] == positive, xs[i] > 0);
  for (size_t i = 0; i < ys.size(); ++i) EXPECT_EQ(others[i] == positive, ys[i] > 0);
  std::set<float> seen(xs.begin(), xs.end());
  for (const float y : ys) EXPECT_EQ(seen.count(y), 0u);
}

TEST(Synthetic, NoiseAndSamplingChangeLabelsOnly) {
  JobConfig job = SyntheticJob();
  const auto clean = Create(job);
  SyntheticConfig* config = job.mutable_data()->mutable_train()->mutable_synthetic();
  config->set_label_noise(0.5f);
  const auto noisy = Create(job);
  config->set_label_noise(0);
  config->set_sample_labels(true);
  const auto sampled = Create(job);
  config->set_logit_scale(1000);
  const auto cold = Create(job);
  ASSERT_TRUE(clean.ok() && noisy.ok() && sampled.ok() && cold.ok());
  const Batch base = Fill(**clean, All(**clean));
  const auto changed = [&base](const Dataset& dataset) {
    const Batch batch = Fill(dataset, All(dataset));
    EXPECT_EQ(Values<float>(*base.field("x")), Values<float>(*batch.field("x")));
    const std::vector<int64_t> a = Values<int64_t>(base.labels), b = Values<int64_t>(batch.labels);
    int count = 0;
    for (size_t i = 0; i < a.size(); ++i) count += a[i] != b[i];
    return count / static_cast<double>(a.size());
  };
  EXPECT_NEAR(changed(**noisy), 0.5 * 0.95, 0.05);
  EXPECT_GT(changed(**sampled), 0.5);  // logits of small size leave much to chance
  EXPECT_LT(changed(**cold), 0.05);    // and large ones nearly nothing
}

TEST(Synthetic, GivesFloatTargetsToASigmoid) {
  JobConfig job = SyntheticJob();
  job.mutable_data()->mutable_train()->mutable_synthetic()->set_classes(2);
  job.mutable_model()->set_label_loss(SIGMOID_CROSS_ENTROPY);
  job.mutable_model()->set_num_outputs(1);
  const auto dataset = Create(job);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  const Batch batch = Fill(**dataset, All(**dataset));
  EXPECT_EQ(batch.labels.dtype(), DT_FLOAT);
  std::set<float> labels;
  for (const float label : Values<float>(batch.labels)) labels.insert(label);
  EXPECT_THAT(labels, ElementsAre(0, 1));
}

TEST(CreateDataset, HoldsTheDataAgainstTheJob) {
  JobConfig job = SyntheticJob();
  job.mutable_model()->set_num_outputs(10);
  EXPECT_THAT(std::string(Create(job).status().message()),
              HasSubstr("model.num_outputs: 10 with label_loss SOFTMAX_CROSS_ENTROPY needs 10 "
                        "classes, but data.train has 20"));
  job = SyntheticJob();
  job.mutable_data()->mutable_train()->mutable_synthetic()->set_examples(1);
  EXPECT_THAT(std::string(Create(job).status().message()),
              HasSubstr("data.train: only 1 examples; at least 2 would be right"));
  job.mutable_data()->set_partition(SAME);
  EXPECT_TRUE(Create(job).ok());
  job.mutable_data()->clear_validation();
  EXPECT_THAT(std::string(Create(job, false).status().message()),
              HasSubstr("data.validation: no source"));
}

TEST(TrainingOrder, FollowsTheJob) {
  JobConfig job = SyntheticJob();
  const auto dataset = Create(job);
  ASSERT_TRUE(dataset.ok());
  EXPECT_EQ(TrainingOrder(job, 1, **dataset).epoch_size(), 1000);
  EXPECT_EQ(TrainingOrder(job, 1, **dataset).At(0).index % 2, 1);
  job.mutable_data()->set_partition(SAME);
  const ExampleOrder order = TrainingOrder(job, 1, **dataset);
  EXPECT_EQ(order.epoch_size(), 2000);
  job.set_seed(2);
  EXPECT_NE(TrainingOrder(job, 1, **dataset).Range(0, 10), order.Range(0, 10));
}

TEST(EvaluationExamples, AreAllOrAFixedSample) {
  const JobConfig job = SyntheticJob();
  const auto dataset = Create(job, false);
  ASSERT_TRUE(dataset.ok());
  const std::vector<ExampleRef> all = EvaluationExamples(**dataset, 500, 100, 500);
  ASSERT_EQ(all.size(), 400u);
  EXPECT_EQ(all[0], (ExampleRef{100, 0}));
  EXPECT_EQ(all[399], (ExampleRef{499, 0}));

  std::vector<ExampleRef> sample = EvaluationExamples(**dataset, 100, 0, 60);
  const std::vector<ExampleRef> rest = EvaluationExamples(**dataset, 100, 60, 100);
  sample.insert(sample.end(), rest.begin(), rest.end());
  EXPECT_EQ(sample, EvaluationExamples(**dataset, 100, 0, 100));
  std::set<int64_t> indices;
  int first_half = 0;
  for (const ExampleRef& ref : sample) {
    indices.insert(ref.index);
    first_half += ref.index < 250;
  }
  EXPECT_EQ(indices.size(), 100u);
  EXPECT_LT(*indices.rbegin(), 500);
  EXPECT_NEAR(first_half, 50, 20);  // from all over the set
}

// ------------------------------------------------------------------------------------ images

JobConfig ImageJob(const std::string& train, const std::string& validation = "") {
  JobConfig job = ParseJob(R"pb(
    model { num_outputs: 2 }
    data { train { image { height: 4 width: 4 } } }
    groups { name: "a" }
    groups { name: "b" }
  )pb");
  *job.mutable_data()->mutable_validation() = job.data().train();
  job.mutable_data()->mutable_train()->mutable_image()->add_files(train);
  job.mutable_data()->mutable_validation()->mutable_image()->add_files(
      validation.empty() ? train : validation);
  return job;
}

std::string RedPng() {
  std::string pixels;
  for (int i = 0; i < 16; ++i) pixels += std::string("\xff\x00\x00", 3);
  return Png(4, 4, pixels);
}

TEST(Images, OfATarFile) {
  WriteTestFile("images.tar", TarBuilder()
                                  .AddDirectory("train/")
                                  .AddDirectory("train/dog/")
                                  .Add("train/dog/1.jpg", Jpeg(4, 4, 0, 255, 0))
                                  .Add("./train/cat/1.PNG", RedPng())
                                  .Add("train/cat/._1.png", "resource fork")
                                  .Add("train/README", "no image")
                                  .Add("train/dog/2.jpeg", Jpeg(9, 7, 0, 0, 255))
                                  .Finish());
  const JobConfig job = ImageJob("images.tar");
  const auto dataset = Create(job);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  EXPECT_EQ((*dataset)->size(), 3);
  EXPECT_EQ((*dataset)->num_classes(), 2);
  const Batch batch = Fill(**dataset, {{2, 0}, {0, 0}, {1, 0}});
  EXPECT_THAT(batch.field("image")->shape(), ElementsAre(3, 3, 4, 4));
  EXPECT_THAT(Values<int64_t>(batch.labels), ElementsAre(1, 1, 0));  // cat, dog
  const std::vector<float> planes = Values<float>(*batch.field("image"));
  for (int example = 0; example < 3; ++example) {
    for (int channel = 0; channel < 3; ++channel) {
      // Blue, green, red.
      const float expected = channel == 2 - example ? 1 : 0;
      for (int i = 0; i < 16; ++i) {
        EXPECT_NEAR(planes[(example * 3 + channel) * 16 + i], expected, 0.02);
      }
    }
  }
}

TEST(Images, OfAFolder) {
  WriteTestFile("folder/cat/b.png", RedPng());
  WriteTestFile("folder/cat/a.jpg", Jpeg(4, 4, 0, 255, 0));
  WriteTestFile("folder/dog/c.jpg", Jpeg(4, 4, 0, 0, 255));
  WriteTestFile("folder/notes.txt", "no image");
  const JobConfig job = ImageJob("folder");
  const auto dataset = Create(job);
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  const Batch batch = Fill(**dataset, All(**dataset));
  EXPECT_THAT(Values<int64_t>(batch.labels), ElementsAre(0, 0, 1));
  const std::vector<float> planes = Values<float>(*batch.field("image"));
  EXPECT_NEAR(planes[0 * 48 + 16], 1, 0.02);  // a.jpg comes first, and is green
  EXPECT_NEAR(planes[1 * 48], 1, 0.02);
}

TEST(Images, WhatWasDecodedIsKeptAsFarAsThereIsRoom) {
  const JobConfig job = ImageJob("kept");
  const std::vector<std::string> files = {"kept/cat/a.png", "kept/cat/b.png", "kept/dog/c.png"};
  // All, none, and as much as one takes: 48 bytes and what it costs to know of it.
  for (const int64_t room : {int64_t{1} << 20, int64_t{0}, int64_t{150}}) {
    SCOPED_TRACE(room);
    for (const std::string& file : files) WriteTestFile(file, RedPng());
    DatasetOptions options;
    options.job = &job;
    options.data_dir = TestDir();
    options.decoded_image_bytes = room;
    const auto dataset = CreateDataset(options);
    ASSERT_TRUE(dataset.ok()) << dataset.status();
    const std::vector<float> first = Values<float>(*Fill(**dataset, All(**dataset)).field("image"));
    EXPECT_EQ(Values<float>(*Fill(**dataset, All(**dataset)).field("image")), first);
    // From now on they can only come from memory.
    for (const std::string& file : files) WriteTestFile(file, "no image");
    int kept = 0;
    for (int64_t i = 0; i < 3; ++i) {
      Batch batch;
      const absl::Status status = (*dataset)->Fill({{i, 1}}, &batch);
      kept += status.ok() ? 1 : 0;
      if (!status.ok()) {
        EXPECT_THAT(std::string(status.message()), HasSubstr(files[i]));
      }
    }
    EXPECT_EQ(kept, room > 1000 ? 3 : room > 0 ? 1 : 0);
  }
}

TEST(Images, ClassesAreThoseOfTheTrainingSet) {
  WriteTestFile("t/cat/a.jpg", Jpeg(4, 4, 0, 0, 0));
  WriteTestFile("t/dog/a.jpg", Jpeg(4, 4, 0, 0, 0));
  WriteTestFile("v/dog/a.jpg", Jpeg(4, 4, 0, 0, 0));
  const auto validation = Create(ImageJob("t", "v"), false);
  ASSERT_TRUE(validation.ok()) << validation.status();
  EXPECT_THAT(Values<int64_t>(Fill(**validation, {{0, 0}}).labels), ElementsAre(1));
  WriteTestFile("w/cow/a.jpg", Jpeg(4, 4, 0, 0, 0));
  EXPECT_THAT(std::string(Create(ImageJob("t", "w"), false).status().message()),
              HasSubstr("w/cow/a.jpg: class cow is not among those of data.train: cat, dog"));
}

TEST(Images, AugmentationIsSeededByGroupEpochAndExample) {
  // A gradient, so that every crop and flip differs.
  std::string pixels;
  for (int i = 0; i < 16; ++i) pixels += std::string(3, static_cast<char>(10 * i + 5));
  TarBuilder builder;
  for (int i = 0; i < 8; ++i) builder.Add("cat/" + std::to_string(i) + ".png", Png(4, 4, pixels));
  builder.Add("dog/x.png", Png(4, 4, pixels));
  WriteTestFile("gradient.tar", builder.Finish());
  JobConfig job = ImageJob("gradient.tar");
  const auto plain = Create(job);
  job.mutable_data()->mutable_train()->mutable_image()->set_random_flip(true);
  job.mutable_data()->mutable_train()->mutable_image()->set_random_crop_padding(2);
  const auto a = Create(job), again = Create(job), b = Create(job, true, 1);
  ASSERT_TRUE(plain.ok() && a.ok() && again.ok() && b.ok());

  std::vector<ExampleRef> refs;
  for (int64_t epoch = 0; epoch < 4; ++epoch) {
    for (int64_t i = 0; i < 8; ++i) refs.push_back({i, epoch});
  }
  const auto images = [](const Batch& batch) {
    const std::vector<float> planes = Values<float>(*batch.field("image"));
    std::vector<std::vector<float>> result;
    for (int64_t i = 0; i < batch.examples; ++i) {
      result.emplace_back(planes.begin() + i * 48, planes.begin() + (i + 1) * 48);
    }
    return result;
  };
  const Batch base = Fill(**plain, refs), first = Fill(**a, refs), other = Fill(**b, refs);
  EXPECT_EQ(images(first), images(Fill(**again, refs)));
  EXPECT_NE(images(first), images(other));
  const auto distinct = [&images](const Batch& batch) {
    const auto all = images(batch);
    return std::set<std::vector<float>>(all.begin(), all.end()).size();
  };
  EXPECT_EQ(distinct(base), 1u);
  EXPECT_GT(distinct(first), 15u);  // of 32 draws out of 2 x 5 x 5

  // Ids are those of what the model is shown.
  const auto distinct_ids = [](const Batch& batch) {
    const std::vector<int64_t> ids = Values<int64_t>(batch.example_ids);
    return std::set<int64_t>(ids.begin(), ids.end()).size();
  };
  EXPECT_EQ(distinct_ids(base), 8u);
  EXPECT_EQ(distinct_ids(first), 32u);
  EXPECT_NE(Values<int64_t>(first.example_ids), Values<int64_t>(other.example_ids));
}

TEST(Images, NamesADamagedImage) {
  std::string damaged = Jpeg(64, 64, 9, 9, 9);
  damaged.resize(damaged.size() / 2);
  TarBuilder builder;
  builder.Add("dog/0.jpg", Jpeg(4, 4, 0, 0, 0));
  for (int i = 0; i < 40; ++i) builder.Add("cat/good.jpg", Jpeg(4, 4, 0, 0, 0));
  builder.Add("cat/bad.jpg", damaged).Add("cat/worse.jpg", "nothing");
  WriteTestFile("damaged.tar", builder.Finish());
  const auto dataset = Create(ImageJob("damaged.tar"));
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  Batch batch;
  const absl::Status status = (*dataset)->Fill(All(**dataset), &batch);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("damaged.tar: cat/bad.jpg: damaged JPEG"));
  EXPECT_TRUE((*dataset)->Fill({{0, 0}, {1, 0}}, &batch).ok());
}

TEST(Images, NamesWhatIsWrongWithTheFiles) {
  const std::string whole =
      TarBuilder().Add("cat/a.jpg", Jpeg(4, 4, 0, 0, 0)).Add("dog/b.jpg", "x").Finish();
  WriteTestFile("short.tar", whole.substr(0, 800));
  absl::Status status = Create(ImageJob("short.tar")).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("short.tar: at byte"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("cat/a.jpg"));

  status = Create(ImageJob("absent.tar")).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("data.train.image.files[0]: no file " + TestDir() +
                        "/absent.tar (absent.tar, relative to --data_dir " + TestDir() + ")"));

  WriteTestFile("flat.tar", TarBuilder().Add("a.jpg", "x").Finish());
  EXPECT_THAT(std::string(Create(ImageJob("flat.tar")).status().message()),
              HasSubstr("flat.tar: image a.jpg is in no class"));
  WriteTestFile("empty.tar", TarBuilder().Add("cat/a.txt", "x").Finish());
  EXPECT_THAT(std::string(Create(ImageJob("empty.tar")).status().message()),
              HasSubstr("empty.tar: no images in it"));
}

}  // namespace
}  // namespace codistill
