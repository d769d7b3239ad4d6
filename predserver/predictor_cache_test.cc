// Predictions that are not computed again.

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "predserver/predictor_fixture.h"

namespace codistill {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class CachingTest : public PredictorTest {
 protected:
  using Answer = std::shared_ptr<Pending>;

  CachingTest() {
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString("inputs { name: 'x' } num_outputs: 2",
                                                              &options_.config));
    options_.cache_bytes = 1 << 20;
    options_.cache_window_steps = 10;
    options_.max_queue = 10;
    MakeAnew();
    Hold(3, 40);
    followed_.SetGroupStep(3, 40);
  }
  ~CachingTest() override { model_->LetGo(); }

  // A version whose logits are [x, step]; an x of 666 fails.
  void Hold(uint64_t generation, int64_t step) {
    model_ = std::make_shared<PuppetModel>(
        [this, step](absl::Span<const Tensor> inputs,
                     Model::States*) -> absl::StatusOr<Model::Logits> {
          const auto x = inputs[0].As<float>();
          Tensor logits = Tensor::Allocate(DT_FLOAT, {static_cast<int64_t>(x.size()), 2});
          for (size_t i = 0; i < x.size(); ++i) {
            if (x[i] == 666) return absl::InvalidArgumentError("forward() failed on this batch");
            logits.As<float>()[2 * i] = x[i];
            logits.As<float>()[2 * i + 1] = static_cast<float>(step);
          }
          computed_ += static_cast<int>(x.size());
          return Model::Logits{logits, static_cast<int64_t>(x.size())};
        });
    followed_.Hold(model_, generation, step, clock_.Now());
  }

  static PredictionRequest Ask(const std::vector<int64_t>& ids, const std::vector<float>& x) {
    struct Bytes {
      std::vector<int64_t> ids;
      std::vector<float> x;
    };
    const auto bytes = std::make_shared<Bytes>(Bytes{ids, x});
    PredictionRequest request;
    request.model = "alpha";
    request.owner = bytes;
    const auto size = static_cast<int64_t>(ids.size());
    request.inputs = {{"x",
                       "FP32",
                       {size},
                       {{reinterpret_cast<const uint8_t*>(bytes->x.data()), ids.size() * 4}}},
                      {"example_id",
                       "INT64",
                       {size},
                       {{reinterpret_cast<const uint8_t*>(bytes->ids.data()), ids.size() * 8}}}};
    return request;
  }
  // x is 10 times the id.
  static PredictionRequest Ask(const std::vector<int64_t>& ids) {
    std::vector<float> x;
    for (const int64_t id : ids) x.push_back(10.0f * static_cast<float>(id));
    return Ask(ids, x);
  }

  std::atomic<int> computed_{0};  // examples
};

TEST_F(CachingTest, ComputesOnlyWhatItHasNot) {
  auto answer = Predict(Ask({1, 2}));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(computed_, 2);
  clock_.Advance(absl::Seconds(5));
  Hold(3, 45);
  followed_.SetGroupStep(3, 47);
  answer = Predict(Ask({2, 1}));
  EXPECT_EQ(computed_, 2);
  EXPECT_THAT(answer->outputs[0].tensor.As<float>(), ElementsAre(20, 40, 10, 40));
  // It says of which version it is.
  EXPECT_EQ(answer->version.step(), 40);
  EXPECT_EQ(answer->latest_step, 47);
  EXPECT_EQ(answer->staleness_steps, 7);
  EXPECT_EQ(answer->age, absl::Seconds(5));
  answer = Predict(Ask({1, 3, 2, 4}));
  EXPECT_EQ(computed_, 4);
  EXPECT_THAT(answer->outputs[0].tensor.As<float>(), ElementsAre(10, 40, 30, 45, 20, 40, 40, 45));
  EXPECT_EQ(answer->version.step(), 40);  // the oldest
  answer = Predict(Ask({3, 4}));
  EXPECT_EQ(answer->version.step(), 45);
  const ModelStatistics statistics = predictor_->statistics();
  EXPECT_EQ(statistics.cache_hit.count, 6);
  EXPECT_EQ(statistics.cache_miss.count, 4);
  EXPECT_EQ(statistics.inference_count, 4);
  EXPECT_EQ(statistics.success.count, 4);
  ServedModelStatus status;
  predictor_->FillStatus(&status);
  EXPECT_EQ(status.cache_hits(), 6);
  EXPECT_GT(status.cache_bytes(), 4 * 8);
}

TEST_F(CachingTest, OldRowsAreComputedAnew) {
  ASSERT_TRUE(Predict(Ask({1})).ok());
  Hold(3, 50);
  followed_.SetGroupStep(3, 52);
  EXPECT_EQ(Predict(Ask({1}))->version.step(), 40);  // ten steps: the window
  PredictionRequest fresh = Ask({1});
  fresh.max_staleness_steps = 11;
  EXPECT_EQ(Predict(fresh)->version.step(), 50);  // of 12 steps would not do
  ASSERT_TRUE(Predict(Ask({2})).ok());
  Hold(3, 61);
  EXPECT_EQ(Predict(Ask({1}))->version.step(), 61);
  Hold(4, 30);  // restored
  EXPECT_EQ(Predict(Ask({1}))->version.generation(), 4u);
  EXPECT_EQ(computed_, 5);
}

