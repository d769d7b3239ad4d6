// Asynchronous groups over real sockets: staleness kept within its bound.

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
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

}  // namespace
}  // namespace codistill
