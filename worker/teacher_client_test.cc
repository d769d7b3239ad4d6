#include "worker/teacher_client.h"

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/teacher_client_fixture.h"
#include "worker/testing/scripted_inference_server.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST_F(TeacherClientTest, PredictionsWithTheirVersion) {
  std::string model;
  std::vector<float> x;
  int64_t allowed = -1;
  auto server = AddTeacher("beta", [&](const inference::ModelInferRequest& request,
                                       inference::ModelInferResponse* response) {
    model = request.model_name();
    x = Fp32Input(request, "x");
    allowed = request.parameters().at("max_staleness_steps").int64_param();
    AddFp32Output("logits", {kRows, kOutputs}, {1, 2, 3, 4, 5, 6}, response);
    SetVersion(3, 40, 47, response);
    return absl::OkStatus();
  });
  auto client = Create();
  client->Request(Batch(5, 0.5));
  auto predictions = client->Take(Batch(5, 0.5));
  ASSERT_TRUE(predictions.ok()) << predictions.status();
  ASSERT_EQ(predictions->logits.size(), 1u);
  EXPECT_THAT(Values(predictions->logits[0]), ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_THAT(predictions->logits[0].shape(), ElementsAre(kRows, kOutputs));
  EXPECT_EQ(predictions->staleness_steps, 7);
  EXPECT_EQ(model, "beta");
  EXPECT_THAT(x, ElementsAre(0.5f, 0.5f));
  EXPECT_EQ(allowed, 10);
  EXPECT_EQ(client->counters().requests, 1);
  EXPECT_EQ(client->counters().failures, 0);
  EXPECT_EQ(client->counters().outstanding, 0);
}

TEST_F(TeacherClientTest, AnswersAwaitTheStepThatWasAnnounced) {
  auto server = AddTeacher("beta", [&](const inference::ModelInferRequest& request,
                                       inference::ModelInferResponse* response) {
    AddLogits(Fp32Input(request, "x")[0], response);
    return absl::OkStatus();
  });
  auto client = Create();
  client->BeginStep(4);
  for (int64_t step = 5; step < 8; ++step) client->Request(Batch(step, step));
  ASSERT_TRUE(Eventually([&] { return client->counters().outstanding == 0; }));
  EXPECT_EQ(server->calls(), 3);
  for (int64_t step = 5; step < 8; ++step) {
    client->BeginStep(step);
    auto predictions = client->Take(Batch(step, step));
    ASSERT_TRUE(predictions.ok());
    ASSERT_EQ(predictions->logits.size(), 1u);
    EXPECT_EQ(Values(predictions->logits[0])[0], step);
    EXPECT_EQ(predictions->prefetch_lag_steps, step - 4);
  }
  EXPECT_EQ(server->calls(), 3) << "what was announced is asked once";
}

TEST_F(TeacherClientTest, SkipNeverWaitsAndComesBackByItself) {
  auto server = AddTeacher(
      "beta", [](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        AddLogits(1, response);
        return absl::OkStatus();
      });
  server->Hold();
  auto client = Create(CodistillationConfig::SKIP);
  client->Request(Batch(1));
  ASSERT_TRUE(Eventually([&] { return server->waiting() == 1; }));
  const absl::Time start = absl::Now();
  auto predictions = client->Take(Batch(1));
  EXPECT_LT(absl::Now() - start, absl::Seconds(5)) << "the request's own deadline is 10 s";
  ASSERT_TRUE(predictions.ok());
  EXPECT_TRUE(predictions->logits.empty());
  EXPECT_TRUE(Eventually([&] { return server->cancelled() == 1; }))
      << "nobody wants the answer: the server hears of it";
  EXPECT_TRUE(Eventually([&] { return client->counters().outstanding == 0; }));
  EXPECT_EQ(client->counters().failures, 0) << "late is not failed";
  server->Release();
  client->Request(Batch(2));
  ASSERT_TRUE(Eventually([&] { return client->counters().outstanding == 0; }));
  predictions = client->Take(Batch(2));
  ASSERT_TRUE(predictions.ok());
  EXPECT_EQ(predictions->logits.size(), 1u);
}

TEST_F(TeacherClientTest, SkipWaitsAsLongAsTheJobSays) {
  auto server = AddTeacher(
      "beta", [](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        AddLogits(1, response);
        return absl::OkStatus();
      });
  options_.codistillation.set_teacher_wait_ms(20000);
  auto client = Create(CodistillationConfig::SKIP);
  auto predictions = client->Take(Batch(1));  // not even announced
  ASSERT_TRUE(predictions.ok());
  EXPECT_EQ(predictions->logits.size(), 1u);
}

