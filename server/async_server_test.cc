// Asynchronous groups over real sockets: staleness kept within its bound.

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "common/base/mutex.h"
#include "gtest/gtest.h"
#include "server/server_harness.h"

namespace codistill {
namespace {

// Workers as threads, which pull, wait as if they computed, and push.
class AsyncServerTest : public ServerTest {
 protected:
  static constexpr int kMany = 4;

  void SetUp() override {
    ServerTest::SetUp();
    job_.mutable_groups(0)->set_num_workers(kMany);
    job_.mutable_training()->set_publish_every_steps(50);
  }

  // One step of a worker after another until the leader says that the group has finished. `compute`
  // is called for each with its own number, between pull and push.
  void Work(int rank, const std::function<void(int64_t)>& compute) {
    const RegisterReply me = Register(rank);
    const std::unique_ptr<TensorClient> client = Client(me);
    WorkerModel model(map_);
    int64_t next = 0;
    for (;;) {
      GetAssignmentsRequest request;
      request.set_generation(me.generation());
      request.set_rank(rank);
      request.set_incarnation(me.incarnation());
      request.set_first_step(next);
      request.set_max_assignments(2);
      const auto reply = leader_->GetAssignments(request, Soon());
      ASSERT_TRUE(reply.ok()) << reply.status();
      if (reply->finished()) return;
      for (const Assignment& assignment : reply->assignments()) {
        next = assignment.step() + 1;
        const auto pulled = client->Pull(TensorClient::Source::kAtLeastStep, me.generation(), 0,
                                         model.views, Soon());
        ASSERT_TRUE(pulled.ok()) << pulled.status();
        compute(assignment.step());
        TensorClient::PushHeader header;
        header.generation = me.generation();
        header.step = assignment.step();
        header.rank = rank;
        header.incarnation = me.incarnation();
        const Version& version = pulled->version;
        header.shard_steps = {version.shard_steps().begin(), version.shard_steps().end()};
        header.shard_incarnations = {version.shard_incarnations().begin(),
                                     version.shard_incarnations().end()};
        ASSERT_EQ(header.shard_incarnations.size(), static_cast<size_t>(kShards));
        // Decided before the answer is here, and the others may know of it before we do.
        done_[rank].store(assignment.step());
        const auto pushed = Finish(client->StartPush(header, Soon()).get(), 0.001f);
        ASSERT_TRUE(pushed.ok()) << pushed.status();
        outcomes_[pushed->outcome].fetch_add(1);
      }
    }
  }

  absl::StatusOr<PushStream::Result> Finish(PushStream* push, float gradient) {
    for (int i = 0; i < map_.tensors_size(); ++i) {
      const TensorSpec& spec = map_.tensors(i);
      Tensor tensor = Tensor::Zeros(spec.dtype(),
                                    std::vector<int64_t>(spec.shape().begin(), spec.shape().end()));
      if (spec.role() == TensorSpec::PARAMETER) {
        for (float& g : tensor.As<float>()) g = gradient;
        push->AddGradient(i, tensor.As<float>().data(), tensor.owner());
      } else if (spec.role() == TensorSpec::BUFFER) {
        push->AddBuffer(i, tensor.data(), tensor.owner());
      }
    }
    PushEnd end;
    end.set_num_examples(4);
    end.set_num_labels(4);
    return push->Finish(end);
  }

