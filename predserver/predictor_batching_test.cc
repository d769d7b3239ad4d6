// How a predictor puts requests together and whose turn it is.

#include <atomic>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "common/base/retry_after.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "predserver/predictor_fixture.h"

namespace codistill {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;

class BatchingTest : public PredictorTest {
 protected:
  using Answer = std::shared_ptr<Pending>;

  BatchingTest() {
    options_.max_queue = 100;
    MakeAnew();
  }
  ~BatchingTest() override { model_->LetGo(); }

  static PredictionRequest From(const std::string& client, float x = 1) {
    PredictionRequest request = Request({x, 2});
    request.client = client;
    return request;
  }
  // So many examples.
  static PredictionRequest Many(int examples) {
    return Request(std::vector<float>(2 * examples, 1));
  }

  // Keeps the thread in a pass.
  Answer Block() {
    model_->HoldUp();
    Answer answer = Start(Request());
    model_->AwaitPasses(1);
    return answer;
  }

  // Passes by their number of examples.
  std::map<int64_t, int64_t> Passes() const {
    std::map<int64_t, int64_t> passes;
    for (const auto& [examples, batch] : predictor_->statistics().batches) {
      passes[examples] = batch.compute_infer.count;
    }
    return passes;
  }

  void ExpectOk(const std::vector<Answer>& answers) {
    for (const Answer& answer : answers)
      ASSERT_TRUE(answer->Wait().ok()) << answer->Wait().status();
  }
};

TEST_F(BatchingTest, WhatCameDuringAPassSharesTheNext) {
  std::vector<Answer> answers = {Block()};
  for (int i = 0; i < 5; ++i) answers.push_back(Start(Request({10.0f * i, 1, 20.0f * i, 2})));
  model_->LetGo();
  ExpectOk(answers);
  EXPECT_THAT(Passes(), ElementsAre(Pair(1, 1), Pair(10, 1)));
  for (int i = 0; i < 5; ++i) {
    EXPECT_THAT(answers[i + 1]->Wait()->outputs[0].tensor.As<float>(),
                ElementsAre(10 * i + 1, 1, 20 * i + 2, 1));
    EXPECT_THAT(answers[i + 1]->Wait()->outputs[1].tensor.As<float>(), ElementsAre(1, 1));
  }
}

TEST_F(BatchingTest, PassesHaveASize) {
  options_.max_batch_size = 4;
  MakeAnew();
  std::vector<Answer> answers = {Block()};
  for (int examples : {3, 1, 2, 9, 1, 3}) answers.push_back(Start(Many(examples)));
  model_->LetGo();
  ExpectOk(answers);
  // 3 + 1, 2, 9 alone, 1 + 3.
  EXPECT_THAT(Passes(), ElementsAre(Pair(1, 1), Pair(2, 1), Pair(4, 2), Pair(9, 1)));
}

TEST_F(BatchingTest, ALoneClientNeverWaitsForTheTimer) {
  options_.max_batch_delay = absl::Hours(1);  // on a clock that stands still
  MakeAnew();
  for (int i = 0; i < 50; ++i) ASSERT_TRUE(Predict(Request()).ok());
}

TEST_F(BatchingTest, WaitsForThoseThatWereThereBefore) {
  options_.max_batch_delay = absl::Milliseconds(1);
  MakeAnew();
  const Answer a = Block();
  const Answer b = Start(Request()), c = Start(Request());
  model_->LetGo();
  ExpectOk({a});
  ASSERT_TRUE(clock_.BlockUntilWaiters(1));  // b and c wait for a's next
  EXPECT_FALSE(b->done.HasBeenNotified());
  const Answer a2 = Start(Request());
  ExpectOk({b, c, a2});
  EXPECT_THAT(Passes(), ElementsAre(Pair(1, 1), Pair(3, 1)));
  // Only one of the three comes back: the others are awaited for the delay, which begins when the
  // thread has looked.
  const absl::Time start = clock_.Now();
  const Answer last = Start(Request());
  while (!last->done.WaitForNotificationWithTimeout(absl::Milliseconds(1))) {
    clock_.Advance(absl::Microseconds(50));
  }
  ExpectOk({last});
  EXPECT_GE(clock_.Now() - start, absl::Milliseconds(1));
}

TEST_F(BatchingTest, DrainingWaitsForNobody) {
  options_.max_batch_delay = absl::Hours(1);
  MakeAnew();
  const Answer a = Block();
  const Answer b = Start(Request());
  model_->LetGo();
  ExpectOk({a});
  ASSERT_TRUE(clock_.BlockUntilWaiters(1));
  predictor_->Drain();
  EXPECT_TRUE(b->done.HasBeenNotified());
  ExpectOk({b});
}

TEST_F(BatchingTest, ClientsTakeTurns) {
  options_.max_batch_size = 2;
  MakeAnew();
  const Answer blocking = Block();
  std::vector<Answer> greedy, modest;
  for (int i = 0; i < 10; ++i) greedy.push_back(Start(From("greedy")));
  for (int i = 0; i < 2; ++i) modest.push_back(Start(From("modest")));
  model_->LetGo();
  ExpectOk(greedy);
  ExpectOk(modest);
  EXPECT_LE(modest[0]->place, 2);
  EXPECT_LE(modest[1]->place, 4);
  for (int i = 1; i < 10; ++i) EXPECT_LT(greedy[i - 1]->place, greedy[i]->place);
  ExpectOk({blocking});
}

TEST_F(BatchingTest, OneClientCannotFillTheQueueForOthers) {
  options_.max_queue = 3;
  MakeAnew();
  const Answer blocking = Block();
  std::vector<Answer> greedy;
  for (int i = 0; i < 3; ++i) greedy.push_back(Start(From("greedy")));
  const Answer fourth = Start(From("greedy"));
  EXPECT_TRUE(absl::IsResourceExhausted(fourth->Wait().status()));
  const Answer modest = Start(From("modest"));
  // The newest one had to go.
  const absl::Status gone = greedy[2]->Wait().status();
  EXPECT_TRUE(absl::IsResourceExhausted(gone)) << gone;
  EXPECT_TRUE(RetryAfter(gone).has_value());
  model_->LetGo();
  ExpectOk({blocking, greedy[0], greedy[1], modest});
}

TEST_F(BatchingTest, RefusalsSayWhenByTheMeasuredRate) {
  auto slow =
      std::make_shared<PuppetModel>([this](absl::Span<const Tensor> inputs, Model::States* states) {
        clock_.Advance(absl::Milliseconds(10));
        return Sum(inputs, states);
      });
  followed_.Hold(slow, 3, 41, clock_.Now());
  options_.max_queue = 2;
  MakeAnew();
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(Predict(Request()).ok());
  slow->HoldUp();
  std::vector<Answer> answers = {Start(Request())};
  slow->AwaitPasses(21);
  answers.push_back(Start(Request()));
  answers.push_back(Start(Request()));
  EXPECT_THAT(std::string(predictor_->CheckRoom("", 0).message()),
              HasSubstr("model alpha: 2 requests are waiting already (prediction.max_queue)"));
  const absl::Status refused = Predict(Request()).status();
  ASSERT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  // The first place that becomes free was promised above.
  EXPECT_NEAR(absl::ToDoubleMilliseconds(*RetryAfter(refused)), 20, 0.01);
  EXPECT_NEAR(absl::ToDoubleMilliseconds(*RetryAfter(predictor_->CheckRoom("", 0))), 10, 0.01);
  EXPECT_EQ(predictor_->statistics().refused, 3);
  slow->LetGo();
  ExpectOk(answers);
  EXPECT_TRUE(predictor_->CheckRoom("", 0).ok());
}

TEST_F(BatchingTest, WhatWaitsIsBoundedInBytes) {
  options_.max_queue_bytes = 100;
  MakeAnew();
  std::vector<Answer> answers = {Block()};
  answers.push_back(Start(Many(100)));  // 800 bytes, but alone
  absl::Status refused = Predict(Request()).status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("800 bytes together"));
  EXPECT_TRUE(RetryAfter(refused).has_value());
  EXPECT_TRUE(absl::IsResourceExhausted(predictor_->CheckRoom("", 8)));
  model_->LetGo();
  ExpectOk(answers);
  model_->HoldUp();
  answers = {Start(Request())};
  model_->AwaitPasses(3);
  for (int i = 0; i < 12; ++i) answers.push_back(Start(Request()));
  EXPECT_TRUE(absl::IsResourceExhausted(Predict(Request()).status()));
  model_->LetGo();
  ExpectOk(answers);
}

