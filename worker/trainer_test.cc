#include "worker/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/testing/fake_group.h"
#include "worker/testing/linear_model.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kInputs = 4;
constexpr int64_t kOutputs = 3;
constexpr int64_t kBatch = 5;
constexpr int64_t kEpoch = 30;  // examples: six batches
constexpr int64_t kSteps = 16;

bool Eventually(const std::function<bool()>& condition) {
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (!condition()) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return true;
}

float InputOf(uint64_t example, int64_t i) {
  return std::sin(static_cast<float>(example * 7 + i * 3 + 1));
}
int64_t LabelOf(uint64_t example) { return static_cast<int64_t>(example * 5 % 7 % kOutputs); }

// Examples in their own order, an epoch of kEpoch after the other.
class PlainBatches : public BatchSource {
 public:
  absl::StatusOr<StudentBatch> Build(uint64_t first, int64_t count) override {
    if (first >= bad_from) return absl::InvalidArgumentError("train.csv:17: bad record");
    StudentBatch batch;
    Tensor x = Tensor::Allocate(DT_FLOAT, {count, kInputs});
    batch.labels = Tensor::Allocate(DT_INT64, {count});
    batch.example_ids = Tensor::Allocate(DT_INT64, {count});
    for (int64_t r = 0; r < count; ++r) {
      const uint64_t example = (first + r) % kEpoch;
      for (int64_t i = 0; i < kInputs; ++i) x.As<float>()[r * kInputs + i] = InputOf(example, i);
      batch.labels.As<int64_t>()[r] = LabelOf(example);
      batch.example_ids.As<int64_t>()[r] = static_cast<int64_t>(example);
    }
    batch.inputs.push_back(x);
    batch.examples = count;
    batch.rows = count + extra_rows;
    batch.starts_epoch = first % kEpoch == 0;
    return batch;
  }
  uint64_t bad_from = std::numeric_limits<uint64_t>::max();
  int64_t extra_rows = 0;
};

// Says the same of every batch: logits that favour class 0; as a test wants it otherwise.
class FixedTeacher : public TeacherSource {
 public:
  void Request(const TeacherBatch& batch) override {
    MutexLock lock(&mu_);
    requested_.push_back(batch.step);
    ++counters_.requests;
  }
  void BeginStep(int64_t) override {}
  absl::StatusOr<TeacherPredictions> Take(const TeacherBatch& batch) override {
    MutexLock lock(&mu_);
    taken_.push_back(batch.step);
    generations_.push_back(batch.generation);
    if (!error.ok()) return error;
    TeacherPredictions predictions;
    if (silent_from <= batch.step && batch.step < silent_to) return predictions;
    Tensor logits = Tensor::Zeros(DT_FLOAT, {batch.rows, kOutputs});
    for (int64_t r = 0; r < batch.rows; ++r) logits.As<float>()[r * kOutputs] = 2;
    if (batch.step == diverged_at) {
      logits.As<float>()[4] = std::numeric_limits<float>::quiet_NaN();
    }
    predictions.logits.push_back(logits);
    predictions.staleness_steps = batch.step % 4;
    predictions.prefetch_lag_steps = 1;
    return predictions;
  }
  void Reset() override {
    MutexLock lock(&mu_);
    ++resets_;
  }
  void StopWaiting() override {}
  Counters counters() const override {
    MutexLock lock(&mu_);
    return counters_;
  }
  std::vector<int64_t> requested() const {
    MutexLock lock(&mu_);
    return requested_;
  }
  std::vector<int64_t> taken() const {
    MutexLock lock(&mu_);
    return taken_;
  }
  int resets() const {
    MutexLock lock(&mu_);
    return resets_;
  }

  absl::Status error;
  int64_t silent_from = 0, silent_to = 0;
  int64_t diverged_at = -1;

 private:
  mutable Mutex mu_;
  std::vector<int64_t> requested_ ABSL_GUARDED_BY(mu_);
  std::vector<int64_t> taken_ ABSL_GUARDED_BY(mu_);
  std::vector<uint64_t> generations_ ABSL_GUARDED_BY(mu_);
  int resets_ ABSL_GUARDED_BY(mu_) = 0;
  Counters counters_ ABSL_GUARDED_BY(mu_);
};

