// Answers in an order of the test's choosing: what the teacher client makes of generations that
// overtake one another, and of where a worker is.

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "common/base/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/teacher_client_fixture.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

// What was asked, to be answered by the test.
class Questions {
 public:
  struct Asked {
    InferenceQuestion question;
    InferenceChannel::Done done;  // null once answered
  };

  size_t size() const {
    MutexLock lock(&mu_);
    return asked_.size();
  }
  void Add(InferenceQuestion question, InferenceChannel::Done done) {
    MutexLock lock(&mu_);
    asked_.push_back({std::move(question), std::move(done)});
  }
  InferenceQuestion question(size_t index) const {
    MutexLock lock(&mu_);
    if (index < asked_.size()) return asked_[index].question;
    InferenceQuestion none;
    none.batch = std::make_shared<TeacherBatch>();
    return none;
  }
  // The next question: its index. There is one soon, or the test has failed.
  size_t Await() {
    const size_t index = seen_++;
    EXPECT_TRUE(Eventually([&] { return size() > index; }));
    return index;
  }
  void Answer(size_t index, absl::StatusOr<InferenceAnswer> answer) {
    InferenceChannel::Done done;
    {
      MutexLock lock(&mu_);
      if (index >= asked_.size()) return;
      done = std::move(asked_[index].done);
      asked_[index].done = nullptr;
    }
    if (done != nullptr) done(std::move(answer));
  }
  void CancelAll() {
    for (size_t i = 0; i < size(); ++i) Answer(i, absl::CancelledError());
  }

 private:
  mutable Mutex mu_;
  std::vector<Asked> asked_ ABSL_GUARDED_BY(mu_);
  size_t seen_ = 0;
};

class ManualChannel final : public InferenceChannel {
 public:
  explicit ManualChannel(Questions* questions) : questions_(questions) {}
  ~ManualChannel() override { questions_->CancelAll(); }
  std::shared_ptr<Call> Ask(int, InferenceQuestion question, absl::Time, Done done) override {
    questions_->Add(std::move(question), std::move(done));
    return std::make_shared<NoCall>();
  }

 private:
  struct NoCall final : Call {
    void Cancel() override {}
  };
  Questions* const questions_;
};

InferenceAnswer Of(uint64_t generation, float value, float state = 0) {
  InferenceAnswer answer;
  answer.logits = Tensor::Allocate(DT_FLOAT, {kRows, kOutputs});
  for (float& logit : answer.logits.As<float>()) logit = value;
  answer.generation = generation;
  Tensor after = Tensor::Zeros(DT_FLOAT, {1, kRows});
  after.As<float>()[0] = state;
  answer.states.push_back(after);
  return answer;
}

class TeacherOrderTest : public TeacherClientTest {
 protected:
  std::unique_ptr<TeacherSource> CreateManual() {
    options_.teachers = {{"beta", {"beta:1"}, {}}};
    options_.codistillation.set_teacher_wait_ms(5000);
    options_.channel = std::make_unique<ManualChannel>(&questions_);
    return Create();
  }
  float Seen(TeacherSource* client, int64_t step) {
    const auto predictions = client->Take(Batch(step));
    EXPECT_TRUE(predictions.ok()) << predictions.status();
    return predictions.ok() && !predictions->logits.empty() ? Values(predictions->logits[0])[0]
                                                            : -1;
  }
  Questions questions_;  // outlives the client
};

TEST_F(TeacherOrderTest, AWorkerThatResumesIsWhereItAnnounces) {
  auto client = CreateManual();
  for (int64_t first : {1001, 501}) {
    // Before any step of this process has begun; and again after its group was restored.
    for (int64_t step = first; step < first + 3; ++step) {
      client->Request(Batch(step));
      questions_.Answer(questions_.Await(), Of(1, 7));
    }
    EXPECT_EQ(client->Take(Batch(first))->prefetch_lag_steps, 1);
    EXPECT_EQ(client->Take(Batch(first + 2))->prefetch_lag_steps, 3);
    client->Reset();
  }
}

TEST_F(TeacherOrderTest, ALateAnswerOfTheOldGenerationDoesNotBringItBack) {
  auto client = CreateManual();
  client->Request(Batch(1));
  client->Request(Batch(2));
  const size_t one = questions_.Await();
  const size_t two = questions_.Await();
  // The server has changed over between its passes, and their answers overtake one another.
  questions_.Answer(two, Of(/*generation=*/2, 22));
  questions_.Answer(one, Of(/*generation=*/1, 11));
  EXPECT_THAT(client->counters().last_error, HasSubstr("generation 1 of its group, which is in 2"));
  const size_t again = questions_.Await();
  EXPECT_EQ(questions_.question(again).batch->step, 1) << "it alone";
  questions_.Answer(again, Of(2, 21));
  EXPECT_EQ(Seen(client.get(), 1), 21);
  EXPECT_EQ(Seen(client.get(), 2), 22);
  EXPECT_EQ(client->counters().requests, 3);
  // What a server says to questions asked since is believed: numbers may begin anew.
  client->Request(Batch(3));
  questions_.Answer(questions_.Await(), Of(1, 13));
  EXPECT_EQ(Seen(client.get(), 3), 13);
}

TEST_F(TeacherOrderTest, AChainStartsOnceMoreInAnotherGeneration) {
  AddState();
  auto client = CreateManual();
  for (int64_t step = 1; step <= 5; ++step) client->Request(Batch(step));
  for (int64_t step = 1; step <= 2; ++step) {
    questions_.Answer(questions_.Await(), Of(1, 10 + step, step));
  }
  size_t asked = questions_.Await();
  EXPECT_EQ(questions_.question(asked).batch->step, 3);
  questions_.Answer(asked, Of(2, 20, 99));
  // The answers to 1 and 2 are of the past; that to 3 continues them.
  for (int64_t step = 1; step <= 5; ++step) {
    asked = questions_.Await();
    const InferenceQuestion question = questions_.question(asked);
    ASSERT_EQ(question.batch->step, step);
    if (step == 1) {
      EXPECT_TRUE(question.states.empty()) << "zeros";
    } else {
      ASSERT_EQ(question.states.size(), 1u) << "a second gap at " << step;
      EXPECT_EQ(question.states[0].As<float>()[0], 200 + step - 1);
    }
    questions_.Answer(asked, Of(2, 20 + step, 200 + step));
  }
  for (int64_t step = 1; step <= 5; ++step) EXPECT_EQ(Seen(client.get(), step), 20 + step);
  EXPECT_EQ(client->counters().requests, 8);
  EXPECT_EQ(client->counters().failures, 0);
}

}  // namespace
}  // namespace codistill