TEST_F(BatchingTest, OutputsThatFitNoResponseAreNotComputed) {
  options_.outputs.response_bytes = 120;  // of 12 bytes an example, with the state
  MakeAnew();
  const absl::Status refused = Predict(Many(11)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("input x: has 11 examples"));
  EXPECT_TRUE(Passes().empty());
  EXPECT_TRUE(Predict(Many(10)).ok());
}

TEST_F(BatchingTest, HowManyRowsThereAreIsFoundOutFirst) {
  // Eight labels an example, as of a language model.
  int64_t most = 0;
  const auto labels = std::make_shared<PuppetModel>(
      [&](absl::Span<const Tensor> inputs, Model::States*) -> absl::StatusOr<Model::Logits> {
        const int64_t rows = 8 * inputs[0].shape()[0];
        most = std::max(most, rows);
        return Model::Logits{Tensor::Zeros(DT_FLOAT, {rows, 1000}), rows};
      });
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
      "inputs { name: 'x' shape: 2 } num_outputs: 1000", &options_.config));
  options_.outputs.response_bytes = 3200000;  // 100 examples
  MakeAnew();
  followed_.Hold(labels, 3, 41, clock_.Now());
  EXPECT_TRUE(absl::IsInvalidArgument(Predict(Many(300)).status()));
  EXPECT_EQ(most, 8);
  EXPECT_TRUE(absl::IsInvalidArgument(Predict(Many(101)).status()));
  EXPECT_EQ(most, 8);
  EXPECT_TRUE(Predict(Many(100)).ok());
}