JobConfig Job() {
  JobConfig job;
  job.set_name("test");
  job.set_seed(3);
  auto* input = job.mutable_model()->add_inputs();
  input->set_name("x");
  input->add_shape(kInputs);
  job.mutable_model()->set_num_outputs(kOutputs);
  job.add_groups()->set_name("alpha");
  job.add_groups()->set_name("beta");
  job.mutable_training()->set_batch_size(kBatch);
  job.mutable_training()->mutable_optimizer()->set_learning_rate(0.5);
  job.mutable_codistillation()->set_enabled(false);
  job.mutable_stop()->set_steps(kSteps);
  return job;
}

void EnableCodistillation(int64_t burn_in, JobConfig* job) {
  job->mutable_codistillation()->set_enabled(true);
  job->mutable_codistillation()->set_burn_in_steps(burn_in);
}

// One worker of a FakeGroup.
struct TestWorker {
  explicit TestWorker(JobConfig the_job, bool recurrent = false, float noise = 0)
      : job(std::move(the_job)), model(kInputs, kOutputs, recurrent, noise) {
    if (recurrent) {
      auto* state = job.mutable_model()->add_states();
      state->set_name("h");
      for (int64_t dimension : {1, -1, 1}) state->add_shape(dimension);
    }
    group = std::make_unique<FakeGroup>(job, model.tensors());
    leader = group->leader();
  }

  std::unique_ptr<Trainer> MakeTrainer() {
    Trainer::Options options;
    options.job = job;
    options.leader = leader.get();
    options.model = &model;
    options.batches = &batches;
    options.teachers = teachers;
    options.progress = &progress;
    options.connect = group->connect();
    options.process_nonce = 77;
    options.heartbeat_interval = absl::Milliseconds(5);
    options.drain_grace = absl::Milliseconds(20);
    auto trainer = Trainer::Create(std::move(options));
    EXPECT_TRUE(trainer.ok()) << trainer.status();
    return *std::move(trainer);
  }
  absl::Status Run() { return MakeTrainer()->Run(); }

  JobConfig job;
  LinearModel model;
  PlainBatches batches;
  TeacherSource* teachers = nullptr;
  WorkerProgress progress{nullptr};
  std::unique_ptr<FakeGroup> group;
  std::unique_ptr<LeaderClient> leader;
};

// Softmax regression by the textbook, in doubles.
std::vector<double> TextbookWeights(std::vector<double> w, std::vector<double> b, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    std::vector<double> dw(w.size(), 0), db(b.size(), 0);
    for (int64_t r = 0; r < kBatch; ++r) {
      const uint64_t example = (step * kBatch + r) % kEpoch;
      std::vector<double> p(kOutputs);
      double sum = 0;
      for (int64_t o = 0; o < kOutputs; ++o) {
        double z = b[o];
        for (int64_t i = 0; i < kInputs; ++i) z += InputOf(example, i) * w[i * kOutputs + o];
        sum += p[o] = std::exp(z);
      }
      for (int64_t o = 0; o < kOutputs; ++o) {
        const double g = (p[o] / sum - (LabelOf(example) == o ? 1 : 0)) / kBatch;
        db[o] += g;
        for (int64_t i = 0; i < kInputs; ++i) dw[i * kOutputs + o] += g * InputOf(example, i);
      }
    }
    for (size_t i = 0; i < w.size(); ++i) w[i] -= 0.5 * dw[i];
    for (size_t i = 0; i < b.size(); ++i) b[i] -= 0.5 * db[i];
  }
  return w;
}

