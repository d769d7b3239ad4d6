#include "predserver/predictor.h"

#include <cmath>
#include <thread>

#include "absl/time/clock.h"
#include "common/base/retry_after.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "predserver/predictor_fixture.h"

namespace codistill {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST_F(PredictorTest, AnswersWithVersionAndStaleness) {
  clock_.Advance(absl::Milliseconds(1500));
  const auto answer = Predict(Request({1, 2, 3, 4}));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->version.generation(), 3u);
  EXPECT_EQ(answer->version.step(), 40);
  EXPECT_EQ(answer->latest_step, 47);
  EXPECT_EQ(answer->staleness_steps, 7);
  EXPECT_EQ(answer->age, absl::Milliseconds(1500));
  ASSERT_EQ(answer->outputs.size(), 2u);
  EXPECT_EQ(answer->outputs[0].name, "logits");
  EXPECT_THAT(answer->outputs[0].tensor.As<float>(), ElementsAre(3, 1, 7, 1));
  EXPECT_EQ(answer->outputs[1].name, "h");
  EXPECT_THAT(answer->outputs[1].tensor.As<float>(), ElementsAre(1, 1));
}

TEST_F(PredictorTest, StatesTravelWithRequestAndAnswer) {
  PredictionRequest request = Request({1, 2, 3, 4});
  const std::vector<float> h = {5, 9};
  request.inputs.push_back(
      {"h", "FP32", {2, 1}, {{reinterpret_cast<const uint8_t*>(h.data()), 8}}});
  request.outputs = {"h"};
  const auto answer = Predict(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  ASSERT_EQ(answer->outputs.size(), 1u);
  EXPECT_THAT(answer->outputs[0].tensor.As<float>(), ElementsAre(6, 10));
}

TEST_F(PredictorTest, StalenessNeverGoesBelowZero) {
  followed_.SetGroupStep(4, 30);  // restored to an older step
  EXPECT_EQ(Predict(Request())->staleness_steps, 0);
}

TEST_F(PredictorTest, RefusesWhatItDoesNotHave) {
  PredictionRequest request = Request();
  request.version = "3.39";
  const absl::Status version = Predict(request).status();
  EXPECT_TRUE(absl::IsNotFound(version));
  EXPECT_THAT(std::string(version.message()), HasSubstr("it has 3.40"));
  request.version = "3.40";
  EXPECT_TRUE(Predict(request).ok());
  request = Request();
  request.inputs[0].datatype = "INT64";
  EXPECT_TRUE(absl::IsInvalidArgument(Predict(request).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Predict(Request({1, NAN})).status()));
  EXPECT_EQ(Predict(Request({666, 1})).status().message(), "forward() failed on this batch");
}

TEST_F(PredictorTest, MaxStalenessIsALimitNotAHint) {
  PredictionRequest request = Request();
  request.max_staleness_steps = 7;
  EXPECT_TRUE(Predict(request).ok());
  request.max_staleness_steps = 6;
  const absl::Status status = Predict(request).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_EQ(status.message(), "version 3.40 is 7 steps behind its group; max_staleness_steps is 6");
}

TEST_F(PredictorTest, WaitsForTheFirstVersion) {
  PuppetFollowedModel nothing;
  options_.followed = &nothing;
  Make();
  EXPECT_EQ(Predict(Request()).status(), absl::UnavailableError("waiting for the first cut"));
  EXPECT_TRUE(absl::IsUnavailable(predictor_->Ready("")));
  EXPECT_EQ(predictor_->Detail(), "waiting for the first cut");
  nothing.Hold(model_, 1, 0, clock_.Now());
  EXPECT_TRUE(Predict(Request()).ok());
  EXPECT_TRUE(predictor_->Ready("1.0").ok());
  EXPECT_TRUE(absl::IsNotFound(predictor_->Ready("1.1")));
  predictor_.reset();
}

TEST_F(PredictorTest, QueueIsBounded) {
  model_->HoldUp();
  auto computing = Start(Request());
  model_->AwaitPasses(1);
  auto first = Start(Request()), second = Start(Request());
  const auto third = Predict(Request());  // answered although the model is held up
  EXPECT_TRUE(absl::IsResourceExhausted(third.status())) << third.status();
  EXPECT_THAT(std::string(third.status().message()), HasSubstr("2 requests are waiting"));
  EXPECT_TRUE(RetryAfter(third.status()).has_value());
  model_->LetGo();
  EXPECT_TRUE(computing->Wait().ok());
  EXPECT_TRUE(first->Wait().ok());
  EXPECT_TRUE(second->Wait().ok());
}

TEST_F(PredictorTest, DeadlinesAndCancellationsAreHonouredBeforeCompute) {
  model_->HoldUp();
  auto computing = Start(Request());
  model_->AwaitPasses(1);
  PredictionRequest late = Request();
  late.deadline = clock_.Now() + absl::Milliseconds(100);
  PredictionRequest gone = Request();
  gone.cancelled = [] { return true; };
  auto late_answer = Start(late), gone_answer = Start(gone);
  clock_.Advance(absl::Milliseconds(250));
  model_->LetGo();
  EXPECT_TRUE(computing->Wait().ok());
  EXPECT_EQ(
      late_answer->Wait().status(),
      absl::DeadlineExceededError("the deadline passed before compute, after 250 ms in the queue"));
  EXPECT_TRUE(absl::IsCancelled(gone_answer->Wait().status()));
  // Neither was computed.
  EXPECT_EQ(predictor_->statistics().execution_count, 1);
}

TEST_F(PredictorTest, NewestVersionAtComputeTimeAnswers) {
  model_->HoldUp();
  auto computing = Start(Request());
  model_->AwaitPasses(1);
  auto waiting = Start(Request());
  followed_.Hold(model_, 3, 50, clock_.Now());
  model_->LetGo();
  EXPECT_EQ(computing->Wait()->version.step(), 40);
  EXPECT_EQ(waiting->Wait()->version.step(), 50);
}

TEST_F(PredictorTest, DrainAnswersWhatWasAccepted) {
  model_->HoldUp();
  auto computing = Start(Request());
  model_->AwaitPasses(1);
  auto waiting = Start(Request());
  std::thread drain([&] { predictor_->Drain(); });
  while (!predictor_->draining()) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_TRUE(absl::IsUnavailable(Predict(Request()).status()));
  EXPECT_TRUE(absl::IsUnavailable(predictor_->Ready("")));
  model_->LetGo();
  drain.join();
  EXPECT_TRUE(computing->Wait().ok());
  EXPECT_TRUE(waiting->Wait().ok());
}

TEST_F(PredictorTest, StatusAndMetricsCount) {
  for (int i = 0; i < 10; ++i) EXPECT_TRUE(Predict(Request({1, 2, 3, 4})).ok());
  EXPECT_FALSE(Predict(Request({1, NAN})).ok());
  clock_.Advance(absl::Seconds(1));
  ServedModelStatus status;
  predictor_->FillStatus(&status);
  EXPECT_EQ(status.model(), "alpha");
  EXPECT_EQ(status.version().step(), 40);
  EXPECT_EQ(status.precision(), "FP32");
  EXPECT_EQ(status.requests(), 11);
  EXPECT_EQ(status.failures(), 1);
  EXPECT_EQ(status.refused(), 0);
  EXPECT_EQ(status.batches(), 10);
  EXPECT_EQ(status.examples(), 20);
  EXPECT_EQ(status.latest_step(), 47);
  EXPECT_EQ(status.swaps(), 1);
  EXPECT_DOUBLE_EQ(predictor_->Rate(), 11 / 5.0);
  clock_.Advance(absl::Seconds(10));
  EXPECT_EQ(predictor_->Rate(), 0);
  const ModelStatistics statistics = predictor_->statistics();
  EXPECT_EQ(statistics.success.count, 10);
  EXPECT_EQ(statistics.fail.count, 1);
  EXPECT_EQ(statistics.inference_count, 20);
  EXPECT_EQ(statistics.queue.count, 10);
  ASSERT_EQ(statistics.batches.size(), 1u);
  EXPECT_EQ(statistics.batches.at(2).compute_infer.count, 10);

  for (int scrape = 0; scrape < 2; ++scrape) {  // mirrored counters do not add up twice
    const std::string text = metrics_->Text();
    EXPECT_THAT(text, HasSubstr("requests_total{code=\"OK\",model=\"alpha\"} 10\n"));
    EXPECT_THAT(text, HasSubstr("requests_total{code=\"INVALID_ARGUMENT\",model=\"alpha\"} 1\n"));
    EXPECT_THAT(text, HasSubstr("codistill_prediction_examples_total{model=\"alpha\"} 20\n"));
    EXPECT_THAT(text, HasSubstr("batch_examples_bucket{model=\"alpha\",le=\"1\"} 0\n"));
    EXPECT_THAT(text, HasSubstr("batch_examples_bucket{model=\"alpha\",le=\"2\"} 10\n"));
    EXPECT_THAT(text, HasSubstr("codistill_model_staleness_steps{model=\"alpha\"} 7\n"));
    EXPECT_THAT(text, HasSubstr("codistill_model_swaps_total{model=\"alpha\"} 1\n"));
    EXPECT_THAT(text, HasSubstr("latency_seconds_count{model=\"alpha\"} 11\n"));
  }
}

}  // namespace
}  // namespace codistill
