#include "worker/local_teachers.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "common/model/testing/puppet_model.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/teacher_batch_fixture.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

Model::Logits Constant(float value, int64_t rows = kRows) {
  Tensor logits = Tensor::Allocate(DT_FLOAT, {rows, kOutputs});
  for (float& element : logits.As<float>()) element = value;
  return {logits, rows};
}

// A model whose logits are its input plus a constant.
std::shared_ptr<PuppetModel> Adding(float constant) {
  return std::make_shared<PuppetModel>([constant](absl::Span<const Tensor> inputs, Model::States*) {
    return Constant(inputs[0].As<float>()[0] + constant);
  });
}

// Its state counts the batches of a text; the logits are what it was before.
std::shared_ptr<PuppetModel> Counting() {
  return std::make_shared<PuppetModel>([](absl::Span<const Tensor>, Model::States* states) {
    const float before = states->empty() ? 0 : (*states)[0].As<float>()[0];
    Tensor after = Tensor::Allocate(DT_FLOAT, {1, 1});
    after.As<float>()[0] = before + 1;
    *states = {after};
    return Constant(before);
  });
}

// The first logit of every teacher.
std::vector<float> Seen(TeacherSource* teachers, const TeacherBatch& batch) {
  const auto predictions = teachers->Take(batch);
  EXPECT_TRUE(predictions.ok()) << predictions.status();
  std::vector<float> seen;
  if (!predictions.ok()) return seen;
  for (const Tensor& logits : predictions->logits) seen.push_back(logits.As<float>()[0]);
  return seen;
}

class LocalTeachersTest : public ::testing::Test {
 protected:
  LocalTeachersTest() {
    options_.model.set_num_outputs(kOutputs);
    options_.codistillation.set_max_staleness_steps(10);
  }

  // Owned by the source.
  PuppetFollowedModel* AddTeacher(const std::string& name) {
    auto followed = std::make_unique<PuppetFollowedModel>();
    PuppetFollowedModel* const model = followed.get();
    options_.teachers.push_back({name, std::move(followed)});
    return model;
  }

  std::unique_ptr<LocalTeachers> Create(
      CodistillationConfig::OnTeacherLoss policy = CodistillationConfig::SKIP) {
    options_.codistillation.set_on_teacher_loss(policy);
    auto teachers = LocalTeachers::Create(std::move(options_));
    EXPECT_TRUE(teachers.ok()) << teachers.status();
    return *std::move(teachers);
  }

  void MakeRecurrent() { options_.model.add_states()->set_name("h"); }

  LocalTeachers::Options options_;
};

TEST_F(LocalTeachersTest, NeedsTeachers) { EXPECT_FALSE(LocalTeachers::Create({}).ok()); }

TEST_F(LocalTeachersTest, ComputesAheadInOrderWithTheHeldVersion) {
  PuppetFollowedModel* const beta = AddTeacher("beta");
  std::vector<float> order;
  const auto model =
      std::make_shared<PuppetModel>([&order](absl::Span<const Tensor> inputs, Model::States*) {
        order.push_back(inputs[0].As<float>()[0]);
        return Constant(order.back() + 100);
      });
  beta->Hold(model, 1, 40);
  beta->SetGroupStep(1, 47);
  auto teachers = Create();
  teachers->BeginStep(3);
  teachers->Request(Batch(4, 0.5));
  teachers->Request(Batch(5, 1.5));
  teachers->Request(Batch(4, 0.5));
  while (teachers->counters().requests < 2) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_THAT(Seen(teachers.get(), Batch(4, 0.5)), ElementsAre(100.5));
  const auto predictions = teachers->Take(Batch(5, 1.5));
  ASSERT_TRUE(predictions.ok()) << predictions.status();
  ASSERT_EQ(predictions->logits.size(), 1u);
  EXPECT_THAT(predictions->logits[0].shape(), ElementsAre(kRows, kOutputs));
  EXPECT_EQ(predictions->logits[0].As<float>()[5], 101.5);
  EXPECT_EQ(predictions->staleness_steps, 7);
  EXPECT_EQ(predictions->prefetch_lag_steps, 2);
  EXPECT_THAT(order, ElementsAre(0.5, 1.5));
  EXPECT_EQ(teachers->counters().requests, 2);
  EXPECT_EQ(teachers->counters().failures, 0);
}

