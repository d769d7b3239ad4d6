#include <deque>
#include <functional>
#include <queue>
#include <random>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/leader.h"
#include "server/leader_harness.h"
#include "server/test_model.h"

// The leader of groups whose pushes are applied as they come: bounds on staleness, exact counts.
namespace codistill {
namespace {

using ::testing::HasSubstr;

class LeaderAsyncTest : public LeaderTest {
 protected:
  void SetUp() override {
    LeaderTest::SetUp();
    job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
    job_.mutable_stop()->set_steps(1'000'000'000);
    job_.mutable_training()->set_publish_every_steps(1'000'000'000);
  }
  void Bound(int64_t max_staleness) {
    job_.mutable_training()->set_update_mode(TrainingConfig::BOUNDED_STALENESS);
    job_.mutable_training()->set_max_staleness(max_staleness);
  }

  // A shard's report about a rank's own step; shards count as they go.
  absl::Status Decide(int rank, int shard, int64_t own_step, PushOutcome outcome = APPLIED,
                      uint64_t incarnation = 0) {
    ReportEndRequest request;
    request.set_generation(replies_[rank].generation());
    request.set_rank(rank);
    request.set_incarnation(incarnation == 0 ? replies_[rank].incarnation() : incarnation);
    request.set_shard(shard);
    request.set_shard_incarnation(shards_[shard]->incarnation);
    request.set_own_step(own_step);
    request.set_outcome(outcome);
    const bool update = outcome == APPLIED || outcome == REJECTED;
    request.set_step(update ? ++shards_[shard]->step : shards_[shard]->step);
    request.mutable_end()->set_num_examples(4);
    request.mutable_end()->set_num_labels(4);
    request.mutable_end()->set_finite(outcome != REJECTED);
    return leader_->ReportEnd(request);
  }
  void Whole(int rank, int64_t own_step) {
    for (int shard = 0; shard < kShards; ++shard) {
      const absl::Status status = Decide(rank, shard, own_step);
      ASSERT_TRUE(status.ok()) << status;
    }
  }
};

TEST_F(LeaderAsyncTest, AssignmentsAreHeldBackAtTheBound) {
  Bound(2);
  Start();
  const auto first = Ask(0, 0, 8);
  ASSERT_EQ(first->reply->assignments_size(), 3);  // 0, 1 and 2 steps ahead of worker 1
  const auto held = Ask(0, 4, 1);
  EXPECT_FALSE(held->answered);
  for (int64_t step = 1; step <= 3; ++step) Whole(0, step);
  EXPECT_FALSE(held->answered);
  ASSERT_EQ(Ask(1)->reply->assignments(0).step(), 1);
  ASSERT_TRUE(Decide(1, 0, 1).ok());
  EXPECT_FALSE(held->answered);  // the other shard may not have it yet
  DaemonStatus status;
  leader_->FillStatus(&status);
  EXPECT_THAT(status.detail(), HasSubstr("1 workers wait for rank 1, which has finished 0 steps"));
  ASSERT_TRUE(Decide(1, 1, 1).ok());
  ASSERT_TRUE(held->answered);
  EXPECT_EQ(held->reply->assignments(0).step(), 4);
  EXPECT_EQ(leader_->async_counters().max_ahead(), 2);
}

TEST_F(LeaderAsyncTest, WithoutStalenessWorkersGoStepByStep) {
  Bound(0);
  Start();
  EXPECT_EQ(Ask(0, 0, 8)->reply->assignments_size(), 1);
  EXPECT_EQ(Ask(1, 0, 8)->reply->assignments_size(), 1);
  const auto held = Ask(0, 2, 8);
  Whole(0, 1);
  EXPECT_FALSE(held->answered);
  // Worker 1's push was lost, and it says so: nobody waits for it for ever.
  GetAssignmentsRequest request;
  request.set_generation(replies_[1].generation());
  request.set_rank(1);
  request.set_incarnation(replies_[1].incarnation());
  request.set_first_step(2);
  request.set_completed_step(77);  // not more than it was given
  absl::StatusOr<GetAssignmentsReply> reply;
  leader_->GetAssignments(request, clock_.Now() + absl::Seconds(5),
                          [&](absl::StatusOr<GetAssignmentsReply> r) { reply = std::move(r); });
  ASSERT_TRUE(held->answered);
  EXPECT_EQ(held->reply->assignments(0).step(), 2);
  ASSERT_TRUE(reply.ok());
  EXPECT_EQ(reply->assignments(0).step(), 2);
}

TEST_F(LeaderAsyncTest, AReplacedWorkersStepsAreOver) {
  Bound(1);
  Start();
  Ask(0, 0, 8);
  ASSERT_EQ(Ask(1, 0, 8)->reply->assignments_size(), 2);
  const auto held = Ask(0, 3, 1);
  EXPECT_FALSE(held->answered);
  ASSERT_TRUE(Register(1, /*process=*/77).ok());
  ASSERT_FALSE(held->answered);  // it waits for its own step 1
  Whole(0, 1);
  Whole(0, 2);
  ASSERT_TRUE(held->answered);
  const auto fresh = Ask(1);
  EXPECT_EQ(fresh->reply->assignments(0).step(), 3);
}

TEST_F(LeaderAsyncTest, FixedMembersAreWaitedForThenTheGroupFailsByName) {
  Bound(1);
  Start();
  Ask(0, 0, 8);
  Whole(0, 1);
  Whole(0, 2);
  const auto held = Ask(0, 3);
  for (int i = 0; i < 59; ++i) {
    Pass(absl::Seconds(1));
    ASSERT_TRUE(HeartbeatStatus(0).ok());
  }
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  Pass(absl::Seconds(2));
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_EQ(State().error(), "worker 1 of group alpha: not heard from for 60 s");
}

TEST_F(LeaderAsyncTest, WholePartialAndLostPushesAreCountedAndKept) {
  UseCheckpoints(0);
  Start();
  Ask(0, 0, 4);
  Whole(0, 1);
  ASSERT_TRUE(Decide(0, 0, 2).ok());  // killed between its shards
  ASSERT_TRUE(Register(0, /*process=*/77).ok());
  ASSERT_EQ(Ask(0)->reply->assignments(0).step(), 5);
  Whole(0, 5);
  AsyncCounters counts = leader_->async_counters();
  EXPECT_EQ(counts.whole(), 2);
  EXPECT_EQ(counts.partial(), 1);
  EXPECT_EQ(counts.lost(), 2);
  EXPECT_EQ(counts.open(), 0);
  EXPECT_EQ(counts.issued(), 5);
  // A report of a process that is gone is none.
  shards_[1]->incarnation -= 1;
  ASSERT_TRUE(Decide(0, 1, 6).ok());
  shards_[1]->incarnation += 1;
  EXPECT_EQ(leader_->async_counters().issued(), 5);
  EXPECT_EQ(leader_->GetHistory().async().partial(), 1);
  leader_->Checkpoint([](absl::StatusOr<CheckpointReply> reply) { ASSERT_TRUE(reply.ok()); });
  Ask(0);
  Whole(0, 6);
  for (auto& shard : shards_) {  // all of them are lost with the leader
    shard->generation = 0;
    shard->nonce += 100;
  }
  Start();
  EXPECT_EQ(leader_->async_counters().partial(), 1);
  EXPECT_EQ(leader_->async_counters().whole(), 2);
  EXPECT_EQ(leader_->async_counters().lost(), 3);  // not settled yet when the checkpoint was taken
}

TEST_F(LeaderAsyncTest, OnlyTheLostShardIsLoadedAgain) {
  UseCheckpoints(4);
  Start();
  const uint64_t generation = State().version().generation();
  Ask(0, 0, 12);
  for (int64_t step = 1; step <= 6; ++step) Whole(0, step);
  ASSERT_TRUE(Decide(0, 0, 7).ok());  // on its way to shard 1
  ASSERT_THAT(Files(), testing::Contains("MANIFEST-1-4"));
  const uint64_t before = shards_[1]->incarnation;
  const size_t others = shards_[0]->restores.size();
  shards_[1]->nonce = 200;
  shards_[1]->generation = 0;
  shards_[1]->step = 0;
  shards_[1]->restore_error = absl::UnavailableError("starting");
  Pass(absl::Seconds(1));
  EXPECT_EQ(Phase(), GroupState::RESTORING);
  const auto held = Ask(0, 13);  // nobody begins a step meanwhile
  EXPECT_FALSE(held->answered);
  EXPECT_TRUE(Register(0).ok());  // and nobody is sent away
  shards_[1]->restore_error = absl::OkStatus();
  Pass(absl::Seconds(1));
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  EXPECT_EQ(State().version().generation(), generation);
  EXPECT_EQ(shards_[0]->restores.size(), others);
  const RestoreRequest& restore = shards_[1]->restores.back();
  EXPECT_EQ(restore.generation(), generation);
  EXPECT_EQ(restore.manifest(), "MANIFEST-1-4");
  EXPECT_EQ(restore.min_step(), 6);
  EXPECT_GT(restore.shard_incarnation(), before);
  EXPECT_FALSE(restore.keep());
  EXPECT_TRUE(held->answered);
  AsyncCounters counts = leader_->async_counters();
  EXPECT_EQ(counts.shard_reloads(), 1);
  EXPECT_EQ(counts.lost_updates(), 3);  // it had 3 when shard 0 had the checkpoint's 4
  EXPECT_EQ(counts.whole(), 6);
  EXPECT_EQ(counts.partial(), 1);
  // A cut that all have, for those who follow.
  EXPECT_EQ(State().newest_cut().step(), 7);
  // A late report of the process before is none.
  const uint64_t present = shards_[1]->incarnation;
  shards_[1]->incarnation = before;
  ASSERT_TRUE(Decide(0, 1, 7).ok());
  shards_[1]->incarnation = present;
  Whole(0, 8);
  counts = leader_->async_counters();
  EXPECT_EQ(counts.whole(), 7);
  EXPECT_EQ(counts.partial(), 1);
  EXPECT_EQ(leader_->GetHistory().restores(), 0);
}

TEST_F(LeaderAsyncTest, ARestartedLeaderGoesOnWithTheShardsThatAreLeft) {
  UseCheckpoints(4);
  Start();
  const uint64_t generation = State().version().generation();
  const auto given = Ask(0, 0, 12);
  for (int64_t step = 1; step <= 6; ++step) Whole(0, step);
  ASSERT_TRUE(Decide(0, 1, 7).ok());  // shard 0 dies before it, and its leader with it
  shards_[0]->nonce = 200;
  shards_[0]->generation = 0;
  shards_[0]->step = 0;
  shards_[1]->end_example = 7 * 4;
  shards_[1]->furthest_step = 7;
  const uint64_t kept = shards_[1]->incarnation;
  Make();
  Pass(absl::Seconds(1));
  EXPECT_EQ(State().version().generation(), generation);
  EXPECT_TRUE(shards_[1]->restores.back().keep());
  EXPECT_EQ(shards_[1]->restores.back().leader_nonce(), nonce_);
  EXPECT_EQ(shards_[1]->incarnation, kept);
  EXPECT_FALSE(shards_[0]->restores.back().keep());
  EXPECT_EQ(shards_[0]->restores.back().manifest(), "MANIFEST-1-4");
  EXPECT_EQ(shards_[0]->restores.back().min_step(), 7);
  EXPECT_EQ(StepNow(), 7);
  EXPECT_EQ(State().newest_cut().step(), 7);
  // The worker that is left knows what else was handed out; nothing is handed out twice.
  RegisterRequest request;
  request.set_rank(0);
  request.set_process_nonce(1000);
  *request.mutable_tensors() = TestTensors().tensors();
  request.set_generation(generation);
  request.set_end_example(given->reply->assignments(11).first_example() + 4);
  const auto registered = leader_->Register(request);
  ASSERT_TRUE(registered.ok()) << registered.status();
  EXPECT_EQ(registered->generation(), generation);
  replies_[0] = *registered;
  ASSERT_TRUE(Register(1).ok());
  const auto asked = Ask(0);
  ASSERT_TRUE(asked->answered);
  EXPECT_EQ(asked->reply->assignments(0).first_example(), 12u * 4);
  EXPECT_EQ(asked->reply->assignments(0).step(), 8);
  EXPECT_EQ(leader_->async_counters().lost_updates(), 3);
  Whole(0, 8);
  EXPECT_EQ(StepNow(), 8);
}

TEST_F(LeaderAsyncTest, WithAllShardsLostTheGroupIsRestored) {
  UseCheckpoints(4);
  Start();
  Ask(0, 0, 12);
  for (int64_t step = 1; step <= 6; ++step) Whole(0, step);
  for (auto& shard : shards_) {
    shard->nonce += 100;
    shard->generation = 0;
  }
  Make();
  Pass(absl::Seconds(1));
  EXPECT_EQ(State().version().generation(), 2u);
  EXPECT_EQ(StepNow(), 4);
  for (auto& shard : shards_) EXPECT_FALSE(shard->restores.back().keep());
}

// Four workers, one of them ten times slower, reports that take their time, workers that are killed
// and replaced: nobody ever begins a step more than the bound ahead of the slowest. The test knows
// what each worker has done, the leader only what it is told.
TEST_F(LeaderAsyncTest, NeverExceedsItsBound) {
  constexpr int kWorkers = 4;
  constexpr int64_t kBound = 3, kSteps = CODISTILL_SIMULATED_STEPS;
  Bound(kBound);
  job_.mutable_groups(0)->set_num_workers(kWorkers);
  Start();

  struct Worker {
    int64_t begun = 0, done = 0;  // own steps
    int64_t first = 0;            // to ask for
    bool computing = false;
    std::deque<int64_t> ready;
    std::shared_ptr<Asked> asked;
    uint64_t process = 0;
  };
  struct Event {
    int64_t time;  // microseconds
    uint64_t order;
    std::function<void()> run;
    bool operator<(const Event& other) const {
      return time != other.time ? time > other.time : order > other.order;
    }
  };
  std::vector<Worker> workers(kWorkers);
  std::priority_queue<Event> events;
  std::mt19937_64 random(7);
  uint64_t order = 0;
  int64_t now = 0, steps = 0, most_ahead = 0, kills = 0;
  const auto after = [&](int64_t delay, std::function<void()> run) {
    events.push({now + delay, ++order, std::move(run)});
  };
  std::vector<int64_t> last_report(kWorkers * kShards, 0);

  // Some time later, in the order of the stream.
  const auto report = [&](int rank, int shard, int64_t step) {
    int64_t& last = last_report[rank * kShards + shard];
    last = std::max(last, now + static_cast<int64_t>(random() % 300));
    after(last - now, [&, rank, shard, step, incarnation = replies_[rank].incarnation()] {
      Decide(rank, shard, step, APPLIED, incarnation).IgnoreError();
    });
  };
  std::function<void(int)> go = [&](int rank) {
    Worker& w = workers[rank];
    if (w.computing) return;
    if (w.ready.empty()) {
      if (w.asked == nullptr) w.asked = Ask(rank, w.first, 1 + static_cast<int>(random() % 4));
      if (!w.asked->answered) return;
      const auto reply = std::move(w.asked);
      ASSERT_TRUE(reply->reply.ok()) << reply->reply.status();
      for (const Assignment& a : reply->reply->assignments()) w.ready.push_back(a.step());
      if (w.ready.empty()) return go(rank);  // the call's time was up
      w.first = w.ready.back() + 1;
    }
    w.begun = w.ready.front();
    w.ready.pop_front();
    w.done = w.begun - 1;
    w.computing = true;
    int64_t slowest = w.done;
    for (const Worker& other : workers) slowest = std::min(slowest, other.done);
    most_ahead = std::max(most_ahead, w.done - slowest);
    const int64_t mean = rank == 0 ? 10000 : 1000;
    after(mean / 2 + static_cast<int64_t>(random() % mean), [&, rank] {
      Worker& w = workers[rank];
      w.computing = false;
      ++steps;
      if (random() % 2000 == 0) {
        // Killed with its push under way to the second shard; the next process registers.
        ++kills;
        report(rank, 0, w.begun);
        w.asked.reset();
        w.ready.clear();
        w.first = 0;
        // What the process was given is over.
        ASSERT_TRUE(Register(rank, 5000 + 10 * ++w.process + rank).ok());
        go(rank);
        return;
      }
      w.done = w.begun;
      for (int shard = 0; shard < kShards; ++shard) report(rank, shard, w.begun);
      go(rank);
    });
  };
  for (int rank = 0; rank < kWorkers; ++rank) go(rank);
  int64_t ticked = 0;
  while (steps < kSteps && !HasFatalFailure()) {
    ASSERT_FALSE(events.empty()) << "everybody waits for somebody";
    const Event event = events.top();
    events.pop();
    clock_.Advance(absl::Microseconds(event.time - now));
    now = event.time;
    event.run();
    for (int rank = 0; rank < kWorkers; ++rank) {
      if (workers[rank].asked != nullptr && workers[rank].asked->answered) go(rank);
    }
    if (now - ticked > 1'000'000) {
      ticked = now;
      leader_->Tick();
    }
  }
  EXPECT_EQ(Phase(), GroupState::TRAINING) << State().error();
  EXPECT_LE(most_ahead, kBound);
  EXPECT_EQ(most_ahead, kBound);  // the fast ones come up to it
  EXPECT_GT(kills, 10);
  const AsyncCounters counts = leader_->async_counters();
  EXPECT_LE(counts.max_ahead(), kBound);
  EXPECT_EQ(counts.issued(), counts.whole() + counts.partial() + counts.lost() + counts.open());
  EXPECT_GE(counts.partial(), kills - kWorkers);
  EXPECT_LE(counts.partial(), kills);
}

}  // namespace
}  // namespace codistill