TEST_F(CachingTest, WithoutIdsOrForAPinnedVersionThereIsNoCache) {
  PredictionRequest pinned = Ask({1});
  pinned.version = "3.40";
  PredictionRequest anonymous = Ask({1});
  anonymous.inputs.pop_back();
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(Predict(pinned).ok());
    ASSERT_TRUE(Predict(anonymous).ok());
  }
  EXPECT_EQ(computed_, 4);
}

TEST_F(CachingTest, FormatsApplyToWhatWasFound) {
  ASSERT_TRUE(Predict(Ask({1})).ok());
  PredictionRequest request = Ask({1});
  request.outputs = {kProbabilitiesOutput};
  request.format.temperature = 10;
  const auto answer = Predict(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(computed_, 1);
  ASSERT_EQ(answer->outputs.size(), 1u);
  EXPECT_NEAR(answer->outputs[0].tensor.As<float>()[0], 1 / (1 + std::exp(3.0)), 1e-5);
}

TEST_F(CachingTest, WhatIsBeingComputedIsComputedOnce) {
  model_->HoldUp();
  const Answer first = Start(Ask({1, 2}));
  model_->AwaitPasses(1);
  const Answer same = Start(Ask({2, 1})), more = Start(Ask({2, 3}));
  PredictionRequest late = Ask({1});
  late.deadline = clock_.Now() + absl::Milliseconds(5);
  const Answer gone = Start(late);
  clock_.Advance(absl::Milliseconds(10));
  model_->LetGo();
  for (const Answer& answer : {first, same, more}) {
    ASSERT_TRUE(answer->Wait().ok()) << answer->Wait().status();
  }
  EXPECT_THAT(same->Wait()->outputs[0].tensor.As<float>(), ElementsAre(20, 40, 10, 40));
  EXPECT_THAT(more->Wait()->outputs[0].tensor.As<float>(), ElementsAre(20, 40, 30, 40));
  EXPECT_EQ(computed_, 3);
  // What it waited for came after its deadline.
  EXPECT_TRUE(absl::IsDeadlineExceeded(gone->Wait().status())) << gone->Wait().status();
}

TEST_F(CachingTest, WhoWaitsForAFailureComputesForItself) {
  model_->HoldUp();
  const Answer bad = Start(Ask({1, 2}, {666, 20}));
  model_->AwaitPasses(1);
  const Answer good = Start(Ask({1})), other = Start(Ask({2, 1}));
  model_->LetGo();
  EXPECT_TRUE(absl::IsInvalidArgument(bad->Wait().status()));
  ASSERT_TRUE(good->Wait().ok()) << good->Wait().status();
  ASSERT_TRUE(other->Wait().ok()) << other->Wait().status();
  EXPECT_THAT(other->Wait()->outputs[0].tensor.As<float>(), ElementsAre(20, 40, 10, 40));
}

TEST_F(CachingTest, AfterAFailureOneOfThoseWhoWaitedComputesForAll) {
  options_.max_queue = 200;
  MakeAnew();
  model_->HoldUp();
  const Answer bad = Start(Ask({1}, {666}));
  model_->AwaitPasses(1);
  std::vector<Answer> waiting;
  for (int i = 0; i < 100; ++i) waiting.push_back(Start(Ask({1})));
  model_->LetGo();
  EXPECT_TRUE(absl::IsInvalidArgument(bad->Wait().status()));
  for (const Answer& answer : waiting) {
    ASSERT_TRUE(answer->Wait().ok()) << answer->Wait().status();
    EXPECT_GT(answer->place, bad->place);
  }
  EXPECT_EQ(computed_, 1);
}

TEST_F(CachingTest, WhatIsNotFiniteIsForWhoeverAskedForIt) {
  const float infinity = std::numeric_limits<float>::infinity();
  model_ = std::make_shared<PuppetModel>([=](absl::Span<const Tensor> inputs, Model::States*) {
    Tensor logits = Tensor::Zeros(DT_FLOAT, {inputs[0].shape()[0], 2});
    for (int64_t i = 0; i < inputs[0].shape()[0]; ++i) {
      if (inputs[0].As<float>()[i] > 1e30f) logits.As<float>()[2 * i] = infinity;
    }
    return Model::Logits{logits, inputs[0].shape()[0]};
  });
  followed_.Hold(model_, 3, 41, clock_.Now());
  EXPECT_TRUE(absl::IsFailedPrecondition(Predict(Ask({5}, {1e38f})).status()));
  const auto answer = Predict(Ask({5}));
  EXPECT_TRUE(answer.ok()) << answer.status();
}

TEST_F(CachingTest, RoomForThoseWhoWaitIsBounded) {
  options_.max_queue = 1;
  MakeAnew();
  model_->HoldUp();
  const Answer first = Start(Ask({1}));
  model_->AwaitPasses(1);
  const Answer same = Start(Ask({1}));
  EXPECT_THAT(std::string(Predict(Ask({1})).status().message()),
              HasSubstr("model alpha: 1 requests are waiting already"));
  // The queue has room.
  EXPECT_TRUE(predictor_->CheckRoom("", 0).ok());
  const Answer other = Start(Ask({2}));
  EXPECT_TRUE(absl::IsResourceExhausted(predictor_->CheckRoom("", 0)));
  model_->LetGo();
  for (const Answer& answer : {first, same, other}) {
    EXPECT_TRUE(answer->Wait().ok()) << answer->Wait().status();
  }
}

TEST_F(CachingTest, LargeAnswersAreMadeByTheThreadsThatCompute) {
  options_.cache_bytes = 64 << 20;
  MakeAnew();
  std::vector<int64_t> ids(140000);
  std::iota(ids.begin(), ids.end(), 0);
  ASSERT_TRUE(Predict(Ask(ids)).ok());
  EXPECT_EQ(computed_, 140001);  // one to find out how many rows each has
  model_->HoldUp();
  const Answer blocking = Start(Ask({-1}));
  model_->AwaitPasses(3);
  const Answer large = Start(Ask(ids)), small = Start(Ask({7}));
  PredictionRequest late_request = Ask(ids);
  late_request.deadline = clock_.Now() + absl::Milliseconds(5);
  const Answer late = Start(late_request);
  EXPECT_TRUE(small->Wait().ok());
  EXPECT_FALSE(large->done.HasBeenNotified());
  clock_.Advance(absl::Milliseconds(10));
  model_->LetGo();
  ASSERT_TRUE(large->Wait().ok()) << large->Wait().status();
  EXPECT_EQ(large->Wait()->outputs[0].tensor.As<float>()[2 * 139999], 1399990);
  EXPECT_TRUE(absl::IsDeadlineExceeded(late->Wait().status())) << late->Wait().status();
  EXPECT_TRUE(blocking->Wait().ok());
  EXPECT_EQ(computed_, 140002);
}

TEST_F(CachingTest, DrainingAnswersWhoWaits) {
  model_->HoldUp();
  const Answer first = Start(Ask({1}));
  model_->AwaitPasses(1);
  const Answer same = Start(Ask({1}));
  std::thread drain([&] { predictor_->Drain(); });
  while (!predictor_->draining()) std::this_thread::yield();
  model_->LetGo();
  drain.join();
  EXPECT_TRUE(first->done.HasBeenNotified());
  ASSERT_TRUE(same->done.HasBeenNotified());
  EXPECT_TRUE(same->Wait().ok()) << same->Wait().status();
}

TEST_F(CachingTest, TheRestoredGroupIsNotMixedWithTheOldOne) {
  ASSERT_TRUE(Predict(Ask({1})).ok());
  model_->HoldUp();
  const Answer blocking = Start(Ask({9}));
  model_->AwaitPasses(2);
  const Answer mixed = Start(Ask({1, 2}));  // 1 was found in generation 3
  const auto old = model_;
  Hold(4, 30);
  old->LetGo();
  ASSERT_TRUE(blocking->Wait().ok());
  ASSERT_TRUE(mixed->Wait().ok()) << mixed->Wait().status();
  EXPECT_EQ(mixed->Wait()->version.generation(), 4u);
  EXPECT_THAT(mixed->Wait()->outputs[0].tensor.As<float>(), ElementsAre(10, 30, 20, 30));
}

TEST_F(CachingTest, ManyAskForTheSame) {
  options_.max_queue = 1000;
  MakeAnew(/*threads=*/2);
  std::vector<std::thread> clients;
  for (int c = 0; c < 4; ++c) {
    clients.emplace_back([&, c] {
      for (int i = 0; i < 500; ++i) {
        const int64_t id = (i * 7 + c) % 50;
        if (c == 0 && i % 100 == 99) Hold(3, 41 + i / 100);
        const auto answer = Predict(Ask({id, id + 1, (id * 3) % 50}));
        ASSERT_TRUE(answer.ok()) << answer.status();
        const auto logits = answer->outputs[0].tensor.As<float>();
        EXPECT_EQ(logits[0], 10 * id);
        EXPECT_EQ(logits[2], 10 * (id + 1));
        EXPECT_EQ(logits[4], 10 * ((id * 3) % 50));
        for (const int place : {1, 3, 5}) EXPECT_GE(logits[place], answer->version.step());
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_LE(computed_, 51 * 30);
}

TEST_F(CachingTest, NotForRecurrentModels) {
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
      "inputs { name: 'x' } states { name: 'h' shape: -1 } num_outputs: 2", &options_.config));
  EXPECT_THAT(std::string(Predictor::Create(options_).status().message()),
              HasSubstr("recurrent state cannot be cached"));
}

}  // namespace
}  // namespace codistill