TEST_F(LocalTeachersTest, WaitsForAPassUnderWay) {
  PuppetFollowedModel* const beta = AddTeacher("beta");
  const auto model = Adding(1);
  beta->Hold(model, 1, 40);
  model->HoldUp();
  auto teachers = Create(CodistillationConfig::SKIP);
  std::atomic<bool> taken{false};
  std::vector<float> seen;
  std::thread student([&] {
    seen = Seen(teachers.get(), Batch(1));
    taken = true;
  });
  model->AwaitPasses(1);
  EXPECT_FALSE(taken) << "the pass is the step's own compute";
  model->LetGo();
  student.join();
  EXPECT_THAT(seen, ElementsAre(1));
}

TEST_F(LocalTeachersTest, SkipsWhileNothingIsLoaded) {
  PuppetFollowedModel* const beta = AddTeacher("beta");
  AddTeacher("gamma")->Hold(Adding(2), 1, 5);
  auto teachers = Create(CodistillationConfig::SKIP);
  EXPECT_THAT(Seen(teachers.get(), Batch(1)), ElementsAre(2));
  EXPECT_THAT(Seen(teachers.get(), Batch(2)), ElementsAre(2));
  EXPECT_EQ(teachers->counters().failures, 2);
  EXPECT_THAT(teachers->counters().last_error, HasSubstr("teacher beta: UNAVAILABLE: waiting"));
  const auto by_teacher = teachers->counters().teachers;
  ASSERT_EQ(by_teacher.size(), 2u);
  EXPECT_EQ(by_teacher[0].first, "beta");
  EXPECT_EQ(by_teacher[0].second.failures, 2);
  EXPECT_EQ(by_teacher[1].second.requests, 2);
  beta->Hold(Adding(1), 1, 5);
  // It is tried again by itself while batches wait for it.
  int64_t step = 3;
  std::vector<float> seen;
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (seen.size() < 2 && absl::Now() < deadline) {
    teachers->Request(Batch(step));
    absl::SleepFor(absl::Milliseconds(1));
    seen = Seen(teachers.get(), Batch(step++));
  }
  EXPECT_THAT(seen, ElementsAre(1, 2));
  const int64_t failures = teachers->counters().failures;
  EXPECT_THAT(Seen(teachers.get(), Batch(step)), ElementsAre(1, 2));
  EXPECT_EQ(teachers->counters().failures, failures);
}

TEST_F(LocalTeachersTest, WaitsForTheFirstVersionUnderWait) {
  PuppetFollowedModel* const beta = AddTeacher("beta");
  auto teachers = Create(CodistillationConfig::WAIT);
  std::thread loader([&] {
    absl::SleepFor(absl::Milliseconds(30));
    beta->Hold(Adding(1), 1, 5);
  });
  EXPECT_THAT(Seen(teachers.get(), Batch(1)), ElementsAre(1));
  loader.join();
  EXPECT_EQ(teachers->counters().failures, 0);
}

TEST_F(LocalTeachersTest, WaitsNoLongerThanTheJobSays) {
  AddTeacher("beta");
  options_.codistillation.set_teacher_wait_ms(30);
  auto teachers = Create(CodistillationConfig::WAIT);
  const absl::Time start = absl::Now();
  EXPECT_THAT(Seen(teachers.get(), Batch(1)), IsEmpty());
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(30));
  EXPECT_EQ(teachers->counters().failures, 1);
}

TEST_F(LocalTeachersTest, FailsNamingTheMissingTeacher) {
  AddTeacher("beta");
  AddTeacher("gamma")->Hold(Adding(2), 1, 5);
  auto teachers = Create(CodistillationConfig::FAIL);
  const auto predictions = teachers->Take(Batch(7));
  EXPECT_EQ(predictions.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(predictions.status().message()),
              HasSubstr("at step 7 there were no predictions of beta after 0; last error: teacher "
                        "beta: UNAVAILABLE: waiting for the first cut"));
}