TEST_F(TeacherClientTest, WaitWaitsForTheAnswer) {
  auto server = AddTeacher(
      "beta", [](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        AddLogits(1, response);
        return absl::OkStatus();
      });
  server->Hold();
  auto client = Create();
  std::atomic<bool> taken{false};
  std::thread student([&] {
    auto predictions = client->Take(Batch(1));
    EXPECT_TRUE(predictions.ok());
    EXPECT_EQ(predictions->logits.size(), 1u);
    taken = true;
  });
  EXPECT_TRUE(Eventually([&] { return server->waiting() == 1; }));
  EXPECT_FALSE(taken);
  server->Release();
  student.join();
}

TEST_F(TeacherClientTest, WaitGivesUpAfterItsTimeAndWhenLeaving) {
  auto server = AddTeacher("beta", [](const inference::ModelInferRequest&,
                                      inference::ModelInferResponse*) { return absl::OkStatus(); });
  server->Hold();
  options_.codistillation.set_teacher_wait_ms(30);
  auto client = Create();
  auto predictions = client->Take(Batch(1));
  ASSERT_TRUE(predictions.ok());
  EXPECT_TRUE(predictions->logits.empty());

  options_ = {};
  options_.teachers = {{"beta", {server->address()}, {}}};
  auto leaving = Create();  // would wait a minute
  std::thread student([&] { EXPECT_TRUE(leaving->Take(Batch(1))->logits.empty()); });
  leaving->StopWaiting();
  student.join();
}

TEST_F(TeacherClientTest, FailNamesTheTeacher) {
  auto good = AddTeacher(
      "beta", [](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        AddLogits(1, response);
        return absl::OkStatus();
      });
  auto bad =
      AddTeacher("gamma", [](const inference::ModelInferRequest&, inference::ModelInferResponse*) {
        return absl::NotFoundError("no model gamma here");
      });
  options_.codistillation.set_teacher_wait_ms(300);
  auto client = Create(CodistillationConfig::FAIL);
  auto predictions = client->Take(Batch(9));
  ASSERT_FALSE(predictions.ok());
  EXPECT_THAT(predictions.status().ToString(), HasSubstr("step 9"));
  EXPECT_THAT(predictions.status().ToString(), HasSubstr("gamma"));
  EXPECT_THAT(predictions.status().ToString(), ::testing::Not(HasSubstr("beta")));
  EXPECT_THAT(predictions.status().ToString(), HasSubstr("no model gamma here"));
  EXPECT_THAT(predictions.status().ToString(), HasSubstr(bad->address()));
}

TEST_F(TeacherClientTest, FailuresAreCountedAndAskedAgain) {
  int calls = 0;
  auto server = AddTeacher("beta",
                           [&](const inference::ModelInferRequest&,
                               inference::ModelInferResponse* response) -> absl::Status {
                             if (++calls <= 3)
                               return absl::UnavailableError("no version loaded yet");
                             AddLogits(1, response);
                             return absl::OkStatus();
                           });
  auto client = Create();
  auto predictions = client->Take(Batch(1));
  ASSERT_TRUE(predictions.ok());
  EXPECT_EQ(predictions->logits.size(), 1u);
  EXPECT_EQ(client->counters().requests, 4);
  EXPECT_EQ(client->counters().failures, 3);
  EXPECT_THAT(client->counters().last_error, HasSubstr("no version loaded yet"));
}

TEST_F(TeacherClientTest, AskedAgainBeforeItsStepComes) {
  int calls = 0;
  auto server = AddTeacher("beta",
                           [&](const inference::ModelInferRequest&,
                               inference::ModelInferResponse* response) -> absl::Status {
                             if (++calls == 1) return absl::ResourceExhaustedError("queue full");
                             AddLogits(1, response);
                             return absl::OkStatus();
                           });
  auto client = Create(CodistillationConfig::SKIP);
  client->Request(Batch(7));
  ASSERT_TRUE(Eventually([&] { return client->counters().requests == 2; }));
  ASSERT_TRUE(Eventually([&] { return client->counters().outstanding == 0; }));
  EXPECT_EQ(client->Take(Batch(7))->logits.size(), 1u);
}