TEST_F(BatchingTest, AFewRowsDoNotKeepAWholePass) {
  std::vector<Answer> answers = {Block(), Start(Request()), Start(Many(100))};
  model_->LetGo();
  ExpectOk(answers);
  EXPECT_THAT(Passes(), ElementsAre(Pair(1, 1), Pair(101, 1)));
  const auto owners = [](const Answer& answer) {
    return answer->Wait()->outputs[0].tensor.owner();
  };
  EXPECT_FALSE(owners(answers[1]).owner_before(owners(answers[2])) ==
               owners(answers[2]).owner_before(owners(answers[1])));
}

TEST_F(BatchingTest, TheDeadMakeRoomAndCostNothing) {
  options_.max_queue = 2;
  MakeAnew();
  const Answer blocking = Block();
  PredictionRequest late = Request();
  late.deadline = clock_.Now() + absl::Milliseconds(5);
  auto gone = std::make_shared<std::atomic<bool>>(false);
  PredictionRequest leaving = Request();
  leaving.cancelled = [gone] { return gone->load(); };
  const Answer a = Start(late), b = Start(leaving);
  EXPECT_TRUE(absl::IsResourceExhausted(Predict(Request()).status()));
  clock_.Advance(absl::Milliseconds(10));
  const Answer c = Start(Request());
  EXPECT_TRUE(absl::IsDeadlineExceeded(a->Wait().status()));
  gone->store(true);
  clock_.Advance(absl::Milliseconds(10));
  const Answer d = Start(Request());
  EXPECT_TRUE(absl::IsCancelled(b->Wait().status()));
  model_->LetGo();
  ExpectOk({blocking, c, d});
  EXPECT_EQ(predictor_->statistics().inference_count, 3);
}

TEST_F(BatchingTest, EachRequestHasItsOwnDemandsOfTheVersion) {
  followed_.Keep(2);
  followed_.Hold(model_, 3, 41, clock_.Now());
  const Answer blocking = Block();
  PredictionRequest pinned = Request(), fresh = Request();
  pinned.version = "3.40";
  const Answer lost = Start(pinned);
  fresh.max_staleness_steps = 2;
  const Answer stale = Start(fresh);
  fresh.max_staleness_steps = 3;
  const Answer fine = Start(fresh), any = Start(Request());
  followed_.Hold(model_, 3, 50, clock_.Now());
  followed_.SetGroupStep(3, 53);
  model_->LetGo();
  // Was held when it was accepted, and gone by its turn.
  EXPECT_EQ(lost->Wait().status(),
            absl::NotFoundError(
                "model alpha has no version \"3.40\" any more or yet; it has 3.50, 3.41"));
  EXPECT_EQ(stale->Wait().status().message(),
            "version 3.50 is 3 steps behind its group; max_staleness_steps is 2");
  ExpectOk({blocking, fine, any});
  EXPECT_EQ(fine->Wait()->version.step(), 50);
  EXPECT_THAT(Passes(), ElementsAre(Pair(1, 1), Pair(2, 1)));
}

