// Teachers that are lost, late, busy, or worse: hedging, hints, and how soon one that returns is
// used again.

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/retry_after.h"
#include "common/metrics/metrics.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/teacher_client_fixture.h"
#include "worker/testing/rude_server.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

ScriptedInferenceServer::Answer Always(float value) {
  return [value](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
    AddLogits(value, response);
    return absl::OkStatus();
  };
}

class TeacherLossTest : public TeacherClientTest {};

TEST_F(TeacherLossTest, AHedgeOvertakesASlowServer) {
  auto slow = AddTeacher("beta", Always(1));
  auto fast = AddServer(Always(2));
  slow->Hold();
  options_.codistillation.set_hedge_after_ms(30);
  auto client = Create();
  for (int64_t step = 1; step <= 3; ++step) {
    const absl::Time start = absl::Now();
    const auto predictions = client->Take(Batch(step));
    ASSERT_TRUE(predictions.ok()) << predictions.status();
    ASSERT_EQ(predictions->logits.size(), 1u);
    EXPECT_EQ(Values(predictions->logits[0])[0], 2);
    EXPECT_LT(absl::Now() - start, absl::Seconds(5)) << "the request's own deadline is 10 s";
  }
  EXPECT_TRUE(Eventually([&] { return client->counters().outstanding == 0; }));
  const TeacherSource::Counters counters = client->counters();
  EXPECT_GE(counters.hedged, 1);
  EXPECT_EQ(counters.requests, 3 + counters.hedged);
  EXPECT_EQ(counters.failures, 0) << "who is overtaken has not failed";
  EXPECT_EQ(counters.late, 0);
  EXPECT_TRUE(Eventually([&] { return slow->cancelled() == counters.hedged; }))
      << "the server hears that nobody waits";
  ASSERT_EQ(counters.teachers.size(), 1u);
  EXPECT_EQ(counters.teachers[0].first, "beta");
  EXPECT_EQ(counters.teachers[0].second.hedged, counters.hedged);
}

TEST_F(TeacherLossTest, NoHedgeWithoutNeed) {
  auto one = AddTeacher("beta", Always(1));
  auto two = AddServer(Always(2));
  options_.codistillation.set_hedge_after_ms(10000);
  auto client = Create();
  for (int64_t step = 1; step <= 20; ++step) {
    EXPECT_EQ(client->Take(Batch(step))->logits.size(), 1u);
  }
  EXPECT_EQ(client->counters().hedged, 0);
  EXPECT_EQ(client->counters().requests, 20);
  EXPECT_GT(one->calls(), 0);
  EXPECT_GT(two->calls(), 0);
}

TEST_F(TeacherLossTest, NoHedgeWithoutAnotherServer) {
  auto slow = AddTeacher("beta", Always(1));
  slow->Hold();
  options_.codistillation.set_hedge_after_ms(1);
  options_.codistillation.set_teacher_wait_ms(100);
  auto client = Create();
  EXPECT_TRUE(client->Take(Batch(1))->logits.empty());
  EXPECT_EQ(client->counters().requests, 1);
  EXPECT_EQ(client->counters().late, 1);
}

TEST_F(TeacherLossTest, AFailedHedgeIsAFailureAndTheFirstServerStillCounts) {
  auto slow = AddTeacher("beta", Always(1));
  auto broken = AddServer([](const inference::ModelInferRequest&, inference::ModelInferResponse*) {
    return absl::InternalError("broken");
  });
  slow->Hold();
  options_.codistillation.set_hedge_after_ms(5);
  auto client = Create();
  client->Request(Batch(1));
  ASSERT_TRUE(Eventually([&] { return client->counters().failures >= 2; }))
      << "hedged again and again, with back-off";
  EXPECT_EQ(slow->waiting(), 1);
  slow->Release();
  const auto predictions = client->Take(Batch(1));
  ASSERT_EQ(predictions->logits.size(), 1u);
  EXPECT_EQ(Values(predictions->logits[0])[0], 1);
}