TEST(TrainerTest, TrainsToTheEnd) {
  TestWorker setup(Job());
  const auto w = setup.group->parameter(0, 0), b = setup.group->parameter(0, 1);
  ASSERT_TRUE(setup.Run().ok());
  ASSERT_EQ(setup.group->step(), kSteps);
  const std::vector<double> expected =
      TextbookWeights({w.begin(), w.end()}, {b.begin(), b.end()}, kSteps);
  const std::vector<float> got = setup.group->parameter(kSteps, 0);
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], expected[i], 1e-5) << i;

  const WorkerCounters counters = setup.progress.counters();
  EXPECT_EQ(counters.steps(), kSteps);
  EXPECT_EQ(counters.examples(), kSteps * kBatch);
  EXPECT_GT(counters.pull_bytes(), 0u);
  EXPECT_GT(counters.compute_seconds(), 0);
  const std::vector<HeartbeatRequest> heartbeats = setup.group->heartbeats();
  ASSERT_FALSE(heartbeats.empty());
  EXPECT_TRUE(heartbeats.back().leaving());
  EXPECT_EQ(heartbeats.back().fatal_error(), "");
  EXPECT_EQ(heartbeats.back().counters().steps(), kSteps);
  for (const FakeGroup::Pushed& push : setup.group->pushes()) {
    EXPECT_EQ(push.end.num_examples(), kBatch);
    EXPECT_EQ(push.end.num_labels(), kBatch);
    EXPECT_GT(push.end.label_loss_sum(), 0);
    EXPECT_FALSE(push.end.used_teacher());
  }
}

TEST(TrainerTest, BurnInIsBitEqualToTrainingWithoutCodistillation) {
  constexpr int64_t kBurnIn = 9;
  TestWorker without(Job(), false, /*noise=*/0.1f);
  ASSERT_TRUE(without.Run().ok());

  JobConfig job = Job();
  EnableCodistillation(kBurnIn, &job);
  TestWorker with(job, false, /*noise=*/0.1f);
  FixedTeacher teacher;
  with.teachers = &teacher;
  ASSERT_TRUE(with.Run().ok());

  for (int64_t step = 1; step <= kBurnIn; ++step) {
    EXPECT_EQ(with.group->weights(step), without.group->weights(step)) << step;
  }
  EXPECT_NE(with.group->weights(kBurnIn + 1), without.group->weights(kBurnIn + 1));

  // Only steps with a weight ask, and the first of them has its predictions.
  std::vector<int64_t> after;
  for (int64_t step = kBurnIn + 1; step <= kSteps; ++step) after.push_back(step);
  EXPECT_EQ(teacher.requested(), after);
  EXPECT_EQ(teacher.taken(), after);
  const WorkerCounters counters = with.progress.counters();
  EXPECT_EQ(counters.first_step_used(), kBurnIn + 1);
  EXPECT_EQ(counters.teacher_used_steps(), kSteps - kBurnIn);
  EXPECT_EQ(counters.teacher_skipped_steps(), 0);
  EXPECT_EQ(counters.max_staleness_steps(), 3);
  EXPECT_EQ(counters.teacher_requests(), kSteps - kBurnIn);
  int64_t staleness = 0;
  for (int64_t step : after) staleness += step % 4;
  EXPECT_EQ(counters.sum_staleness_steps(), staleness);
  EXPECT_EQ(counters.sum_prefetch_lag_steps(), kSteps - kBurnIn);
  for (const FakeGroup::Pushed& push : with.group->pushes()) {
    EXPECT_EQ(push.end.used_teacher(), push.step > kBurnIn);
    EXPECT_EQ(push.end.teacher_weight(), push.step > kBurnIn ? 1 : 0);
    EXPECT_EQ(push.end.teacher_loss_sum() > 0, push.step > kBurnIn);
  }
}

TEST(TrainerTest, StepsWithoutPredictionsAreTrainedOnLabelsAlone) {
  TestWorker without(Job());
  ASSERT_TRUE(without.Run().ok());
  JobConfig job = Job();
  EnableCodistillation(0, &job);
  TestWorker with(job);
  FixedTeacher teacher;
  teacher.silent_to = 8;  // up to step 7
  with.teachers = &teacher;
  ASSERT_TRUE(with.Run().ok());
  EXPECT_EQ(with.group->weights(7), without.group->weights(7));
  EXPECT_NE(with.group->weights(8), without.group->weights(8));
  EXPECT_EQ(with.progress.counters().teacher_skipped_steps(), 7);
  EXPECT_EQ(with.progress.counters().first_step_used(), 8);
}

