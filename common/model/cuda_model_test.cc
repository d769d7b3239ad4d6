// A model on the first CUDA device against the same archive on the host. Needs a device and a
// program that is built for it; skips, saying what is missing.

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/model/model.h"
#include "common/model/test_archive.h"
#include "common/model/testing/same_predictions.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::HasSubstr;

struct Pass {
  std::map<int, std::vector<float>> gradients;
  std::vector<int> order;
  Model::States states;
};

class CudaModelTest : public testing::Test {
 protected:
  // Null, and the test is to be left, where there is no device.
  std::unique_ptr<Model> Load(const TestedArchive& archive, const std::string& device,
                              int weight_sets = 1, Precision precision = FP32) {
    Model::Options options;
    options.archive = archive.path;
    options.config = archive.config;
    options.device = device;
    options.weight_sets = weight_sets;
    options.precision = precision;
    options.predict_precision = precision;
    auto model = Model::Load(options);
    if (absl::IsFailedPrecondition(model.status())) {
      missing_ = std::string(model.status().message());
      return nullptr;
    }
    EXPECT_TRUE(model.ok()) << model.status();
    return model.ok() ? *std::move(model) : nullptr;
  }

  static Pass Train(Model* model, absl::Span<const Tensor> inputs, const Model::States& states) {
    Pass pass;
    pass.states = states;
    const auto logits = model->Forward(inputs, states.empty() ? nullptr : &pass.states, 3);
    EXPECT_TRUE(logits.ok()) << logits.status();
    if (!logits.ok()) return pass;
    EXPECT_EQ(logits->values.device(), model->device());
    const absl::Status status =
        model->Backward(RandomGradient(logits->values, 99),
                        [&](int index, const float* data, std::shared_ptr<const void>) {
                          const int64_t n = model->storage()[index].elements();
                          pass.gradients[index] = std::vector<float>(data, data + n);
                          pass.order.push_back(index);
                        });
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_TRUE(model->AwaitBuffers().ok());
    return pass;
  }

  static void ExpectNearVectors(const float* got, const float* want, size_t n, double tolerance,
                                const std::string& what) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; ++i) {
      difference += std::pow(static_cast<double>(got[i]) - want[i], 2);
      norm += std::pow(static_cast<double>(want[i]), 2);
    }
    EXPECT_LE(std::sqrt(difference), tolerance * std::sqrt(norm) + 1e-6) << what;
  }

  // Passes of both, one after another, agree: gradients, buffers, states.
  static void ExpectSamePasses(Model* got, Model* want, absl::Span<const Tensor> inputs,
                               Model::States states, double tolerance) {
    for (int round = 0; round < 3; ++round) {
      got->Stage(inputs);
      const Pass mine = Train(got, inputs, states);
      const Pass theirs = Train(want, inputs, states);
      ASSERT_EQ(mine.gradients.size(), theirs.gradients.size());
      EXPECT_EQ(mine.order.size(), mine.gradients.size());
      for (const auto& [index, gradient] : theirs.gradients) {
        ExpectNearVectors(mine.gradients.at(index).data(), gradient.data(), gradient.size(),
                          tolerance, got->tensors().tensors(index).name());
      }
      for (int i = 0; i < got->tensors().tensors_size(); ++i) {
        const TensorSpec& spec = got->tensors().tensors(i);
        if (spec.role() != TensorSpec::BUFFER || spec.dtype() != DT_FLOAT) continue;
        ExpectNearVectors(static_cast<const float*>(got->storage()[i].data),
                          static_cast<const float*>(want->storage()[i].data),
                          static_cast<size_t>(got->storage()[i].elements()), tolerance,
                          spec.name());
      }
      ASSERT_EQ(mine.states.size(), theirs.states.size());
      for (size_t i = 0; i < mine.states.size(); ++i) {
        EXPECT_EQ(mine.states[i].device(), kHostDevice);
        ExpectNearVectors(mine.states[i].As<float>().data(), theirs.states[i].As<float>().data(),
                          theirs.states[i].As<float>().size(), tolerance, "state");
      }
      states = theirs.states;
    }
  }

  std::string missing_;
};

#define CODISTILL_NEEDS_DEVICE(model) \
  if ((model) == nullptr && !missing_.empty()) GTEST_SKIP() << missing_

TEST_F(CudaModelTest, TrainsAConvolutionalNetworkAsTheHostDoes) {
  const TestedArchive archive = ResNetForTest();
  const auto device = Load(archive, "cuda:0");
  CODISTILL_NEEDS_DEVICE(device);
  const auto host = Load(archive, "cpu");
  ASSERT_TRUE(device != nullptr && host != nullptr);
  EXPECT_EQ(device->device(), 0);
  ExpectSamePasses(device.get(), host.get(), {{RandomFloats({8, 3, 32, 32}, 1)}}, {}, 2e-2);
  for (const int64_t rows : {1, 5, 64}) {
    ExpectNear(device->Predict({RandomFloats({rows, 3, 32, 32}, 7)}, nullptr)->values,
               host->Predict({RandomFloats({rows, 3, 32, 32}, 7)}, nullptr)->values);
  }
}

TEST_F(CudaModelTest, TrainsARecurrentNetworkWithTiedWeightsAndCarriesItsStates) {
  const TestedArchive archive = LstmForTest();
  const auto device = Load(archive, "cuda:0");
  CODISTILL_NEEDS_DEVICE(device);
  const auto host = Load(archive, "cpu");
  ASSERT_TRUE(device != nullptr && host != nullptr);
  const Tensor tokens = Int64Tensor({2, 4}, {1, 2, 3, 29, 5, 0, 7, 8});
  Model::States states;
  ASSERT_TRUE(host->Predict({tokens}, &states).ok());
  ExpectSamePasses(device.get(), host.get(), {{tokens}}, states, 1e-2);
  ExpectSameOfSequences(*device, *host);
}

