#include "predserver/batch_run.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "common/model/testing/puppet_model.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "predserver/batch_inputs.h"

namespace codistill {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

ModelConfig ParseConfig(const std::string& text) {
  ModelConfig config;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &config));
  return config;
}

// An input whose bytes come in parts of `part` bytes.
template <typename T>
PredictionRequest::Input Input(const std::string& name, const std::string& datatype,
                               std::vector<int64_t> shape, const std::vector<T>& values,
                               size_t part = 1 << 20) {
  PredictionRequest::Input input{name, datatype, std::move(shape), {}};
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  for (size_t at = 0; at < values.size() * sizeof(T); at += part) {
    input.parts.emplace_back(bytes + at, std::min(part, values.size() * sizeof(T) - at));
  }
  return input;
}

class BatchRunTest : public testing::Test {
 protected:
  // The values outlive the request.
  WaitingRequest* Add(std::vector<PredictionRequest::Input> inputs) {
    auto& item = items_.emplace_back(std::make_unique<WaitingRequest>());
    item->request.inputs = std::move(inputs);
    auto plan = CheckRequest(config_, item->request);
    EXPECT_TRUE(plan.ok()) << plan.status();
    item->plan = *plan;
    return item.get();
  }

  std::vector<absl::StatusOr<Computed>> Run(PuppetModel::Pass pass) {
    std::vector<const WaitingRequest*> requests;
    for (const auto& item : items_) requests.push_back(item.get());
    passes_.clear();
    return ComputeBatch(config_, PuppetModel(std::move(pass)), requests, Clock::Real(), &passes_);
  }

  ModelConfig config_;
  std::vector<std::unique_ptr<WaitingRequest>> items_;
  std::vector<PassTimes> passes_;
};

// Two rows an example: [2x, id] and [-x, id].
absl::StatusOr<Model::Logits> TwoRows(absl::Span<const Tensor> inputs, Model::States*) {
  const auto x = inputs[0].As<float>();
  const auto id = inputs[1].As<int64_t>();
  const auto examples = static_cast<int64_t>(x.size());
  for (const int64_t one : id) {
    if (one >= 100) return absl::InvalidArgumentError("index out of range in self");
  }
  Tensor logits = Tensor::Allocate(DT_FLOAT, {2 * examples, 2});
  float* to = logits.As<float>().data();
  for (int64_t i = 0; i < examples; ++i) {
    *to++ = 2 * x[i];
    *to++ = static_cast<float>(id[i]);
    *to++ = -x[i];
    *to++ = static_cast<float>(id[i]);
  }
  return Model::Logits{logits, 2 * examples};
}

class TwoInputsTest : public BatchRunTest {
 protected:
  TwoInputsTest() {
    config_ =
        ParseConfig("inputs { name: 'x' } inputs { name: 'id' dtype: DT_INT64 } num_outputs: 2");
  }
};

TEST_F(TwoInputsTest, EachGetsItsRowsOfOnePass) {
  const std::vector<float> x1 = {1, 2}, x2 = {3}, x3 = {4, 5, 6};
  const std::vector<int64_t> id1 = {11, 12}, id2 = {13}, id3 = {14, 15, 16};
  Add({Input("x", "FP32", {2}, x1, 3), Input("id", "INT64", {2}, id1)});
  Add({Input("id", "INT64", {1}, id2), Input("x", "FP32", {1}, x2)});  // in another order
  Add({Input("x", "FP32", {3}, x3), Input("id", "INT64", {3}, id3, 7)})->only = {0, 2};
  const auto results = Run(TwoRows);
  ASSERT_EQ(results.size(), 3u);
  for (const auto& result : results) ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(results[0]->logits.shape(), ElementsAre(4, 2));
  EXPECT_THAT(results[0]->logits.As<float>(), ElementsAre(2, 11, -1, 11, 4, 12, -2, 12));
  EXPECT_THAT(results[1]->logits.As<float>(), ElementsAre(6, 13, -3, 13));
  EXPECT_THAT(results[2]->logits.As<float>(), ElementsAre(8, 14, -4, 14, 12, 16, -6, 16));
  // Rows of one tensor, not copies.
  EXPECT_EQ(results[0]->logits.owner(), results[2]->logits.owner());
  ASSERT_EQ(passes_.size(), 1u);
  EXPECT_EQ(passes_[0].requests, 3);
  EXPECT_EQ(passes_[0].examples, 5);
}