TEST_F(TeacherClientTest, AnotherServerTakesOver) {
  auto server = AddTeacher(
      "beta", [](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        AddLogits(1, response);
        return absl::OkStatus();
      });
  auto gone = ScriptedInferenceServer::Start(nullptr);
  options_.teachers[0].addresses.insert(options_.teachers[0].addresses.begin(), gone->address());
  gone.reset();
  auto client = Create();
  for (int64_t step = 1; step <= 5; ++step) {
    EXPECT_EQ(client->Take(Batch(step))->logits.size(), 1u) << step;
  }
  EXPECT_GE(client->counters().failures, 1);
  EXPECT_EQ(server->calls(), 5);
}

TEST_F(TeacherClientTest, ServersShareTheLoad) {
  auto answer = [](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
    AddLogits(1, response);
    return absl::OkStatus();
  };
  auto one = AddTeacher("beta", answer);
  auto two = ScriptedInferenceServer::Start(answer);
  options_.teachers[0].addresses.push_back(two->address());
  one->Hold();
  two->Hold();
  auto client = Create();
  for (int64_t step = 1; step <= 4; ++step) client->Request(Batch(step));
  EXPECT_TRUE(Eventually([&] { return one->waiting() == 2 && two->waiting() == 2; }));
}

TEST_F(TeacherClientTest, StaleAnswersAreNotUsed) {
  int calls = 0;
  auto server = AddTeacher(
      "beta", [&](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        AddLogits(static_cast<float>(++calls), response);
        SetVersion(1, 100, calls <= 2 ? 111 : 110, response);
        return absl::OkStatus();
      });
  auto client = Create();
  auto predictions = client->Take(Batch(1));
  ASSERT_TRUE(predictions.ok());
  ASSERT_EQ(predictions->logits.size(), 1u);
  EXPECT_EQ(Values(predictions->logits[0])[0], 3);
  EXPECT_EQ(predictions->staleness_steps, 10);
  EXPECT_EQ(client->counters().failures, 2);
  EXPECT_THAT(client->counters().last_error, HasSubstr("at most 10 steps"));
}

TEST_F(TeacherClientTest, TypedContentsAreUnderstood) {
  auto server = AddTeacher(
      "beta", [](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        auto* output = response->add_outputs();
        output->set_name("logits");
        output->set_datatype("FP32");
        output->add_shape(kRows);
        output->add_shape(kOutputs);
        for (int i = 0; i < 6; ++i) output->mutable_contents()->add_fp32_contents(i);
        return absl::OkStatus();
      });
  EXPECT_THAT(Values(Create()->Take(Batch(1))->logits.at(0)), ElementsAre(0, 1, 2, 3, 4, 5));
}

struct Malformed {
  std::string name;
  std::function<void(inference::ModelInferResponse*)> answer;
  std::string message;
};

class MalformedAnswerTest : public TeacherClientTest,
                            public ::testing::WithParamInterface<Malformed> {};

TEST_P(MalformedAnswerTest, IsAFailureThatNamesIt) {
  auto server = AddTeacher(
      "beta", [](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        GetParam().answer(response);
        return absl::OkStatus();
      });
  options_.codistillation.set_teacher_wait_ms(30);
  auto client = Create();
  client->Request(Batch(1));
  ASSERT_TRUE(Eventually([&] { return client->counters().failures > 0; }));
  EXPECT_TRUE(client->Take(Batch(1))->logits.empty());
  EXPECT_THAT(client->counters().last_error, HasSubstr(GetParam().message));
  EXPECT_THAT(client->counters().last_error, HasSubstr("teacher beta at " + server->address()));
}

INSTANTIATE_TEST_SUITE_P(
    All, MalformedAnswerTest,
    ::testing::Values(
        Malformed{"NoLogits",
                  [](inference::ModelInferResponse* r) { AddFp32Output("scores", {1}, {1}, r); },
                  "no output \"logits\"; it has [scores]"},
        Malformed{"Shape",
                  [](inference::ModelInferResponse* r) {
                    AddFp32Output("logits", {3, 2}, std::vector<float>(6), r);
                  },
                  "shape [3, 2]; [2, 3] is expected"},
        Malformed{"HugeShape",
                  [](inference::ModelInferResponse* r) {
                    AddFp32Output("logits", {int64_t{1} << 62, 4, 3}, std::vector<float>(6), r);
                  },
                  "[2, 3] is expected"},
        Malformed{"Length",
                  [](inference::ModelInferResponse* r) {
                    AddFp32Output("logits", {2, 3}, std::vector<float>(5), r);
                  },
                  "20 bytes where its shape takes 24"},
        Malformed{"Type",
                  [](inference::ModelInferResponse* r) {
                    AddFp32Output("logits", {2, 3}, std::vector<float>(6), r);
                    r->mutable_outputs(0)->set_datatype("FP64");
                  },
                  "FP64; FP32 is expected"},
        Malformed{"NoContents",
                  [](inference::ModelInferResponse* r) {
                    AddFp32Output("logits", {2, 3}, std::vector<float>(6), r);
                    r->clear_raw_output_contents();
                  },
                  "\"logits\" has none"}),
    [](const auto& info) { return info.param.name; });