TEST(TrainerTest, ATeacherThatHasDivergedIsLeftOut) {
  TestWorker without(Job());
  ASSERT_TRUE(without.Run().ok());
  JobConfig job = Job();
  EnableCodistillation(4, &job);
  TestWorker with(job);
  FixedTeacher teacher;
  teacher.diverged_at = 5;
  with.teachers = &teacher;
  ASSERT_TRUE(with.Run().ok());
  EXPECT_EQ(with.group->weights(5), without.group->weights(5));
  EXPECT_NE(with.group->weights(6), without.group->weights(6));
  EXPECT_EQ(with.progress.counters().teacher_skipped_steps(), 1);
  EXPECT_EQ(with.progress.counters().first_step_used(), 6);
  EXPECT_FALSE(with.group->pushes()[4].end.used_teacher());
}

TEST(TrainerTest, NoMoreStepsArePreparedThanTheJobPrefetches) {
  JobConfig job = Job();
  EnableCodistillation(0, &job);
  job.mutable_codistillation()->set_prefetch(3);
  TestWorker setup(job);
  FixedTeacher teacher;
  setup.teachers = &teacher;
  std::vector<int64_t> ahead;
  for (int64_t step = 1; step <= kSteps; ++step) {
    setup.group->AfterStep(step, [&, step] {
      const int64_t wanted = std::min(step + 3, kSteps);
      EXPECT_TRUE(Eventually([&] { return teacher.requested().back() >= wanted; }));
      ahead.push_back(teacher.requested().back() - step);
    });
  }
  ASSERT_TRUE(setup.Run().ok());
  EXPECT_EQ(*std::max_element(ahead.begin(), ahead.end()), 3);
}

TEST(TrainerTest, ComesBackAfterTheGroupWasRestored) {
  JobConfig job = Job();
  EnableCodistillation(4, &job);
  TestWorker steady(job), restored(job);
  FixedTeacher teacher, other;
  steady.teachers = &teacher;
  restored.teachers = &other;
  ASSERT_TRUE(steady.Run().ok());
  restored.group->AfterStep(8, [&] { restored.group->Restore(6); });
  restored.group->AfterStep(12, [&] { restored.group->Restore(12); });
  ASSERT_TRUE(restored.Run().ok());
  EXPECT_EQ(restored.group->generation(), 3u);
  EXPECT_EQ(restored.group->weights(kSteps), steady.group->weights(kSteps));
  EXPECT_EQ(other.resets(), 1 + 2) << "predictions of older generations are dropped";
  EXPECT_EQ(restored.progress.counters().steps(), kSteps + 2) << "steps 7 and 8 twice";
}

TEST(TrainerTest, RepeatsAStepWhoseTransfersFail) {
  JobConfig job = Job();
  EnableCodistillation(2, &job);
  TestWorker steady(job, /*recurrent=*/true, 0.1f), shaken(job, /*recurrent=*/true, 0.1f);
  FixedTeacher teacher, other;
  steady.teachers = &teacher;
  shaken.teachers = &other;
  ASSERT_TRUE(steady.Run().ok());
  const absl::Status gone = absl::UnavailableError("shard 0 (shard:1) is gone");
  shaken.group->AfterStep(3, [&] { shaken.group->FailNext(FakeGroup::kPull, {gone, gone}); });
  shaken.group->AfterStep(5, [&] { shaken.group->FailNext(FakeGroup::kPush, {gone}); });
  shaken.group->AfterStep(7, [&] {
    shaken.group->FailNext(FakeGroup::kAssign, {gone});
    shaken.group->FailNext(FakeGroup::kRegister, {gone, gone});
    shaken.group->FailNext(FakeGroup::kHeartbeat, {gone, gone});
  });
  ASSERT_TRUE(shaken.Run().ok());
  EXPECT_EQ(shaken.group->weights(kSteps), steady.group->weights(kSteps));
  EXPECT_EQ(shaken.progress.counters().steps(), kSteps);
  std::vector<int64_t> taken = other.taken();
  EXPECT_TRUE(std::adjacent_find(taken.begin(), taken.end()) == taken.end())
      << "a repeated step keeps the predictions it has";
  // The repeated pass saw the same dropout and the same recurrent state.
  const auto& seeds = shaken.model.seeds();
  const auto& states = shaken.model.first_states();
  ASSERT_EQ(seeds.size(), static_cast<size_t>(kSteps + 1));
  const auto repeated = std::adjacent_find(seeds.begin(), seeds.end());
  ASSERT_NE(repeated, seeds.end());
  const size_t at = repeated - seeds.begin();
  EXPECT_EQ(states[at], states[at + 1]);
}