TEST_F(TwoInputsTest, WhoIsAloneIsNotCopied) {
  const std::vector<float> x = {1, 2};
  const std::vector<int64_t> id = {11, 12};
  Add({Input("x", "FP32", {2}, x), Input("id", "INT64", {2}, id)});
  const auto results = Run([&](absl::Span<const Tensor> inputs, Model::States* states) {
    EXPECT_EQ(inputs[0].data(), x.data());
    EXPECT_EQ(inputs[1].data(), id.data());
    return TwoRows(inputs, states);
  });
  EXPECT_THAT(results[0]->logits.As<float>(), ElementsAre(2, 11, -1, 11, 4, 12, -2, 12));
}

TEST_F(TwoInputsTest, WhatIsNotAlignedIsCopied) {
  const std::vector<int64_t> id = {11, 12};
  std::vector<char> bytes(9);
  const std::vector<float> x = {1, 2};
  std::memcpy(&bytes[1], x.data(), 8);
  PredictionRequest::Input odd{"x", "FP32", {2}, {}};
  odd.parts.emplace_back(reinterpret_cast<const uint8_t*>(&bytes[1]), 8);
  Add({odd, Input("id", "INT64", {2}, id)});
  const auto results = Run([&](absl::Span<const Tensor> inputs, Model::States* states) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(inputs[0].data()) % sizeof(float), 0u);
    return TwoRows(inputs, states);
  });
  EXPECT_THAT(results[0]->logits.As<float>(), ElementsAre(2, 11, -1, 11, 4, 12, -2, 12));
}

TEST_F(TwoInputsTest, OneBadValueHarmsItsOwnRequestOnly) {
  const std::vector<float> good1 = {1}, bad = {2, NAN}, good2 = {3};
  const std::vector<int64_t> one = {11}, two = {12, 13};
  Add({Input("x", "FP32", {1}, good1), Input("id", "INT64", {1}, one)});
  Add({Input("x", "FP32", {2}, bad), Input("id", "INT64", {2}, two)});
  Add({Input("x", "FP32", {1}, good2), Input("id", "INT64", {1}, one)});
  const auto results = Run(TwoRows);
  EXPECT_THAT(results[0]->logits.As<float>(), ElementsAre(2, 11, -1, 11));
  EXPECT_TRUE(absl::IsInvalidArgument(results[1].status()));
  EXPECT_THAT(std::string(results[1].status().message()), HasSubstr("input x: has a NaN"));
  EXPECT_THAT(results[2]->logits.As<float>(), ElementsAre(6, 11, -3, 11));
  ASSERT_EQ(passes_.size(), 1u);
  EXPECT_EQ(passes_[0].examples, 2);
}

TEST_F(TwoInputsTest, APassThatFailsIsRepeatedWithoutTheGuilty) {
  const std::vector<float> x = {1};
  std::vector<std::vector<int64_t>> ids;
  for (int64_t i = 0; i < 16; ++i) ids.push_back({i == 5 || i == 11 ? 1000 : i});
  for (const auto& id : ids) Add({Input("x", "FP32", {1}, x), Input("id", "INT64", {1}, id)});
  int passes = 0;
  const auto results = Run([&](absl::Span<const Tensor> inputs, Model::States* states) {
    ++passes;
    return TwoRows(inputs, states);
  });
  for (int i = 0; i < 16; ++i) {
    if (i == 5 || i == 11) {
      EXPECT_EQ(results[i].status(), absl::InvalidArgumentError("index out of range in self"));
    } else {
      ASSERT_TRUE(results[i].ok()) << results[i].status();
      EXPECT_THAT(results[i]->logits.As<float>(), ElementsAre(2, i, -1, i));
    }
  }
  EXPECT_LE(passes, 17);  // a root, and two paths of eight below it
}