TEST_F(TeacherClientTest, UsesTheTeachersThatAnswered) {
  auto good = AddTeacher(
      "beta", [](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        AddLogits(2, response);
        SetVersion(1, 5, 6, response);
        return absl::OkStatus();
      });
  auto slow = AddTeacher(
      "gamma", [](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        AddLogits(3, response);
        SetVersion(1, 5, 9, response);
        return absl::OkStatus();
      });
  slow->Hold();
  auto client = Create(CodistillationConfig::SKIP);
  client->Request(Batch(1));
  ASSERT_TRUE(Eventually([&] { return client->counters().outstanding == 1; }));
  auto predictions = client->Take(Batch(1));
  ASSERT_EQ(predictions->logits.size(), 1u);
  EXPECT_EQ(Values(predictions->logits[0])[0], 2);
  EXPECT_EQ(predictions->staleness_steps, 1);
  slow->Release();
  client->Request(Batch(2));
  ASSERT_TRUE(Eventually([&] { return client->counters().outstanding == 0; }));
  predictions = client->Take(Batch(2));
  ASSERT_EQ(predictions->logits.size(), 2u);
  EXPECT_EQ(predictions->staleness_steps, 4);
}

TEST_F(TeacherClientTest, PredictionsOfAnotherGenerationOrBatchAreNotUsed) {
  auto server = AddTeacher("beta", [](const inference::ModelInferRequest& request,
                                      inference::ModelInferResponse* response) {
    AddLogits(Fp32Input(request, "x")[0], response);
    return absl::OkStatus();
  });
  auto client = Create();
  client->Request(Batch(3, 1));
  ASSERT_TRUE(Eventually([&] { return client->counters().outstanding == 0; }));
  auto replayed = client->Take(Batch(3, 2, /*generation=*/2));
  EXPECT_EQ(Values(replayed->logits.at(0))[0], 2);
  client->Request(Batch(4, 1));
  TeacherBatch other = Batch(4, 5);
  other.example_hash = 77;
  EXPECT_EQ(Values(client->Take(other)->logits.at(0))[0], 5);
  client->Request(Batch(5, 1));
  client->Reset();
  EXPECT_EQ(Values(client->Take(Batch(5, 6))->logits.at(0))[0], 6);
}

TEST_F(TeacherClientTest, PredictionsOfATeachersOlderGenerationAreDropped) {
  std::atomic<int> generation{3};
  auto server = AddTeacher(
      "beta", [&](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
        AddLogits(static_cast<float>(generation.load()), response);
        SetVersion(generation.load(), 40, 40, response);
        return absl::OkStatus();
      });
  auto client = Create();
  client->Request(Batch(5));
  client->Request(Batch(6));
  ASSERT_TRUE(Eventually([&] { return client->counters().outstanding == 0; }));
  ASSERT_EQ(server->calls(), 2);
  // The teacher's group is restored between the question and its use.
  generation.store(4);
  client->Request(Batch(7));
  ASSERT_TRUE(
      Eventually([&] { return server->calls() == 5 && client->counters().outstanding == 0; }));
  for (int64_t step = 5; step <= 7; ++step) {
    const auto predictions = client->Take(Batch(step));
    ASSERT_TRUE(predictions.ok()) << predictions.status();
    EXPECT_EQ(Values(predictions->logits.at(0))[0], 4) << "step " << step;
  }
  EXPECT_EQ(client->counters().failures, 0);
}

TEST_F(TeacherClientTest, AServerThatLagsBehindItsGroupsGenerationIsNotBelieved) {
  auto versioned = [](uint64_t generation) {
    return
        [generation](const inference::ModelInferRequest&, inference::ModelInferResponse* response) {
          AddLogits(static_cast<float>(generation), response);
          SetVersion(generation, 40, 40, response);
          return absl::OkStatus();
        };
  };
  auto ahead = AddTeacher("beta", versioned(9));
  auto lagging = ScriptedInferenceServer::Start(versioned(8));
  options_.teachers.back().addresses.push_back(lagging->address());
  auto client = Create();
  for (int64_t step = 1; step <= 20; ++step) {
    client->Request(Batch(step));
    client->Request(Batch(step + 1));
    const auto predictions = client->Take(Batch(step));
    ASSERT_TRUE(predictions.ok()) << predictions.status();
    if (step > 2) {
      EXPECT_EQ(Values(predictions->logits.at(0))[0], 9) << "step " << step;
    }
  }
}