TEST_F(LocalTeachersTest, DoesNotUseWeightsThatAreTooOld) {
  PuppetFollowedModel* const beta = AddTeacher("beta");
  beta->Hold(Adding(1), 1, 40);
  beta->SetGroupStep(1, 51);
  options_.codistillation.set_teacher_wait_ms(20000);
  auto teachers = Create(CodistillationConfig::SKIP);
  std::thread loader([&] {
    absl::SleepFor(absl::Milliseconds(20));
    beta->Hold(Adding(2), 1, 50);
  });
  EXPECT_THAT(Seen(teachers.get(), Batch(1)), ElementsAre(2));
  loader.join();
  EXPECT_THAT(teachers->counters().last_error,
              HasSubstr("of step 40, 11 steps behind its group; at most 10 are allowed"));
}

TEST_F(LocalTeachersTest, ATeacherWhosePassFailsIsLeftOut) {
  const auto broken = std::make_shared<PuppetModel>(
      [](absl::Span<const Tensor>, Model::States*) -> absl::StatusOr<Model::Logits> {
        return absl::InvalidArgumentError("no such word");
      });
  const auto short_of_rows = std::make_shared<PuppetModel>(
      [](absl::Span<const Tensor>, Model::States*) { return Constant(0, kRows - 1); });
  AddTeacher("beta")->Hold(broken, 1, 5);
  AddTeacher("gamma")->Hold(Adding(2), 1, 5);
  AddTeacher("delta")->Hold(short_of_rows, 1, 5);
  auto teachers = Create(CodistillationConfig::SKIP);
  EXPECT_THAT(Seen(teachers.get(), Batch(1)), ElementsAre(2));
  EXPECT_EQ(teachers->counters().failures, 2);
  EXPECT_THAT(teachers->counters().last_error,
              HasSubstr("teacher delta: FAILED_PRECONDITION: gives 1 rows of logits for a batch"));
}

TEST_F(LocalTeachersTest, AnotherGenerationOfTheTeacherIsComputedAgain) {
  PuppetFollowedModel* const beta = AddTeacher("beta");
  const auto before = Adding(1);
  beta->Hold(before, 1, 40);
  auto teachers = Create();
  teachers->Request(Batch(1));
  before->AwaitPasses(1);
  while (teachers->counters().requests < 1) absl::SleepFor(absl::Milliseconds(1));
  beta->Hold(Adding(2), 2, 30);
  EXPECT_THAT(Seen(teachers.get(), Batch(1)), ElementsAre(2));
}

TEST_F(LocalTeachersTest, AChainStartsOnceMoreInAnotherGeneration) {
  MakeRecurrent();
  PuppetFollowedModel* const beta = AddTeacher("beta");
  beta->Hold(Counting(), 1, 40);
  auto teachers = Create();
  EXPECT_THAT(Seen(teachers.get(), Batch(1)), ElementsAre(0));
  for (int64_t step = 2; step <= 4; ++step) teachers->Request(Batch(step));
  while (teachers->counters().requests < 4) absl::SleepFor(absl::Milliseconds(1));
  beta->Hold(Counting(), 2, 30);
  // One pass by the new weights before anybody has noticed.
  teachers->Request(Batch(5));
  while (teachers->counters().requests < 5) absl::SleepFor(absl::Milliseconds(1));
  for (int64_t step = 2; step <= 12; ++step) {
    EXPECT_THAT(Seen(teachers.get(), Batch(step)), ElementsAre(step - 2)) << step;
    teachers->Request(Batch(step + 4));
  }
}

TEST_F(LocalTeachersTest, AWorkerThatResumesIsWhereItAnnounces) {
  AddTeacher("beta")->Hold(Adding(1), 1, 40);
  auto teachers = Create();
  teachers->Request(Batch(1001));
  while (teachers->counters().requests < 1) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(teachers->Take(Batch(1001))->prefetch_lag_steps, 1);
}

// A version that comes while the student has the threads is the one that is used.
TEST_F(LocalTeachersTest, ChoosesItsWeightsWhenItsTurnHasCome) {
  Mutex turn;
  options_.turn = &turn;
  PuppetFollowedModel* const beta = AddTeacher("beta");
  beta->Hold(Adding(1), 1, 40);
  auto teachers = Create();
  {
    MutexLock lock(&turn);
    teachers->Request(Batch(1));
    while (teachers->counters().outstanding < 1) absl::SleepFor(absl::Milliseconds(1));
    absl::SleepFor(absl::Milliseconds(5));  // to where it waits
    beta->Hold(Adding(2), 1, 45);
    beta->SetGroupStep(1, 48);
  }
  const auto predictions = teachers->Take(Batch(1));
  ASSERT_TRUE(predictions.ok()) << predictions.status();
  EXPECT_EQ(predictions->logits.at(0).As<float>()[0], 2);
  EXPECT_EQ(predictions->staleness_steps, 3);
}