TEST(TrainerTest, AnAnswerLostIsNotAStepLost) {
  TestWorker steady(Job()), shaken(Job());
  ASSERT_TRUE(steady.Run().ok());
  shaken.group->AfterStep(
      4, [&] { shaken.group->LoseNextAnswers(1, absl::UnavailableError("connection reset")); });
  ASSERT_TRUE(shaken.Run().ok());
  EXPECT_EQ(shaken.group->weights(kSteps), steady.group->weights(kSteps));
  EXPECT_EQ(shaken.group->step(), kSteps);
}

TEST(TrainerTest, OutcomesAreCounted) {
  TestWorker setup(Job());
  setup.group->AnswerNext({APPLIED, DROPPED_LATE, REJECTED, TOO_STALE, REJECTED});
  ASSERT_TRUE(setup.Run().ok());
  const WorkerCounters counters = setup.progress.counters();
  EXPECT_EQ(counters.steps(), kSteps - 4);
  EXPECT_EQ(counters.examples(), (kSteps - 4) * kBatch);
  EXPECT_EQ(counters.pushes_dropped(), 1);
  EXPECT_EQ(counters.pushes_rejected(), 2);
  EXPECT_EQ(counters.pushes_too_stale(), 1);
}

TEST(TrainerTest, GivesUpNamingTheAddress) {
  JobConfig job = Job();
  job.mutable_training()->set_rejoin_timeout_s(0.2);
  TestWorker setup(job);
  setup.group->FailAlways(FakeGroup::kPull, absl::UnavailableError("shard 0 (shard:1): refused"));
  const absl::Status status = setup.Run();
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("shard:1"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("rejoin_timeout_s"));

  TestWorker alone(job);
  alone.group->FailAlways(FakeGroup::kRegister, absl::UnavailableError("leader:1: refused"));
  EXPECT_THAT(alone.Run().ToString(), HasSubstr("leader:1"));
}

TEST(TrainerTest, AnAbortedCallThatNeverEndsIsNotRepeatedForEver) {
  JobConfig job = Job();
  job.mutable_training()->set_rejoin_timeout_s(0.2);
  TestWorker setup(job);
  setup.group->FailAlways(FakeGroup::kPull, absl::AbortedError("generation 7 is not mine"));
  EXPECT_TRUE(absl::IsAborted(setup.Run()));
}

TEST(TrainerTest, ANewerProcessOfTheRankEndsThisOne) {
  for (FakeGroup::Call call : {FakeGroup::kHeartbeat, FakeGroup::kAssign, FakeGroup::kPush}) {
    JobConfig job = Job();
    job.mutable_stop()->set_steps(1000000000);
    TestWorker setup(job);
    setup.group->FailAlways(call, absl::FailedPreconditionError("a newer incarnation of rank 0"));
    const absl::Status status = setup.Run();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << call << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("newer incarnation"));
    for (const HeartbeatRequest& beat : setup.group->heartbeats()) EXPECT_FALSE(beat.leaving());
  }
}

TEST(TrainerTest, ABadRecordFailsTheGroup) {
  TestWorker setup(Job());
  setup.batches.bad_from = 7 * kBatch;
  const absl::Status status = setup.Run();
  EXPECT_THAT(status.ToString(), HasSubstr("train.csv:17"));
  EXPECT_EQ(setup.group->step(), 7) << "the steps before it are trained";
  const HeartbeatRequest last = setup.group->heartbeats().back();
  EXPECT_THAT(last.fatal_error(), HasSubstr("train.csv:17"));
  EXPECT_FALSE(last.leaving());
}