TEST_F(TeacherLossTest, ChainsAreHedgedWithTheSameState) {
  AddState();
  const auto counting = [](float offset) {
    return [offset](const inference::ModelInferRequest& request,
                    inference::ModelInferResponse* response) {
      const std::vector<float> h = Fp32Input(request, "h");
      AddLogits(offset + h[0], response);
      AddFp32Output("h", {1, kRows}, {h[0] + 1, h[1] + 1}, response);
      return absl::OkStatus();
    };
  };
  auto one = AddTeacher("beta", counting(0));
  auto two = AddServer(counting(100));
  options_.codistillation.set_hedge_after_ms(20);
  auto client = Create();
  for (int64_t step = 1; step <= 6; ++step) {
    // Whichever is asked first does not answer.
    if (step % 2 == 0) {
      one->Hold();
      two->Release();
    } else {
      two->Hold();
      one->Release();
    }
    const auto predictions = client->Take(Batch(step));
    ASSERT_EQ(predictions->logits.size(), 1u);
    const float value = Values(predictions->logits[0])[0];
    EXPECT_EQ(value, (step % 2 == 0 ? 100 : 0) + step - 1) << "the state after " << step - 1;
  }
  EXPECT_EQ(client->counters().failures, 0);
}

TEST_F(TeacherLossTest, ABusyServerIsAskedWhenItSaidAndItsNeighbourMeanwhile) {
  std::atomic<bool> busy{true};
  auto first = AddTeacher("beta",
                          [&](const inference::ModelInferRequest&,
                              inference::ModelInferResponse* response) -> absl::Status {
                            if (busy) {
                              return WithRetryAfter(absl::ResourceExhaustedError("queue full"),
                                                    absl::Milliseconds(300));
                            }
                            AddLogits(1, response);
                            return absl::OkStatus();
                          });
  auto second = AddServer(Always(2));
  auto client = Create();
  const absl::Time start = absl::Now();
  for (int64_t step = 1; absl::Now() - start < absl::Milliseconds(200); ++step) {
    EXPECT_EQ(Values(client->Take(Batch(step))->logits.at(0))[0], 2);
  }
  EXPECT_EQ(first->calls(), 1) << "it said when to come again";
  EXPECT_EQ(client->counters().refused, 1);
  EXPECT_EQ(client->counters().failures, 1);
  busy = false;
  int64_t step = 1000000;
  EXPECT_TRUE(Eventually([&] { return client->Take(Batch(step++)).ok() && first->calls() > 1; }));
  EXPECT_EQ(client->counters().failures, 1);
}

class RudeTest : public TeacherLossTest,
                 public ::testing::WithParamInterface<RudeServer::Manner> {};

TEST_P(RudeTest, CostsNothingButItsPredictions) {
  RudeServer rude(GetParam());
  options_.teachers.push_back({"beta", {rude.address()}, {}});
  auto client = Create(CodistillationConfig::SKIP);
  const absl::Time start = absl::Now();
  int64_t step = 0;
  while (absl::Now() - start < absl::Milliseconds(300) || rude.connections() == 0) {
    ++step;
    const absl::Time begin = absl::Now();
    client->Request(Batch(step + 1));
    const auto predictions = client->Take(Batch(step));
    ASSERT_TRUE(predictions.ok());
    EXPECT_TRUE(predictions->logits.empty());
    EXPECT_LT(absl::Now() - begin, absl::Seconds(2));
    ASSERT_LT(absl::Now() - start, absl::Seconds(20)) << "it was never connected to";
    absl::SleepFor(absl::Milliseconds(1));  // a step's own compute
  }
  EXPECT_LT(client->counters().outstanding, 100) << "what nobody wants is not kept";
  const absl::Time end = absl::Now();
  client.reset();
  EXPECT_LT(absl::Now() - end, absl::Seconds(5)) << "nor waited for";
}

INSTANTIATE_TEST_SUITE_P(All, RudeTest,
                         ::testing::Values(RudeServer::kSilent, RudeServer::kGarbage,
                                           RudeServer::kHangsUp),
                         [](const auto& info) {
                           return std::string(info.param == RudeServer::kSilent    ? "Silent"
                                              : info.param == RudeServer::kGarbage ? "Garbage"
                                                                                   : "HangsUp");
                         });