TEST_F(BatchingTest, PinnedVersionsArePassesOfTheirOwn) {
  followed_.Keep(2);
  followed_.Hold(model_, 3, 50, clock_.Now());
  const Answer blocking = Block();
  std::vector<Answer> answers;
  const std::vector<std::string> versions = {"3.40", "", "3.50", "3.40", "", "3.40"};
  for (size_t i = 0; i < versions.size(); ++i) {
    PredictionRequest request = From(std::to_string(i));
    request.version = versions[i];
    answers.push_back(Start(request));
  }
  model_->LetGo();
  ExpectOk(answers);
  for (size_t i = 0; i < versions.size(); ++i) {
    EXPECT_EQ(answers[i]->Wait()->version.step(), versions[i] == "3.40" ? 40 : 50) << i;
    EXPECT_EQ(answers[i]->Wait()->staleness_steps, versions[i] == "3.40" ? 10 - 3 : 0) << i;
  }
  EXPECT_THAT(Passes(), ElementsAre(Pair(1, 1), Pair(3, 2)));
  ExpectOk({blocking});
}

TEST_F(BatchingTest, ABadRequestHarmsNobodyElse) {
  const Answer blocking = Block();
  const Answer a = Start(Request({1, 2})), nan = Start(Request({1, NAN}));
  const Answer b = Start(Request({3, 4})), fails = Start(Request({666, 1}));
  const Answer c = Start(Request({5, 6, 7, 8}));
  model_->LetGo();
  ExpectOk({blocking, a, b, c});
  EXPECT_THAT(b->Wait()->outputs[0].tensor.As<float>(), ElementsAre(7, 1));
  EXPECT_THAT(c->Wait()->outputs[0].tensor.As<float>(), ElementsAre(11, 1, 15, 1));
  EXPECT_THAT(std::string(nan->Wait().status().message()), HasSubstr("input x: has a NaN"));
  EXPECT_EQ(fails->Wait().status().message(), "forward() failed on this batch");
}

TEST_F(BatchingTest, IdleThreadsShareABatch) {
  options_.max_batch_delay = absl::Hours(1);
  MakeAnew(/*threads=*/2);
  model_->HoldUp();
  std::vector<Answer> answers;
  for (int i = 0; i < 2; ++i) {
    answers.push_back(Start(Many(16)));
    model_->AwaitPasses(i + 1);
  }
  for (int i = 0; i < 2; ++i) answers.push_back(Start(Many(16)));
  model_->LetGo();
  ExpectOk({answers[0], answers[1]});
  ASSERT_TRUE(clock_.BlockUntilWaiters(2));  // two wait for the two that have been answered
  model_->HoldUp();
  for (int i = 0; i < 2; ++i) answers.push_back(Start(Many(16)));
  model_->AwaitPasses(4);
  model_->LetGo();
  ExpectOk(answers);
  EXPECT_THAT(Passes(), ElementsAre(Pair(16, 2), Pair(32, 2)));
}

TEST_F(BatchingTest, FewRowsAreNotShared) {
  options_.max_batch_delay = absl::Hours(1);
  MakeAnew(/*threads=*/2);
  model_->HoldUp();
  std::vector<Answer> answers;
  for (int i = 0; i < 2; ++i) {
    answers.push_back(Start(Request()));
    model_->AwaitPasses(i + 1);
  }
  for (int i = 0; i < 2; ++i) answers.push_back(Start(Request()));
  model_->LetGo();
  ExpectOk({answers[0], answers[1]});
  ASSERT_TRUE(clock_.BlockUntilWaiters(2));
  for (int i = 0; i < 2; ++i) answers.push_back(Start(Request()));
  ExpectOk(answers);
  EXPECT_THAT(Passes(), ElementsAre(Pair(1, 2), Pair(4, 1)));
}

}  // namespace
}  // namespace codistill