TEST_F(CudaModelTest, SeesWeightsThatAreSaidToBeWritten) {
  const TestedArchive archive = ResNetForTest();
  const auto device = Load(archive, "cuda:0", /*weight_sets=*/2);
  CODISTILL_NEEDS_DEVICE(device);
  const auto host = Load(archive, "cpu");
  ASSERT_TRUE(device != nullptr && host != nullptr);
  ExpectSameOfImages(*device, *host, 3, 1);
  ScaleWeights(*device, 1.1f);
  ScaleWeights(*host, 1.1f);
  ASSERT_TRUE(device->UseWeights(0).ok());
  ExpectSameOfImages(*device, *host, 3, 2);
  // Into the other set, by another thread.
  for (size_t i = 0; i < device->storage(0).size(); ++i) {
    const TensorView& from = device->storage(0)[i];
    const TensorView& to = device->storage(1)[i];
    ASSERT_NE(from.data, to.data);
    std::copy_n(static_cast<const char*>(from.data), from.bytes(), static_cast<char*>(to.data));
    if (to.dtype != DT_FLOAT) continue;
    for (int64_t j = 0; j < to.elements(); ++j) static_cast<float*>(to.data)[j] *= 0.9f;
  }
  std::thread brings([&] { EXPECT_TRUE(device->WeightsWritten(1).ok()); });
  ExpectSameOfImages(*device, *host, 3, 3);
  brings.join();
  ExpectSameOfImages(*device, *host, 3, 4);
  ScaleWeights(*host, 0.9f);
  ASSERT_TRUE(device->UseWeights(1).ok());
  ExpectSameOfImages(*device, *host, 3, 5);
}

TEST_F(CudaModelTest, AddsUpTheGradientsOfParts) {
  const TestedArchive archive = LstmForTest();
  const auto device = Load(archive, "cuda:0");
  CODISTILL_NEEDS_DEVICE(device);
  const auto host = Load(archive, "cpu");
  ASSERT_TRUE(device != nullptr && host != nullptr);
  const Tensor tokens = Int64Tensor({2, 4}, {1, 2, 3, 29, 5, 0, 7, 8});
  std::map<int, std::vector<float>> sums[2];
  Model* const models[] = {device.get(), host.get()};
  for (int m = 0; m < 2; ++m) {
    for (int part = 0; part < 2; ++part) {
      Model::States states;
      const auto logits = models[m]->Forward({tokens}, &states, 1);
      ASSERT_TRUE(logits.ok()) << logits.status();
      const Tensor gradient = RandomFloats(logits->values.shape(), 5 + part);
      const absl::Status status =
          part == 0 ? models[m]->Accumulate(gradient)
                    : models[m]->Backward(
                          gradient, [&](int i, const float* data, std::shared_ptr<const void>) {
                            sums[m][i].assign(data, data + models[m]->storage()[i].elements());
                          });
      ASSERT_TRUE(status.ok()) << status;
    }
  }
  ASSERT_EQ(sums[0].size(), sums[1].size());
  for (const auto& [index, want] : sums[1]) {
    ExpectNearVectors(sums[0].at(index).data(), want.data(), want.size(), 1e-2, "");
  }
}

TEST_F(CudaModelTest, ComputesInBfloat16WhereItIsToldTo) {
  const TestedArchive archive = LstmForTest();
  const auto device = Load(archive, "cuda:0", 1, BF16);
  CODISTILL_NEEDS_DEVICE(device);
  const auto host = Load(archive, "cpu");
  ASSERT_TRUE(device != nullptr && host != nullptr);
  const Tensor tokens = Int64Tensor({2, 4}, {1, 2, 3, 29, 5, 0, 7, 8});
  Model::States states, want_states;
  const auto got = device->Predict({tokens}, &states), want = host->Predict({tokens}, &want_states);
  ASSERT_TRUE(got.ok() && want.ok()) << got.status() << want.status();
  ExpectNearVectors(got->values.As<float>().data(), want->values.As<float>().data(),
                    want->values.As<float>().size(), 5e-2, "logits");
  ExpectSamePasses(device.get(), host.get(), {{tokens}}, want_states, 0.1);
}

TEST_F(CudaModelTest, AnotherDeviceIsNotThere) {
  const TestedArchive archive = LstmForTest();
  const auto device = Load(archive, "cuda:0");
  CODISTILL_NEEDS_DEVICE(device);
  EXPECT_EQ(Load(archive, "cuda:1000"), nullptr);
  EXPECT_THAT(missing_, HasSubstr("device cuda:1000: this machine has"));
}

TEST_F(CudaModelTest, OutOfMemoryIsToldAndLeavesTheDeviceUsable) {
  const TestedArchive archive = ResNetForTest();
  const auto device = Load(archive, "cuda:0");
  CODISTILL_NEEDS_DEVICE(device);
  const auto memory = device->Allocate(DT_UINT8, {int64_t{1} << 50});
  EXPECT_TRUE(absl::IsResourceExhausted(memory.status())) << memory.status();
  EXPECT_THAT(std::string(memory.status().message()), HasSubstr("training.batch_size"));
  EXPECT_TRUE(device->Predict({RandomFloats({2, 3, 32, 32}, 7)}, nullptr).ok());
}

}  // namespace
}  // namespace codistill
