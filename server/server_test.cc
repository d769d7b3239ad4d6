// Real services over real sockets in one process: two shards, their leader, and clients.

#include "common/rpc/server.h"

#include <atomic>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/client/leader_client.h"
#include "common/client/tensor_client.h"
#include "common/config/shard_map.h"
#include "common/rpc/bulk_stream.h"
#include "common/rpc/channel.h"
#include "common/rpc/frame.h"
#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/parameter_server.h"
#include "server/server_harness.h"
#include "server/test_model.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

TEST_F(ServerTest, TwoWorkersTrainToTheEnd) {
  job_.mutable_checkpoint()->set_directory(JoinPath(directory_, "checkpoints"));
  job_.mutable_stop()->set_steps(6);
  Start();
  std::vector<std::thread> workers;
  // The first failure ends both workers: a step that one of them did not push is never decided.
  std::atomic<bool> failed{false};
  for (int rank = 0; rank < kWorkers; ++rank) {
    workers.emplace_back([&, rank] {
      const auto fail = [&](const std::string& what) {
        ADD_FAILURE() << "rank " << rank << ": " << what;
        failed.store(true);
      };
      const RegisterReply me = Register(rank);
      const std::unique_ptr<TensorClient> client = Client(me);
      WorkerModel model(map_);
      int64_t next = 0;
      while (!failed.load()) {
        GetAssignmentsRequest request;
        request.set_generation(me.generation());
        request.set_rank(rank);
        request.set_incarnation(me.incarnation());
        request.set_first_step(next);
        request.set_max_assignments(3);
        const auto reply = leader_->GetAssignments(request, Soon());
        if (!reply.ok()) return fail(reply.status().ToString());
        if (reply->finished()) return;
        for (const Assignment& assignment : reply->assignments()) {
          next = assignment.step() + 1;
          const auto pulled = client->Pull(TensorClient::Source::kStep, me.generation(),
                                           assignment.weights_step(), model.views, Soon());
          if (!pulled.ok()) return fail(pulled.status().ToString());
          // Both ranks see the same weights: gradients 1 and 5 with 3 and 1 examples make 2.
          const float expected = TestValue("w", 11) - static_cast<float>(assignment.weights_step());
          if (std::abs(model.At(0, 11) - expected) > 1e-3) {
            return fail(absl::StrCat("w[11] is ", model.At(0, 11), ", want ", expected));
          }
          const auto result = Push(client.get(), me, rank, assignment.step(), rank == 0 ? 1 : 5,
                                   rank == 0 ? 3 : 1, rank == 0 ? 10 : 20);
          if (!result.ok()) return fail(result.status().ToString());
          if (result->outcome != APPLIED) return fail(PushOutcome_Name(result->outcome));
        }
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  ASSERT_FALSE(failed.load());
  GroupLeader* const leader = nodes_[0].server->leader();
  ASSERT_TRUE(Eventually([&] { return leader->State(false).phase() == GroupState::FINISHED; }));
  EXPECT_TRUE(
      FileSystem::Real()->Exists(JoinPath(directory_, "checkpoints", "alpha", "MANIFEST-1-6")));

  // A follower reads the last cut.
  WorkerModel model(map_);
  const RegisterReply me = Register(0);
  const auto pulled =
      Client(me)->Pull(TensorClient::Source::kCut, me.generation(), 6, model.views, Soon());
  ASSERT_TRUE(pulled.ok()) << pulled.status();
  EXPECT_EQ(pulled->version.step(), 6);
  EXPECT_NEAR(model.At(0, 20479), TestValue("w", 20479) - 6, 1e-3);
  EXPECT_NEAR(model.At(4, 0), 12.5, 1e-6);
  EXPECT_EQ(model.tensors[5].As<int64_t>()[0], 101);
  EXPECT_EQ(model.At(3, 2), TestValue("fixed", 2));

  // One that asks for bfloat16 gets the parameters rounded, and all else as it is.
  WorkerModel rounded(map_);
  const auto half =
      Client(me, DT_BFLOAT16)
          ->Pull(TensorClient::Source::kCut, me.generation(), 6, rounded.views, Soon());
  ASSERT_TRUE(half.ok()) << half.status();
  for (int64_t i = 0; i < 20480; ++i) {
    ASSERT_EQ(rounded.At(0, i), FromBfloat16(ToBfloat16(model.At(0, i)))) << i;
  }
  EXPECT_EQ(rounded.At(4, 0), model.At(4, 0));
  EXPECT_EQ(rounded.At(3, 2), model.At(3, 2));
  EXPECT_EQ(rounded.tensors[5].As<int64_t>()[0], 101);
  EXPECT_LT(half->bytes, pulled->bytes * 0.6);
  const auto other =
      Client(me, DT_HALF)
          ->Pull(TensorClient::Source::kCut, me.generation(), 6, rounded.views, Soon());
  EXPECT_EQ(other.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(other.status().message()), HasSubstr("transfer_dtype: DT_HALF"));

  const auto history = leader_->GetHistory(Soon());
  ASSERT_TRUE(history.ok());
  EXPECT_EQ(history->examples(), 24);
  EXPECT_DOUBLE_EQ(history->training(0).label_loss(), 2.0);
}

TEST_F(ServerTest, WatchersHearOfTheGroup) {
  Start();
  const auto watcher = GroupWatcher::Start(nodes_[0].rpc->address(), group_, nullptr);
  ASSERT_TRUE(Eventually([&] { return watcher->state().newest_cut().generation() > 0; }));
  EXPECT_EQ(watcher->state().shard_map().tensors_size(), map_.tensors_size());
  EXPECT_EQ(watcher->state().shard_addresses(1), nodes_[1].rpc->address());
  EXPECT_EQ(watcher->state().phase(), GroupState::STARTING);
  Register(0);
  Register(1);
  EXPECT_TRUE(Eventually([&] { return watcher->state().phase() == GroupState::TRAINING; }));
}

TEST_F(ServerTest, BadPushesAreRefusedByName) {
  Start();
  const RegisterReply me = Register(0);
  const auto channel = MakeChannel(nodes_[0].rpc->address(), ChannelUse::kBulk);
  const auto frame = [](const FrameHeader& header, const std::string& payload) {
    TensorFrame small;
    *small.mutable_header() = header;
    auto owned = std::make_shared<std::string>(payload);
    const PayloadRef ref = {owned->data(), owned->size(), owned};
    return EncodeWithPayload(
        small, TensorFrame::kPayloadFieldNumber,
        payload.empty() ? absl::Span<const PayloadRef>() : absl::MakeConstSpan(&ref, 1));
  };
  FrameHeader good;
  PushBegin* const begin = good.mutable_begin();
  *begin->mutable_group() = group_;
  begin->set_generation(me.generation());
  begin->set_step(1);
  begin->set_incarnation(me.incarnation());
  begin->set_shard_map_digest(me.shard_map_digest());
  const auto outcome = [&](const std::vector<std::pair<FrameHeader, std::string>>& frames) {
    auto stream = BulkStream::Open(channel, "/codistill.TensorTransfer/Push", Soon());
    for (const auto& f : frames) {
      if (!stream->Write(frame(f.first, f.second))) break;
    }
    stream->WritesDone();
    grpc::ByteBuffer message;
    while (stream->Read(&message)) {
    }
    return stream->Finish();
  };

  FrameHeader header = good;
  header.mutable_begin()->mutable_group()->set_run_id("another run");
  EXPECT_EQ(outcome({{header, ""}}).code(), absl::StatusCode::kPermissionDenied);
  header = good;
  header.mutable_begin()->set_shard_map_digest(1);
  EXPECT_EQ(outcome({{header, ""}}).code(), absl::StatusCode::kFailedPrecondition);
  header = good;
  header.mutable_begin()->set_generation(me.generation() - 1);
  EXPECT_EQ(outcome({{header, ""}}).code(), absl::StatusCode::kAborted);
  header = good;
  header.mutable_begin()->set_rank(2);
  EXPECT_EQ(outcome({{header, ""}}).code(), absl::StatusCode::kInvalidArgument);
  header = good;
  header.mutable_begin()->set_step(9);
  EXPECT_EQ(outcome({{header, ""}}).code(), absl::StatusCode::kFailedPrecondition);

  FrameHeader chunk;
  chunk.mutable_chunk()->set_tensor(0);
  chunk.mutable_chunk()->set_count(4);
  chunk.mutable_chunk()->set_dtype(DT_FLOAT);
  chunk.mutable_chunk()->set_content(TensorChunk::GRADIENT);
  EXPECT_EQ(outcome({{chunk, "0123456789abcdef"}}).code(), absl::StatusCode::kInvalidArgument);
  const absl::Status short_payload = outcome({{good, ""}, {chunk, "0123456789"}});
  EXPECT_EQ(short_payload.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(short_payload.message()), HasSubstr("tensor w: 4 elements"));
  const auto refused = [&](const std::function<void(TensorChunk*)>& change,
                           const std::string& payload) {
    FrameHeader changed = chunk;
    change(changed.mutable_chunk());
    const absl::Status status = outcome({{good, ""}, {changed, payload}});
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  const std::string four = "0123456789abcdef";
  EXPECT_THAT(refused([](TensorChunk* c) { c->set_dtype(DT_BFLOAT16); }, four),
              HasSubstr("tensor w: has dtype DT_FLOAT, not DT_BFLOAT16"));
  EXPECT_THAT(refused([](TensorChunk* c) { c->set_tensor(77); }, four),
              HasSubstr("tensor 77 is not in the shard map"));
  EXPECT_THAT(refused([](TensorChunk* c) { c->set_begin(160 * 128 - 2); }, four),
              HasSubstr("tensor w: 4 elements from 20478 are not within one piece"));
  EXPECT_THAT(refused([](TensorChunk* c) { c->set_begin(-1); }, four), HasSubstr("tensor w: 4"));
  EXPECT_THAT(refused([](TensorChunk* c) { c->set_count(int64_t{1} << 62); }, four),
              HasSubstr("tensor w: 4611686018427387904 elements"));
  EXPECT_THAT(refused([](TensorChunk* c) { c->set_content(TensorChunk::VALUE); }, four),
              HasSubstr("tensor w: is a PARAMETER and takes no VALUE"));
  EXPECT_THAT(refused([](TensorChunk*) {}, four + "more"), HasSubstr("came with 20 bytes"));
  // Several chunks in one frame: each must be there, and nothing else.
  FrameHeader two = chunk;
  *two.add_more() = chunk.chunk();
  two.mutable_more(0)->set_begin(4);
  const auto refuses_two = [&](const std::string& payload) {
    const absl::Status status = outcome({{good, ""}, {two, payload}});
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(refuses_two("0123456789"), HasSubstr("are not in the frame"));
  EXPECT_THAT(refuses_two(four + "0123"), HasSubstr("tensor w: 4 elements came with 4 bytes"));
  EXPECT_THAT(refuses_two(four + four + "0"), HasSubstr("came with 17 bytes"));
  two.mutable_chunk()->set_dtype(DT_INVALID);
  EXPECT_THAT(refuses_two(four + four), HasSubstr("DT_INVALID"));
  // A message longer than any frame.
  const absl::Status long_message =
      outcome({{good, ""}, {chunk, std::string(kMaxFrameBytes + 1, 'x')}});
  EXPECT_EQ(long_message.code(), absl::StatusCode::kResourceExhausted) << long_message;

  FrameHeader end;
  end.mutable_end()->set_finite(true);
  end.mutable_end()->set_num_examples(1);
  const absl::Status early = outcome({{good, ""}, {chunk, "0123456789abcdef"}, {end, ""}});
  EXPECT_EQ(early.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(early.message()), HasSubstr("tensor w has not wholly arrived"));
  EXPECT_EQ(outcome({{good, ""}}).code(), absl::StatusCode::kInvalidArgument);  // no END
  EXPECT_EQ(nodes_[0].server->shard()->state().step, 0);
  EXPECT_TRUE(Eventually([&] { return nodes_[0].server->shard()->counters().staged_pushes == 0; }));

  // NaN: every shard is told, the step is numbered, nothing changes.
  const RegisterReply both[kWorkers] = {me, Register(1)};
  std::vector<std::thread> workers;
  for (int rank = 0; rank < kWorkers; ++rank) {
    workers.emplace_back([&, rank] {
      const auto client = Client(both[rank]);
      const auto result =
          Push(client.get(), both[rank], rank, 1, std::numeric_limits<float>::quiet_NaN(), 1, 1);
      ASSERT_TRUE(result.ok()) << result.status();
      EXPECT_EQ(result->outcome, REJECTED);
      EXPECT_THAT(result->message, HasSubstr("is not finite"));
    });
  }
  for (std::thread& worker : workers) worker.join();
  WorkerModel model(map_);
  const auto pulled =
      Client(me)->Pull(TensorClient::Source::kStep, me.generation(), 1, model.views, Soon());
  ASSERT_TRUE(pulled.ok()) << pulled.status();
  for (int64_t i = 0; i < 160 * 128; ++i) ASSERT_EQ(model.At(0, i), TestValue("w", i)) << i;
  for (int64_t i = 0; i < 128; ++i) ASSERT_EQ(model.At(1, i), TestValue("b", i)) << i;

  // A process that a newer one of its rank has replaced.
  header = good;
  header.mutable_begin()->set_step(2);
  header.mutable_begin()->set_incarnation(me.incarnation() + 1);
  EXPECT_EQ(outcome({{header, ""}}).code(), absl::StatusCode::kInvalidArgument);  // no END
  header.mutable_begin()->set_incarnation(me.incarnation());
  const absl::Status replaced = outcome({{header, ""}});
  EXPECT_EQ(replaced.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(replaced.message()), HasSubstr("rank 0: incarnation"));
}

TEST_F(ServerTest, LostShardBeginsAnotherGeneration) {
  Start();
  const RegisterReply first[kWorkers] = {Register(0), Register(1)};
  const auto client = Client(first[0]);
  WorkerModel model(map_);
  // What waits on the surviving shard is told.
  absl::Status waiting;
  std::thread puller([&] {
    waiting =
        client->Pull(TensorClient::Source::kStep, first[0].generation(), 3, model.views, Soon())
            .status();
  });
  ASSERT_TRUE(Eventually([&] { return nodes_[0].server->shard()->counters().parked_calls == 1; }));
  const std::string address = nodes_[1].rpc->address();
  nodes_[1].Stop();
  StartNode(1, address);
  puller.join();
  EXPECT_FALSE(waiting.ok());
  ASSERT_TRUE(Eventually([&] {
    const GroupState state = nodes_[0].server->leader()->State(false);
    return state.version().generation() > first[0].generation() &&
           state.phase() == GroupState::TRAINING;
  }));
  // The old generation is over everywhere.
  const auto old =
      client->Pull(TensorClient::Source::kStep, first[0].generation(), 0, model.views, Soon());
  EXPECT_EQ(old.status().code(), absl::StatusCode::kAborted) << old.status();
  HeartbeatRequest heartbeat;
  heartbeat.set_incarnation(first[0].incarnation());
  EXPECT_GT(leader_->Heartbeat(heartbeat, Soon())->generation(), first[0].generation());

  const RegisterReply again[kWorkers] = {Register(0), Register(1)};
  std::vector<std::thread> workers;
  std::atomic<int> applied{0};
  for (int rank = 0; rank < kWorkers; ++rank) {
    workers.emplace_back([&, rank] {
      const auto mine = Client(again[rank]);
      const auto result = Push(mine.get(), again[rank], rank, 1, 2, 1, 1);
      if (result.ok() && result->outcome == APPLIED) ++applied;
    });
  }
  for (std::thread& worker : workers) worker.join();
  EXPECT_EQ(applied.load(), kWorkers);
  const auto now = Client(again[0])->Pull(TensorClient::Source::kStep, again[0].generation(), 1,
                                          model.views, Soon());
  ASSERT_TRUE(now.ok()) << now.status();
  EXPECT_NEAR(model.At(1, 5), TestValue("b", 5) - 1, 1e-4);
}

TEST_F(ServerTest, ShutdownWithParkedCallsReturns) {
  Start();
  const RegisterReply me = Register(0);
  const auto client = Client(me);
  WorkerModel model(map_);
  absl::Status push, pull;
  std::thread pusher([&] { push = Push(client.get(), me, 0, 1, 1, 1, 1).status(); });
  const auto other = Client(me);
  std::thread puller([&] {
    pull =
        other->Pull(TensorClient::Source::kStep, me.generation(), 1, model.views, Soon()).status();
  });
  ASSERT_TRUE(Eventually([&] { return nodes_[0].server->shard()->counters().parked_calls == 2; }));
  const absl::Time begin = absl::Now();
  nodes_[0].server->shard()->Drain();
  nodes_[0].Stop();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  pusher.join();
  puller.join();
  EXPECT_EQ(push.code(), absl::StatusCode::kUnavailable) << push;
  EXPECT_EQ(pull.code(), absl::StatusCode::kUnavailable) << pull;
}

TEST_F(ServerTest, PushesInHalfPrecision) {
  job_ = TestJob(directory_, kShards, /*workers=*/1);
  for (int s = 0; s < kShards; ++s) job_.mutable_groups(0)->add_shards();
  Start();
  const RegisterReply me = Register(0);
  const auto client = Client(me, DT_FLOAT, DT_HALF);
  // 1/3 as the nearest half, in every element; weights stay fp32.
  const float third = FromFloat16(ToFloat16(1.0f / 3));
  EXPECT_NE(third, 1.0f / 3);
  auto result = Push(client.get(), me, 0, 1, 1.0f / 3, 1, 1);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, APPLIED);
  const uint64_t half_bytes = result->bytes;
  // Finite as a float, but not as a half: refused by name, and nothing changes.
  result = Push(client.get(), me, 0, 2, 70000, 1, 1);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, REJECTED);
  EXPECT_THAT(result->message, HasSubstr("tensor w"));
  result = Push(Client(me).get(), me, 0, 3, 0, 1, 1);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, APPLIED);
  EXPECT_LT(half_bytes, result->bytes * 0.6);
  WorkerModel model(map_);
  const auto pulled =
      client->Pull(TensorClient::Source::kStep, me.generation(), 3, model.views, Soon());
  ASSERT_TRUE(pulled.ok()) << pulled.status();
  const float rate = job_.training().optimizer().learning_rate();
  for (int64_t i = 0; i < 20480; ++i) {
    ASSERT_NEAR(model.At(0, i), TestValue("w", i) - rate * third, 1e-6) << i;
  }
  EXPECT_NEAR(model.At(4, 0), 1, 1e-6);  // buffers are as they were
}

TEST_F(ServerTest, AsyncAppliesAtTheEnd) {
  job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  job_.mutable_stop()->set_steps(4);
  Start();
  const RegisterReply me = Register(0);
  Register(1);
  const auto client = Client(me);
  WorkerModel model(map_);
  for (int64_t step = 1; step <= 3; ++step) {
    const auto result = Push(client.get(), me, 0, step, 2, 1, 1);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->outcome, APPLIED);
    EXPECT_EQ(result->step, step);
  }
  EXPECT_EQ(Push(client.get(), me, 0, 3, 2, 1, 1)->outcome, DUPLICATE);
  const auto pulled =
      client->Pull(TensorClient::Source::kAtLeastStep, me.generation(), 3, model.views, Soon());
  ASSERT_TRUE(pulled.ok()) << pulled.status();
  EXPECT_NEAR(model.At(0, 9), TestValue("w", 9) - 3, 1e-4);
  EXPECT_EQ(Push(client.get(), me, 0, 4, 2, 1, 1)->outcome, APPLIED);
  EXPECT_EQ(Push(client.get(), me, 0, 5, 2, 1, 1)->outcome, DROPPED_LATE);
  GroupLeader* const leader = nodes_[0].server->leader();
  EXPECT_TRUE(Eventually([&] { return leader->State(false).phase() == GroupState::FINISHED; }));
}

// One worker, some steps, through what `shared_memory` allows: the weights at the end.
TEST_F(ServerTest, BothPathsGiveTheSameBits) {
  std::vector<std::vector<float>> results;
  job_ = TestJob(directory_, kShards, /*workers=*/1);
  for (int s = 0; s < kShards; ++s) job_.mutable_groups(0)->add_shards();
  const JobConfig job = job_;
  for (const bool shared_memory : {false, true}) {
    job_ = job;
    job_.mutable_transport()->set_shared_memory(shared_memory ? TransportConfig::AUTO
                                                              : TransportConfig::OFF);
    Start();
    const RegisterReply me = Register(0);
    const auto client = Client(me);
    for (int64_t step = 1; step <= 5; ++step) {
      const auto result = Push(client.get(), me, 0, step, 0.37f * step, 3, 0.1f * step);
      ASSERT_TRUE(result.ok()) << result.status();
      ASSERT_EQ(result->outcome, APPLIED);
      // The same push once more is known, whatever it was taken into.
      EXPECT_EQ(Push(client.get(), me, 0, step, 9, 3, 9)->outcome, DUPLICATE);
    }
    WorkerModel model(map_);
    const auto pulled =
        client->Pull(TensorClient::Source::kStep, me.generation(), 5, model.views, Soon());
    ASSERT_TRUE(pulled.ok()) << pulled.status();
    EXPECT_NE(model.At(0, 9), TestValue("w", 9));
    results.emplace_back();
    for (int tensor = 0; tensor < map_.tensors_size(); ++tensor) {
      if (map_.tensors(tensor).dtype() != DT_FLOAT) continue;
      if (map_.tensors(tensor).role() == TensorSpec::TIED) continue;
      for (const float value : model.tensors[tensor].As<float>()) results.back().push_back(value);
    }
    const TensorClient::StreamCounts counts = client->stream_counts();
    EXPECT_EQ(shared_memory ? counts.grpc : counts.shared_memory, 0);
    EXPECT_EQ(nodes_[0].server->bulk()->shared_memory_connections() > 0, shared_memory);
    for (Node& node : nodes_) node.Stop();
  }
  EXPECT_EQ(results[0], results[1]);
}

TEST_F(ServerTest, LeaderMustKnowItsShards) {
  ParameterServer::Options options;
  options.job = job_;
  const auto server = ParameterServer::Create(options);
  EXPECT_THAT(std::string(server.status().message()), HasSubstr("groups[0].shards[1].address"));
  options.shard = 7;
  EXPECT_THAT(std::string(ParameterServer::Create(options).status().message()),
              HasSubstr("--shard=7"));
}

}  // namespace
}  // namespace codistill