TEST(TrainerTest, ALostTeacherUnderFailFailsTheGroup) {
  JobConfig job = Job();
  EnableCodistillation(3, &job);
  TestWorker setup(job);
  FixedTeacher teacher;
  teacher.error = absl::UnavailableError("no predictions of beta");
  setup.teachers = &teacher;
  EXPECT_THAT(setup.Run().ToString(), HasSubstr("beta"));
  EXPECT_EQ(setup.group->step(), 3);
  EXPECT_THAT(setup.group->heartbeats().back().fatal_error(), HasSubstr("beta"));
}

TEST(TrainerTest, LogitsThatDoNotFitTheLabelsAreNamed) {
  TestWorker setup(Job());
  setup.batches.extra_rows = 2;
  EXPECT_THAT(setup.Run().ToString(),
              HasSubstr("5 rows of logits for a batch of 5 examples with 7"));
}

TEST(TrainerTest, DrainFinishesTheStepInHand) {
  JobConfig job = Job();
  job.mutable_stop()->set_steps(1000000000);
  TestWorker setup(job);
  auto trainer = setup.MakeTrainer();
  setup.group->AfterStep(5, [&] { trainer->Drain(); });
  ASSERT_TRUE(trainer->Run().ok());
  EXPECT_EQ(setup.group->step(), 5);
  EXPECT_EQ(setup.progress.counters().steps(), 5);
  EXPECT_TRUE(setup.group->heartbeats().back().leaving());
}

TEST(TrainerTest, LeavesWhenTheGroupDrains) {
  JobConfig job = Job();
  job.mutable_stop()->set_steps(1000000000);
  TestWorker setup(job);
  setup.group->AfterStep(5, [&] { setup.group->Drain(); });
  ASSERT_TRUE(setup.Run().ok());
  EXPECT_GE(setup.group->step(), 5);
  EXPECT_TRUE(setup.group->heartbeats().back().leaving());
}

TEST(TrainerTest, DrainInterruptsTheWaitForALeader) {
  TestWorker setup(Job());
  setup.group->FailAlways(FakeGroup::kRegister, absl::UnavailableError("leader:1: refused"));
  auto trainer = setup.MakeTrainer();
  std::thread other([&] {
    EXPECT_TRUE(Eventually([&] { return setup.group->calls(FakeGroup::kRegister) >= 2; }));
    trainer->Drain();
  });
  EXPECT_TRUE(trainer->Run().ok());
  other.join();
}

TEST(TrainerTest, DrainDoesNotWaitForOthersForEver) {
  for (const bool pull : {true, false}) {
    TestWorker worker(Job());
    if (pull) {
      worker.group->ParkPullsOf(4);
    } else {
      worker.group->ParkPushOf(5);
    }
    auto trainer = worker.MakeTrainer();
    std::thread other([&] {
      EXPECT_TRUE(Eventually([&] { return worker.group->parked() == 1; }));
      trainer->Drain();
    });
    EXPECT_TRUE(trainer->Run().ok());
    other.join();
    EXPECT_EQ(worker.group->step(), 4);
    EXPECT_TRUE(worker.group->heartbeats().back().leaving());
  }
}

TEST(TrainerTest, ANewerProcessEndsAWaitingOne) {
  TestWorker worker(Job());
  worker.group->ParkPushOf(5);
  auto trainer = worker.MakeTrainer();
  std::thread other([&] {
    EXPECT_TRUE(Eventually([&] { return worker.group->parked() == 1; }));
    worker.group->FailAlways(FakeGroup::kHeartbeat, absl::FailedPreconditionError("newer"));
  });
  EXPECT_TRUE(absl::IsFailedPrecondition(trainer->Run()));
  other.join();
}

TEST(TrainerTest, RecurrentStateIsCarriedWithinAnEpoch) {
  TestWorker setup(Job(), /*recurrent=*/true);
  ASSERT_TRUE(setup.Run().ok());
  EXPECT_THAT(setup.model.first_states(),
              ElementsAre(0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3));
}