TEST_F(TeacherLossTest, AHedgeIsTheWayAroundASilentServer) {
  RudeServer silent(RudeServer::kSilent);
  auto good = AddTeacher("beta", Always(1));
  options_.teachers[0].addresses.insert(options_.teachers[0].addresses.begin(), silent.address());
  options_.codistillation.set_hedge_after_ms(20);
  auto client = Create();
  const absl::Time start = absl::Now();
  for (int64_t step = 1; step <= 50; ++step) {
    EXPECT_EQ(client->Take(Batch(step))->logits.size(), 1u);
  }
  EXPECT_LT(absl::Now() - start, absl::Seconds(8)) << "a deadline alone is 10 s";
  EXPECT_LT(client->counters().hedged, 25) << "the silent one is soon asked seldom";
}

TEST_F(TeacherLossTest, AnswersOfANeverEndingServerEndAtTheDeadline) {
  auto hung = AddTeacher("beta", Always(1));
  hung->Hold();
  options_.codistillation.set_request_timeout_ms(50);
  options_.codistillation.set_teacher_wait_ms(20000);
  auto client = Create();
  std::thread student([&] { EXPECT_EQ(client->Take(Batch(1))->logits.size(), 1u); });
  EXPECT_TRUE(Eventually([&] { return client->counters().failures >= 2; }));
  EXPECT_THAT(client->counters().last_error, HasSubstr("DEADLINE_EXCEEDED"));
  hung->Release();
  student.join();
}

TEST_F(TeacherLossTest, WaitsForAReturningServer) {
  // All servers are gone; WAIT lets the step wait until one is back.
  auto server = AddTeacher("beta", Always(1));
  server->Hold();
  options_.codistillation.set_request_timeout_ms(200);  // also of the last, good question
  auto client = Create(CodistillationConfig::WAIT);
  std::atomic<bool> taken{false};
  std::thread student([&] {
    EXPECT_EQ(client->Take(Batch(1))->logits.size(), 1u);
    taken = true;
  });
  EXPECT_TRUE(Eventually([&] { return client->counters().failures >= 3; }));
  EXPECT_FALSE(taken);
  server->Release();
  const absl::Time released = absl::Now();
  student.join();
  EXPECT_LT(absl::Now() - released, absl::Seconds(2));
}

TEST_F(TeacherLossTest, FailEndsAtOnceAndNamesEveryTeacher) {
  auto gone = ScriptedInferenceServer::Start(nullptr);
  options_.teachers.push_back({"beta", {gone->address()}, {}});
  options_.teachers.push_back({"gamma", {gone->address()}, {}});
  gone.reset();
  auto client = Create(CodistillationConfig::FAIL);
  client->Request(Batch(1));
  ASSERT_TRUE(Eventually([&] { return client->counters().failures > 1; }));
  const absl::Time start = absl::Now();
  const auto predictions = client->Take(Batch(1));
  EXPECT_LT(absl::Now() - start, absl::Seconds(2)) << "teacher_wait_ms is 0";
  ASSERT_FALSE(predictions.ok());
  EXPECT_THAT(predictions.status().ToString(), HasSubstr("predictions of beta, gamma"));
}

TEST_F(TeacherLossTest, LateQuestionsAreCountedByTeacher) {
  auto good = AddTeacher("beta", Always(1));
  auto slow = AddTeacher("gamma", Always(2));
  slow->Hold();
  auto client = Create(CodistillationConfig::SKIP);
  for (int64_t step = 1; step <= 3; ++step) {
    client->Request(Batch(step));
    ASSERT_TRUE(Eventually([&] { return slow->waiting() == 1 && good->calls() == step; }));
    ASSERT_TRUE(Eventually([&] { return client->counters().outstanding == 1; }));
    EXPECT_EQ(client->Take(Batch(step))->logits.size(), 1u);
    ASSERT_TRUE(Eventually([&] { return client->counters().outstanding == 0; }));
  }
  const TeacherSource::Counters counters = client->counters();
  EXPECT_EQ(counters.late, 3);
  ASSERT_EQ(counters.teachers.size(), 2u);
  EXPECT_EQ(counters.teachers[0].second.late, 0);
  EXPECT_EQ(counters.teachers[0].second.requests, 3);
  EXPECT_EQ(counters.teachers[1].second.late, 3);
  EXPECT_EQ(counters.failures, 0);
}

}  // namespace
}  // namespace codistill