TEST_F(LocalTeachersTest, StateGoesFromBatchToBatch) {
  MakeRecurrent();
  AddTeacher("beta")->Hold(Counting(), 1, 40);
  auto teachers = Create();
  EXPECT_THAT(Seen(teachers.get(), Batch(1)), ElementsAre(0));
  EXPECT_THAT(Seen(teachers.get(), Batch(2)), ElementsAre(1));
  teachers->Request(Batch(3));
  teachers->Request(Batch(4));
  EXPECT_THAT(Seen(teachers.get(), Batch(3)), ElementsAre(2));
  EXPECT_THAT(Seen(teachers.get(), Batch(4)), ElementsAre(3));
  EXPECT_THAT(Seen(teachers.get(), Batch(6)), ElementsAre(0)) << "a gap";
  TeacherBatch first = Batch(7);
  first.starts_epoch = true;
  EXPECT_THAT(Seen(teachers.get(), first), ElementsAre(0));
  EXPECT_THAT(Seen(teachers.get(), Batch(8)), ElementsAre(1));
  teachers->Reset();
  EXPECT_THAT(Seen(teachers.get(), Batch(9)), ElementsAre(0)) << "the student was restored";
  EXPECT_THAT(Seen(teachers.get(), Batch(10, 0, /*generation=*/2)), ElementsAre(0));
}

TEST_F(LocalTeachersTest, ResetForgetsWhatWasComputed) {
  const auto model = Adding(1);
  AddTeacher("beta")->Hold(model, 1, 40);
  auto teachers = Create();
  teachers->Request(Batch(1, 5));
  model->AwaitPasses(1);
  teachers->Reset();
  TeacherBatch other = Batch(1, 7);
  EXPECT_THAT(Seen(teachers.get(), other), ElementsAre(8));
}

TEST_F(LocalTeachersTest, LeavingWaitsForNothing) {
  AddTeacher("beta");
  auto teachers = Create(CodistillationConfig::WAIT);
  teachers->StopWaiting();
  EXPECT_THAT(Seen(teachers.get(), Batch(1)), IsEmpty());
  EXPECT_EQ(teachers->counters().failures, 0);
}

// A model that notices when two of its like are computed at once.
class LonelyModel final : public Model {
 public:
  explicit LonelyModel(std::atomic<int>* inside) : inside_(inside) {}
  const TensorList& tensors() const override { return tensors_; }
  absl::Span<const TensorView> storage() const override { return {}; }
  absl::StatusOr<Logits> Predict(absl::Span<const Tensor>, States*) const override {
    return Pass();
  }
  absl::StatusOr<Logits> Forward(absl::Span<const Tensor>, States*, uint64_t) override {
    return Pass();
  }
  absl::Status Backward(const Tensor&, const OnGradient&) override { return Pass().status(); }

 private:
  absl::StatusOr<Logits> Pass() const {
    EXPECT_EQ(inside_->fetch_add(1), 0);
    absl::SleepFor(absl::Microseconds(200));
    inside_->fetch_sub(1);
    return Constant(1);
  }
  std::atomic<int>* const inside_;
  TensorList tensors_;
};

TEST_F(LocalTeachersTest, PassesOfTeacherAndStudentTakeTurns) {
  std::atomic<int> inside{0};
  Mutex turn;
  options_.turn = &turn;
  AddTeacher("beta")->Hold(std::make_shared<LonelyModel>(&inside), 1, 40);
  LonelyModel own(&inside);
  const std::unique_ptr<Model> student = TakeTurns(&own, &turn);
  auto teachers = Create();
  for (int64_t step = 1; step <= 50; ++step) {
    teachers->Request(Batch(step + 1));
    EXPECT_TRUE(student->Forward({}, nullptr, 0).ok());
    EXPECT_THAT(Seen(teachers.get(), Batch(step)), ElementsAre(1));
    EXPECT_TRUE(student->Backward(Tensor(), nullptr).ok());
  }
}

}  // namespace
}  // namespace codistill