TEST(TrainerTest, RecurrentStateComesBackWithTheCheckpoint) {
  TestWorker steady(Job(), /*recurrent=*/true), restored(Job(), /*recurrent=*/true);
  ASSERT_TRUE(steady.Run().ok());
  restored.group->WantWorkerState(9);
  restored.group->AfterStep(11, [&] { restored.group->Restore(9); });
  ASSERT_TRUE(restored.Run().ok());
  EXPECT_EQ(restored.group->weights(kSteps), steady.group->weights(kSteps));
  const auto& states = restored.model.first_states();
  // Step 10, the fourth of its epoch, again and on from there.
  ASSERT_GE(states.size(), static_cast<size_t>(kSteps + 2));
  EXPECT_THAT(std::vector<float>(states.end() - 7, states.end()), ElementsAre(3, 4, 5, 0, 1, 2, 3));

  // A new process of the worker gets it too.
  TestWorker again(Job(), /*recurrent=*/true);
  again.group = std::move(restored.group);
  again.leader = again.group->leader();
  again.group->Restore(9);
  ASSERT_TRUE(again.Run().ok());
  EXPECT_EQ(again.group->weights(kSteps), steady.group->weights(kSteps));
}

TEST(TrainerTest, AsyncPullsWhatThereIsAndLosesWhatFails) {
  JobConfig job = Job();
  job.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  TestWorker worker(job);
  worker.group->AfterStep(4, [&] {
    worker.group->FailNext(FakeGroup::kPush, {absl::UnavailableError("shard 0 is gone")});
  });
  ASSERT_TRUE(worker.Run().ok());
  EXPECT_EQ(worker.group->step(), kSteps);
  EXPECT_EQ(worker.progress.counters().steps(), kSteps);
  // The lost one, and at most one that was in hand when the group finished.
  EXPECT_GE(worker.progress.counters().pushes_dropped(), 1);
  EXPECT_LE(worker.progress.counters().pushes_dropped(), 2);
  std::vector<int64_t> steps;
  for (const FakeGroup::Pushed& push : worker.group->pushes()) steps.push_back(push.step);
  EXPECT_THAT(steps, ElementsAre(1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17))
      << "a range is never issued twice";
}

TEST(TrainerTest, RefusesAnotherModel) {
  TestWorker setup(Job());
  LinearModel other(kInputs, kOutputs + 1, false);
  setup.group = std::make_unique<FakeGroup>(setup.job, other.tensors());
  setup.leader = setup.group->leader();
  EXPECT_THAT(setup.Run().ToString(), HasSubstr("archive is not the group's"));
}

TEST(RecurrentStateTest, OtherBlobsAreRefused) {
  ModelConfig config;
  auto* state = config.add_states();
  state->set_name("h");
  for (int64_t dimension : {2, -1, 3}) state->add_shape(dimension);
  RecurrentStateAfter after;
  after.step = 12;
  after.states = {Tensor::Zeros(DT_FLOAT, {2, 4, 3})};
  after.states[0].As<float>()[23] = 5;
  const std::string blob = EncodeWorkerState(config, after);
  auto back = DecodeWorkerState(config, blob);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->step, 12);
  EXPECT_THAT(back->states[0].shape(), ElementsAre(2, 4, 3));
  EXPECT_EQ(back->states[0].As<float>()[23], 5);
  EXPECT_EQ(back->For(13, false).size(), 1u);
  EXPECT_TRUE(back->For(13, true).empty());
  EXPECT_TRUE(back->For(14, false).empty());

  EXPECT_FALSE(DecodeWorkerState(config, "nonsense").ok());
  EXPECT_FALSE(DecodeWorkerState(config, blob.substr(0, blob.size() - 1)).ok());
  config.mutable_states(0)->set_shape(2, 4);
  EXPECT_THAT(DecodeWorkerState(config, blob).status().ToString(), HasSubstr("\"h\""));
  config.clear_states();
  EXPECT_FALSE(DecodeWorkerState(config, blob).ok());
}

}  // namespace
}  // namespace codistill
