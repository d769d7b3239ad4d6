#include <algorithm>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/testing/fake_group.h"
#include "worker/trainer.h"
#include "worker/trainer_harness.h"

// What a trainer does about lost calls, restored groups and newer processes, and how it leaves.
namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(TrainerTest, ComesBackAfterTheGroupWasRestored) {
  JobConfig job = Job();
  EnableCodistillation(4, &job);
  TestWorker steady(job), restored(job);
  FixedTeacher teacher, other;
  steady.teachers = &teacher;
  restored.teachers = &other;
  other.reset_time = absl::Milliseconds(30);
  ASSERT_TRUE(steady.Run().ok());
  restored.group->AfterStep(8, [&] { restored.group->Restore(6); });
  restored.group->AfterStep(12, [&] { restored.group->Restore(12); });
  ASSERT_TRUE(restored.Run().ok());
  EXPECT_EQ(restored.group->generation(), 3u);
  EXPECT_EQ(restored.group->weights(kSteps), steady.group->weights(kSteps));
  EXPECT_EQ(other.resets(), 1 + 2) << "predictions of older generations are dropped";
  EXPECT_EQ(other.forgotten(), 0u) << "but nothing that the new one has asked for";
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

TEST(TrainerTest, WaitsForAGroupThatIsBeingRestoredHoweverLong) {
  JobConfig job = Job();
  job.mutable_training()->set_rejoin_timeout_s(0.1);
  TestWorker setup(job);
  const absl::Time begin = absl::Now();
  setup.group->set_phase(GroupState::RESTORING);
  setup.group->FailAlways(FakeGroup::kRegister, absl::UnavailableError("group is restoring"));
  setup.group->AfterStep(4, [&] {
    // And once more in mid-run, as when one shard alone is loaded.
    setup.group->FailNext(FakeGroup::kPull,
                          std::vector<absl::Status>(6, absl::UnavailableError("loading")));
  });
  std::thread restored([&] {
    while (absl::Now() - begin < absl::Milliseconds(500)) absl::SleepFor(absl::Milliseconds(10));
    setup.group->FailAlways(FakeGroup::kRegister, absl::OkStatus());
  });
  const absl::Status status = setup.Run();
  restored.join();
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_GT(absl::Now() - begin, absl::Milliseconds(500));
  EXPECT_EQ(setup.group->step(), kSteps);
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

}  // namespace
}  // namespace codistill