// A recurrent teacher whose state counts the batches it has seen.
class RecurrentTeacherTest : public TeacherClientTest {
 protected:
  ScriptedInferenceServer::Answer Counting() {
    return [this](const inference::ModelInferRequest& request,
                  inference::ModelInferResponse* response) -> absl::Status {
      if (fail_next_ > 0) {
        --fail_next_;
        return absl::InternalError("broken");
      }
      const std::vector<float> h = Fp32Input(request, "h");
      if (h.size() != kRows) return absl::InvalidArgumentError("bad state");
      AddLogits(h[0], response);
      AddFp32Output("h", {1, kRows}, {h[0] + 1, h[1] + 1}, response);
      return absl::OkStatus();
    };
  }
  float Seen(TeacherSource* client, const TeacherBatch& batch) {
    auto predictions = client->Take(batch);
    if (!predictions.ok() || predictions->logits.empty()) return -1;
    return Values(predictions->logits[0])[0];
  }
  std::atomic<int> fail_next_{0};
};

TEST_F(RecurrentTeacherTest, StateGoesFromBatchToBatch) {
  AddState();
  auto server = AddTeacher("beta", Counting());
  server->Hold();
  auto client = Create();
  for (int64_t step = 11; step <= 14; ++step) client->Request(Batch(step));
  ASSERT_TRUE(Eventually([&] { return server->waiting() == 1; }));
  EXPECT_EQ(client->counters().outstanding, 1) << "one at a time: the next needs its state";
  server->Release();
  for (int64_t step = 11; step <= 14; ++step) {
    EXPECT_EQ(Seen(client.get(), Batch(step)), step - 11);
  }
}

TEST_F(RecurrentTeacherTest, EpochsAndGapsStartFromZeros) {
  AddState();
  auto server = AddTeacher("beta", Counting());
  auto client = Create();
  EXPECT_EQ(Seen(client.get(), Batch(1)), 0);
  EXPECT_EQ(Seen(client.get(), Batch(2)), 1);
  TeacherBatch start = Batch(3);
  start.starts_epoch = true;
  EXPECT_EQ(Seen(client.get(), start), 0);
  EXPECT_EQ(Seen(client.get(), Batch(4)), 1);
  EXPECT_EQ(Seen(client.get(), Batch(6)), 0) << "the state after step 5 is not known";
  EXPECT_EQ(Seen(client.get(), Batch(7)), 1);
  client->Reset();
  EXPECT_EQ(Seen(client.get(), Batch(8)), 0);
}

TEST_F(RecurrentTeacherTest, LateAnswersStillBringTheState) {
  AddState();
  auto server = AddTeacher("beta", Counting());
  auto client = Create(CodistillationConfig::SKIP);
  server->Hold();
  client->Request(Batch(1));
  client->Request(Batch(2));
  ASSERT_TRUE(Eventually([&] { return server->waiting() == 1; }));
  EXPECT_EQ(Seen(client.get(), Batch(1)), -1);
  server->Release();
  ASSERT_TRUE(Eventually(
      [&] { return client->counters().requests == 2 && client->counters().outstanding == 0; }));
  EXPECT_EQ(server->cancelled(), 0);
  EXPECT_EQ(Seen(client.get(), Batch(2)), 1);
}

TEST_F(RecurrentTeacherTest, FailuresKeepTheStateUntilTheirStepIsOver) {
  AddState();
  auto server = AddTeacher("beta", Counting());
  options_.codistillation.set_teacher_wait_ms(10000);
  auto client = Create();
  EXPECT_EQ(Seen(client.get(), Batch(1)), 0);
  fail_next_ = 2;
  EXPECT_EQ(Seen(client.get(), Batch(2)), 1) << "asked again with the state after step 1";
  EXPECT_EQ(client->counters().failures, 2);
}

TEST(TeacherClientCreateTest, NamesTheTeacherWithoutAnAddress) {
  EXPECT_FALSE(TeacherClient::Create({}).ok());
  TeacherClient::Options options;
  options.teachers = {{"beta", {}, {}}};
  EXPECT_THAT(TeacherClient::Create(std::move(options)).status().ToString(), HasSubstr("beta"));
}

}  // namespace
}  // namespace codistill