  std::atomic<int64_t> done_[kMany] = {};
  std::atomic<int64_t> outcomes_[PushOutcome_ARRAYSIZE] = {};
};

// One worker is ten times slower than the others. No worker ever begins a step with more than the
// bound of its own behind it beyond the slowest, and the shards never apply one that is further
// behind.
TEST_F(AsyncServerTest, BoundedStalenessNeverExceedsItsBound) {
  constexpr int64_t kBound = 3;
  job_.mutable_training()->set_update_mode(TrainingConfig::BOUNDED_STALENESS);
  job_.mutable_training()->set_max_staleness(kBound);
  job_.mutable_stop()->set_steps(CODISTILL_BOUNDED_STEPS);
  Start();
  std::atomic<int64_t> most_ahead{0};
  std::vector<std::thread> workers;
  for (int rank = 0; rank < kMany; ++rank) {
    workers.emplace_back([&, rank] {
      Work(rank, [&, rank](int64_t step) {
        int64_t slowest = step - 1;
        for (const auto& done : done_) slowest = std::min(slowest, done.load());
        int64_t most = most_ahead.load();
        while (step - 1 - slowest > most &&
               !most_ahead.compare_exchange_weak(most, step - 1 - slowest)) {
        }
        absl::SleepFor(absl::Milliseconds(rank == 0 ? 20 : 2));
      });
    });
  }
  for (std::thread& worker : workers) worker.join();
  EXPECT_LE(most_ahead.load(), kBound);
  EXPECT_GE(most_ahead.load(), kBound - 1);  // the fast ones were held, not the job
  EXPECT_EQ(outcomes_[TOO_STALE].load(), 0);
  EXPECT_TRUE(
      Eventually([&] { return nodes_[0].server->leader()->async_counters().open() <= 2 * kMany; }));
  const AsyncCounters counts = nodes_[0].server->leader()->async_counters();
  EXPECT_LE(counts.max_ahead(), kBound);
  EXPECT_EQ(counts.lost() + counts.rejected() + counts.too_stale(), 0);
  for (Node& node : nodes_) {
    const ShardCounters shard = node.server->shard()->counters();
    EXPECT_LE(shard.max_staleness, kBound);
    EXPECT_EQ(shard.too_stale, 0);
    // What follows from it for the updates between a pull and its push.
    EXPECT_LE(shard.max_update_lag, (kMany - 1) * (2 * kBound + 1));
  }
  RecordProperty("steps", static_cast<int>(nodes_[0].server->shard()->state().step));
}

// A worker of a real job, in short: what fails is given up and counted, and it registers again.
class LossTest : public AsyncServerTest {
 protected:
  void SetUp() override {
    AsyncServerTest::SetUp();
    job_.mutable_groups(0)->set_num_workers(2);
    job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
    job_.mutable_checkpoint()->set_directory(JoinPath(directory_, "checkpoints"));
    job_.mutable_checkpoint()->set_every_steps(20);
    job_.mutable_stop()->set_steps(100000);
    job_.mutable_training()->set_publish_every_steps(1000);
  }
  void TearDown() override {
    stop_.store(true);
    for (std::thread& worker : workers_) worker.join();
    AsyncServerTest::TearDown();
  }

  void Persist(int rank) {
    workers_.emplace_back([this, rank] {
      uint64_t end_example = 0, generation = 0;
      int64_t completed = 0;
      while (!stop_.load()) {
        RegisterRequest request;
        request.set_rank(rank);
        request.set_process_nonce(50 + rank);
        *request.mutable_tensors() = TestTensors().tensors();
        request.set_generation(generation);
        request.set_completed_step(completed);
        request.set_end_example(end_example);
        const auto me = leader_->Register(request, absl::Now() + absl::Seconds(2));
        if (!me.ok()) {
          absl::SleepFor(absl::Milliseconds(20));
          continue;
        }
        generation = me->generation();
        generations_[rank].store(generation);
        completed = 0;
        const std::unique_ptr<TensorClient> client = Client(*me);
        WorkerModel model(map_);
        absl::Status status;
        int64_t next = 0;
        while (status.ok() && !stop_.load()) {
          GetAssignmentsRequest ask;
          ask.set_generation(me->generation());
          ask.set_rank(rank);
          ask.set_incarnation(me->incarnation());
          ask.set_first_step(next);
          ask.set_max_assignments(1);
          const auto reply = leader_->GetAssignments(ask, absl::Now() + absl::Seconds(2));
          status = reply.status();
          if (!status.ok()) break;
          for (const Assignment& assignment : reply->assignments()) {
            next = assignment.step() + 1;
            {
              MutexLock lock(&mu_);
              EXPECT_TRUE(ranges_.insert(assignment.first_example()).second)
                  << "example " << assignment.first_example() << " was handed out twice";
            }
            end_example = std::max<uint64_t>(end_example, assignment.first_example() + 4);
            const auto pulled = client->Pull(TensorClient::Source::kAtLeastStep, me->generation(),
                                             0, model.views, absl::Now() + absl::Seconds(2));
            status = pulled.status();
            if (!status.ok()) break;
            TensorClient::PushHeader header;
            header.generation = me->generation();
            header.step = assignment.step();
            header.rank = rank;
            header.incarnation = me->incarnation();
            const Version& version = pulled->version;
            header.shard_steps = {version.shard_steps().begin(), version.shard_steps().end()};
            header.shard_incarnations = {version.shard_incarnations().begin(),
                                         version.shard_incarnations().end()};
            header.end_example = assignment.first_example() + 4;
            const auto pushed =
                Finish(client->StartPush(header, absl::Now() + absl::Seconds(2)).get(), 0.001f);
            completed = assignment.step();
            status = pushed.status();
            if (!status.ok()) break;
            done_[rank].fetch_add(1);
          }
        }
        absl::SleepFor(absl::Milliseconds(5));
      }
    });
  }
  int64_t Done() { return done_[0].load() + done_[1].load(); }
  bool MovesOn() {
    const int64_t before = Done();
    return Eventually([&] { return Done() > before + 100; });
  }