TEST_F(TwoInputsTest, OtherFailuresAreEverybodys) {
  const std::vector<float> x = {1};
  const std::vector<int64_t> id = {1};
  for (int i = 0; i < 4; ++i) Add({Input("x", "FP32", {1}, x), Input("id", "INT64", {1}, id)});
  int passes = 0;
  const auto results =
      Run([&](absl::Span<const Tensor>, Model::States*) -> absl::StatusOr<Model::Logits> {
        ++passes;
        return absl::ResourceExhaustedError("no memory");
      });
  for (const auto& result : results) EXPECT_TRUE(absl::IsResourceExhausted(result.status()));
  EXPECT_EQ(passes, 1);
  EXPECT_TRUE(passes_.empty());
}

TEST_F(BatchRunTest, StatesBatchAlongTheirOwnDimension) {
  config_ = ParseConfig(
      "inputs { name: 'x' } states { name: 'h' shape: [2, -1, 2] } states { name: 'c' shape: -1 }"
      "num_outputs: 1");
  const std::vector<float> x1 = {1}, x2 = {2, 3}, x3 = {4};
  const std::vector<float> h1 = {10, 11, 12, 13}, c3 = {7};
  const std::vector<float> h3 = {30, 31, 32, 33};
  Add({Input("x", "FP32", {1}, x1), Input("h", "FP32", {2, 1, 2}, h1, 5)});
  Add({Input("x", "FP32", {2}, x2)});  // starts from zeros
  Add({Input("x", "FP32", {1}, x3), Input("h", "FP32", {2, 1, 2}, h3),
       Input("c", "FP32", {1}, c3)});
  const auto results = Run([](absl::Span<const Tensor> inputs, Model::States* states) {
    EXPECT_THAT((*states)[0].shape(), ElementsAre(2, 4, 2));
    EXPECT_THAT((*states)[0].As<float>(),
                ElementsAre(10, 11, 0, 0, 0, 0, 30, 31, 12, 13, 0, 0, 0, 0, 32, 33));
    EXPECT_THAT((*states)[1].As<float>(), ElementsAre(0, 0, 0, 7));
    // h grows by the example's x, c by one.
    for (int64_t layer = 0; layer < 2; ++layer) {
      for (int64_t i = 0; i < 4; ++i) {
        for (int64_t j = 0; j < 2; ++j) {
          (*states)[0].As<float>()[(layer * 4 + i) * 2 + j] += inputs[0].As<float>()[i];
        }
      }
    }
    for (float& c : (*states)[1].As<float>()) c += 1;
    Tensor logits = Tensor::Allocate(DT_FLOAT, {4, 1});
    std::memcpy(logits.data(), inputs[0].data(), 16);
    return Model::Logits{logits, 4};
  });
  for (const auto& result : results) ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(results[0]->states[0].As<float>(), ElementsAre(11, 12, 13, 14));
  EXPECT_THAT(results[1]->states[0].shape(), ElementsAre(2, 2, 2));
  EXPECT_THAT(results[1]->states[0].As<float>(), ElementsAre(2, 2, 3, 3, 2, 2, 3, 3));
  EXPECT_THAT(results[2]->states[0].As<float>(), ElementsAre(34, 35, 36, 37));
  EXPECT_THAT(results[1]->states[1].As<float>(), ElementsAre(1, 1));
  EXPECT_THAT(results[2]->states[1].As<float>(), ElementsAre(8));
  EXPECT_THAT(results[1]->logits.As<float>(), ElementsAre(2, 3));
}

TEST_F(BatchRunTest, StatesThatNobodyBringsAreLeftOut) {
  config_ = ParseConfig("inputs { name: 'x' } states { name: 'h' shape: -1 } num_outputs: 1");
  const std::vector<float> x = {1};
  Add({Input("x", "FP32", {1}, x)});
  Add({Input("x", "FP32", {1}, x)});
  const auto results = Run([](absl::Span<const Tensor> inputs, Model::States* states) {
    EXPECT_TRUE((*states)[0].empty());
    (*states)[0] = inputs[0];
    return Model::Logits{Tensor::Zeros(DT_FLOAT, {2, 1}), 2};
  });
  ASSERT_TRUE(results[1].ok());
  EXPECT_THAT(results[1]->states[0].As<float>(), ElementsAre(1));
}

}  // namespace
}  // namespace codistill