  // As when the process is killed and started again on the same port.
  void Replace(int shard) {
    const std::string address = nodes_[shard].rpc->address();
    nodes_[shard].Stop();
    StartNode(shard, address);
  }

  // What the shards say they have applied is what the leader has counted.
  void ExpectExact() {
    stop_.store(true);
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    GroupLeader* const leader = nodes_[0].server->leader();
    const auto exact = [&] {
      const AsyncCounters c = leader->async_counters();
      int64_t updates = 0;
      for (Node& node : nodes_) updates += node.server->shard()->state().step;
      return updates + lost_before_ == kShards * (c.whole() + c.rejected()) + c.partial_updates();
    };
    EXPECT_TRUE(Eventually(exact)) << leader->async_counters().ShortDebugString();
  }

  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> generations_[2] = {};
  std::vector<std::thread> workers_;
  Mutex mu_;
  std::set<uint64_t> ranges_ ABSL_GUARDED_BY(mu_);
  int64_t lost_before_ = 0;
};

TEST_F(LossTest, OnlyTheLostShardIsLoadedAgain) {
  Start();
  Persist(0);
  Persist(1);
  ASSERT_TRUE(Eventually([&] { return Done() > 100; }));
  const uint64_t generation = generations_[0].load();
  const int64_t step = nodes_[1].server->shard()->state().step;
  Replace(1);
  ASSERT_TRUE(MovesOn());
  EXPECT_EQ(generations_[0].load(), generation);
  EXPECT_EQ(generations_[1].load(), generation);
  EXPECT_GE(nodes_[1].server->shard()->state().step, step);  // its count goes on
  const AsyncCounters counts = nodes_[0].server->leader()->async_counters();
  EXPECT_EQ(counts.shard_reloads(), 1);
  EXPECT_EQ(nodes_[0].server->leader()->counters().restores, 0);
}

TEST_F(LossTest, ARestartedLeaderTakesOverTheShardThatIsLeft) {
  Start();
  Persist(0);
  Persist(1);
  ASSERT_TRUE(Eventually([&] { return Done() > 100; }));
  const uint64_t generation = generations_[0].load();
  const int64_t step = nodes_[1].server->shard()->state().step;
  Replace(0);
  ASSERT_TRUE(MovesOn());
  EXPECT_EQ(generations_[0].load(), generation);
  EXPECT_GE(nodes_[0].server->leader()->State(false).version().step(), step);
  EXPECT_EQ(nodes_[1].server->shard()->counters().restores, 1);  // its own first
}

TEST_F(LossTest, UndisturbedCountsAreExact) {
  Start();
  Persist(0);
  Persist(1);
  ASSERT_TRUE(Eventually([&] { return Done() > 100; }));
  ExpectExact();
}

}  // namespace
}  // namespace codistill
