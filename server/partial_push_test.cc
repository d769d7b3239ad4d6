// A worker killed between its pushes to two shards never yields a model averaged over different
// workers on different shards. Real shards and leader over real sockets; the workers are played,
// frame by frame, so that they die at an exact place.

#include <atomic>
#include <cmath>
#include <functional>
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
#include "common/rpc/server.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/parameter_server.h"
#include "server/test_model.h"

namespace codistill {
namespace {

constexpr int kShards = 2;
constexpr int64_t kExamples = 4;
constexpr float kLearningRate = 0.5f;
// Exact in binary, like all their sums and means, and far apart.
constexpr float kGradients[] = {2, 10};

absl::Time Soon() { return absl::Now() + absl::Seconds(30); }

bool Eventually(const std::function<bool()>& condition) {
  for (const absl::Time end = Soon(); absl::Now() < end; absl::SleepFor(absl::Milliseconds(5))) {
    if (condition()) return true;
  }
  return condition();
}

// How far a push gets on one shard.
enum class Reach { kNothing, kBegin, kHalf, kAllButEnd, kEnd };

class PartialPushTest : public testing::Test {
 protected:
  struct Node {
    std::unique_ptr<ParameterServer> server;
    std::unique_ptr<RpcServer> rpc;
  };
  struct Member {
    int rank = 0;
    RegisterReply reply;
  };

  void SetUp() override {
    directory_ = JoinPath(testing::TempDir(), "partial");
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(WriteTestModel(directory_));
    job_ = TestJob(directory_, kShards, 2);
    job_.mutable_training()->set_membership(TrainingConfig::ELASTIC);
    job_.mutable_training()->set_lease_s(1.5);
    job_.mutable_stop()->set_steps(1000);
    map_ = BuildShardMap(TestTensors(), kShards).value();
    for (int s = 0; s < kShards; ++s) job_.mutable_groups(0)->add_shards();
    group_.set_run_id("run-7");
    group_.set_group("alpha");
    StartNode(1);
    job_.mutable_groups(0)->mutable_shards(1)->set_address(nodes_[1].rpc->address());
    StartNode(0);
    leader_ = LeaderClient::Create(nodes_[0].rpc->address(), group_);
    for (Node& node : nodes_) {
      channels_.push_back(MakeChannel(node.rpc->address(), ChannelUse::kBulk));
    }
    for (int i = 0; i < map_.tensors_size(); ++i) {
      const TensorSpec& spec = map_.tensors(i);
      const std::vector<int64_t> shape(spec.shape().begin(), spec.shape().end());
      expected_.push_back(Tensor::Zeros(spec.dtype(), shape));
      pulled_.push_back(Tensor::Zeros(spec.dtype(), shape));
      TensorView view;
      view.name = spec.name();
      view.dtype = spec.dtype();
      view.shape = shape;
      view.data = pulled_.back().data();
      views_.push_back(view);
      if (spec.role() != TensorSpec::PARAMETER) continue;
      for (int64_t e = 0; e < expected_.back().elements(); ++e) {
        expected_.back().As<float>()[e] = TestValue(spec.name(), e);
      }
    }
  }

  void TearDown() override {
    for (Node& node : nodes_) {
      if (node.rpc != nullptr) node.rpc->Shutdown(absl::Now() + absl::Seconds(1));
      node.rpc.reset();
      node.server.reset();
    }
  }

  void StartNode(int shard) {
    ParameterServer::Options options;
    options.job = job_;
    options.shard = shard;
    auto server = ParameterServer::Create(options);
    ASSERT_TRUE(server.ok()) << server.status();
    nodes_[shard].server = *std::move(server);
    RpcServer::Options rpc;
    rpc.address = "127.0.0.1:0";
    rpc.services = nodes_[shard].server->services();
    rpc.bulk = nodes_[shard].server->bulk();
    rpc.registries = nodes_[shard].server->registries();
    auto listening = RpcServer::Start(rpc);
    ASSERT_TRUE(listening.ok()) << listening.status();
    nodes_[shard].rpc = *std::move(listening);
    nodes_[shard].server->Start(nodes_[shard].rpc->address());
  }

  Member Register(int rank) {
    RegisterRequest request;
    request.set_rank(rank);
    request.set_process_nonce(++process_);
    *request.mutable_tensors() = TestTensors().tensors();
    absl::StatusOr<RegisterReply> reply;
    EXPECT_TRUE(Eventually([&] {
      reply = leader_->Register(request, Soon());
      return reply.ok();
    })) << reply.status();
    return {rank, *reply};
  }

  // The next step this member is given.
  int64_t NextStep(const Member& me) {
    GetAssignmentsRequest request;
    request.set_generation(me.reply.generation());
    request.set_rank(me.rank);
    request.set_incarnation(me.reply.incarnation());
    request.set_max_assignments(1);
    absl::StatusOr<GetAssignmentsReply> reply;
    EXPECT_TRUE(Eventually([&] {
      reply = leader_->GetAssignments(request, absl::Now() + absl::Seconds(1));
      return reply.ok() && reply->assignments_size() > 0;
    })) << reply.status();
    return reply.ok() && reply->assignments_size() > 0 ? reply->assignments(0).step() : -1;
  }

  void Beat(const Member& me) {
    HeartbeatRequest request;
    request.set_rank(me.rank);
    request.set_incarnation(me.reply.incarnation());
    EXPECT_TRUE(leader_->Heartbeat(request, Soon()).ok());
  }

  static bool Write(BulkStream* stream, const FrameHeader& header, const std::string& payload) {
    TensorFrame frame;
    *frame.mutable_header() = header;
    const auto owned = std::make_shared<std::string>(payload);
    const PayloadRef ref = {owned->data(), owned->size(), owned};
    return stream->Write(EncodeWithPayload(
        frame, TensorFrame::kPayloadFieldNumber,
        payload.empty() ? absl::Span<const PayloadRef>() : absl::MakeConstSpan(&ref, 1)));
  }

  // A push to one shard as far as `reach`; its stream stays open.
  std::unique_ptr<BulkStream> Push(const Member& me, int shard, int64_t step, Reach reach) {
    if (reach == Reach::kNothing) return nullptr;
    auto stream = BulkStream::Open(channels_[shard], "/codistill.TensorTransfer/Push", Soon());
    FrameHeader begin;
    *begin.mutable_begin()->mutable_group() = group_;
    begin.mutable_begin()->set_generation(me.reply.generation());
    begin.mutable_begin()->set_step(step);
    begin.mutable_begin()->set_rank(me.rank);
    begin.mutable_begin()->set_incarnation(me.reply.incarnation());
    begin.mutable_begin()->set_shard_map_digest(me.reply.shard_map_digest());
    EXPECT_TRUE(Write(stream.get(), begin, ""));
    if (reach == Reach::kBegin) return stream;
    for (const Piece& piece : map_.pieces()) {
      const TensorSpec& spec = map_.tensors(piece.tensor());
      const bool parameter = spec.role() == TensorSpec::PARAMETER;
      if (piece.shard() != shard || (!parameter && spec.role() != TensorSpec::BUFFER)) continue;
      FrameHeader header;
      TensorChunk* const chunk = header.mutable_chunk();
      chunk->set_tensor(piece.tensor());
      chunk->set_begin(piece.begin());
      chunk->set_count(piece.count());
      chunk->set_dtype(spec.dtype());
      chunk->set_content(parameter ? TensorChunk::GRADIENT : TensorChunk::VALUE);
      const size_t size = ElementSize(spec.dtype());
      std::string payload(static_cast<size_t>(piece.count()) * size, '\0');
      if (parameter) {
        if (reach == Reach::kHalf) {
          chunk->set_count(piece.count() / 2);
          payload.resize(static_cast<size_t>(piece.count() / 2) * size);
        }
        for (size_t at = 0; at < payload.size(); at += size) {
          std::memcpy(&payload[at], &kGradients[me.rank], size);
        }
      }
      EXPECT_TRUE(Write(stream.get(), header, payload));
      if (reach == Reach::kHalf) return stream;
    }
    if (reach == Reach::kAllButEnd) return stream;
    FrameHeader end;
    end.mutable_end()->set_num_examples(kExamples);
    end.mutable_end()->set_finite(true);
    EXPECT_TRUE(Write(stream.get(), end, ""));
    return stream;
  }

  static PushReply ReplyOf(BulkStream* stream) {
    PushReply reply;
    grpc::ByteBuffer message;
    DecodedPayload none;
    EXPECT_TRUE(stream->Read(&message));
    EXPECT_TRUE(
        DecodedPayload::Decode(&message, TensorFrame::kPayloadFieldNumber, &reply, &none).ok());
    return reply;
  }

  int64_t StepOf(int shard) { return nodes_[shard].server->shard()->state().step; }

  // Takes one step of `gradient` in the expectation, and compares every element of both shards.
  void ExpectStep(const Member& me, int64_t step, float gradient) {
    TensorClient::Options options;
    options.group = group_;
    options.shard_map = me.reply.shard_map();
    for (Node& node : nodes_) options.shard_addresses.push_back(node.rpc->address());
    auto client = TensorClient::Create(options);
    ASSERT_TRUE(client.ok()) << client.status();
    const auto pull =
        (*client)->Pull(TensorClient::Source::kStep, me.reply.generation(), step, views_, Soon());
    ASSERT_TRUE(pull.ok()) << pull.status();
    int64_t wrong = 0, checked = 0;
    for (int i = 0; i < map_.tensors_size(); ++i) {
      if (map_.tensors(i).role() != TensorSpec::PARAMETER) continue;
      for (int64_t e = 0; e < expected_[i].elements(); ++e) {
        float& value = expected_[i].As<float>()[e];
        value -= kLearningRate * gradient;
        // The mean is exact; an update may be fused into one rounding instead of two.
        wrong += std::abs(value - pulled_[i].As<float>()[e]) > 1e-4f ? 1 : 0;
        value = pulled_[i].As<float>()[e];
        ++checked;
      }
    }
    EXPECT_EQ(wrong, 0) << "of " << checked << " elements after step " << step;
  }

  int64_t BegunOn(int shard, int rank) {
    for (const RankPushes& of : nodes_[shard].server->shard()->push_counts()) {
      if (of.rank() == rank) return of.counts().begun();
    }
    return 0;
  }

  // Both shards' answers to a rank so far.
  PushCounts CountsOf(int rank) {
    const std::map<int32_t, PushCounts> counts = nodes_[0].server->leader()->push_counts();
    const auto found = counts.find(rank);
    return found == counts.end() ? PushCounts() : found->second;
  }

  std::string directory_;
  JobConfig job_;
  ShardMap map_;
  GroupRef group_;
  Node nodes_[kShards];
  std::vector<std::shared_ptr<grpc::Channel>> channels_;
  std::unique_ptr<LeaderClient> leader_;
  uint64_t process_ = 100;
  std::vector<Tensor> expected_, pulled_;
  std::vector<TensorView> views_;
};

TEST_F(PartialPushTest, NeverMixesMembersBetweenShards) {
  // The tensor "w" is cut over both shards: a mixed model would show within one tensor. Were each
  // shard to decide with what it has (StepCollectorTest.DecidingOnEachShardAloneWouldMixMembers),
  // the one that had END would take w - 0.5 * (2 + 10) / 2 and the other w - 0.5 * 2.
  const struct {
    Reach reach[kShards];
    bool lease;  // its lease ends; else another process takes its place
  } kDeaths[] = {
      {{Reach::kEnd, Reach::kNothing}, true},  {{Reach::kEnd, Reach::kBegin}, false},
      {{Reach::kEnd, Reach::kHalf}, false},    {{Reach::kEnd, Reach::kAllButEnd}, true},
      {{Reach::kNothing, Reach::kEnd}, false}, {{Reach::kAllButEnd, Reach::kEnd}, false},
      {{Reach::kEnd, Reach::kEnd}, false},  // whole: it counts, dead or not
  };
  const Member survivor = Register(0);
  Member victim = Register(1);
  int64_t dropped = 0, lost = 0, applied = 0, begun[kShards] = {};
  for (const auto& death : kDeaths) {
    const int64_t step = NextStep(victim);
    ASSERT_EQ(NextStep(survivor), step);
    std::unique_ptr<BulkStream> theirs[kShards];
    const bool whole = death.reach[0] == Reach::kEnd && death.reach[1] == Reach::kEnd;
    for (int s = 0; s < kShards; ++s) {
      theirs[s] = Push(victim, s, step, death.reach[s]);
      if (death.reach[s] == Reach::kNothing) continue;
      ++begun[s];
      ASSERT_TRUE(Eventually([&] { return BegunOn(s, 1) == begun[s]; }));
      if (death.reach[s] == Reach::kEnd) {
        // Staged and reported: deciding alone, this shard would take it.
        ASSERT_TRUE(
            Eventually([&] { return nodes_[s].server->shard()->counters().parked_calls == 1; }));
        ++(whole ? applied : dropped);
      } else {
        ++lost;
      }
    }
    // It dies. Its connection to a shard that has END ends too, and takes nothing back.
    for (int s = 0; s < kShards; ++s) {
      if (theirs[s] != nullptr) theirs[s]->Cancel();
      theirs[s].reset();
    }
    std::unique_ptr<BulkStream> ours[kShards];
    for (int s = 0; s < kShards; ++s) ours[s] = Push(survivor, s, step, Reach::kEnd);
    const absl::Time died = absl::Now();
    if (!death.lease) victim = Register(1);
    ASSERT_TRUE(Eventually([&] {
      if (death.lease) Beat(survivor);
      return StepOf(0) == step && StepOf(1) == step;
    }));
    if (death.lease) {
      EXPECT_GT(absl::Now() - died, absl::Seconds(0.5));
    }
    for (int s = 0; s < kShards; ++s) {
      const PushReply reply = ReplyOf(ours[s].get());
      EXPECT_EQ(reply.outcome(), APPLIED);
      EXPECT_EQ(reply.step(), step);
    }
    ExpectStep(survivor, step, whole ? (kGradients[0] + kGradients[1]) / 2 : kGradients[0]);
    if (death.lease) victim = Register(1);
  }
  // Every push that was begun has been accounted for, with the answer it had or would have had.
  EXPECT_TRUE(Eventually([&] {
    Beat(survivor);
    const PushCounts counts = CountsOf(1);
    return counts.open() == 0 && counts.lost() == lost && counts.dropped_late() == dropped &&
           counts.applied() == applied && counts.begun() == lost + dropped + applied;
  })) << CountsOf(1).ShortDebugString();
  EXPECT_EQ(CountsOf(0).applied(), static_cast<int64_t>(kShards * std::size(kDeaths)));
}

TEST_F(PartialPushTest, ALatePushIsToldWhatItMet) {
  const Member survivor = Register(0);
  const Member late = Register(1);
  const int64_t step = NextStep(late);
  ASSERT_EQ(NextStep(survivor), step);
  const auto first = Push(late, 0, step, Reach::kEnd);
  const auto second = Push(late, 1, step, Reach::kAllButEnd);
  const auto take = [&](int64_t at) {
    std::unique_ptr<BulkStream> ours[kShards];
    for (int s = 0; s < kShards; ++s) ours[s] = Push(survivor, s, at, Reach::kEnd);
    ASSERT_TRUE(Eventually([&] {
      Beat(survivor);
      return StepOf(0) == at && StepOf(1) == at;
    }));
  };
  take(step);  // once the lease of the other has ended
  const PushReply reply = ReplyOf(first.get());
  EXPECT_EQ(reply.outcome(), DROPPED_LATE);
  EXPECT_EQ(reply.step(), step);
  ASSERT_EQ(NextStep(survivor), step + 1);
  take(step + 1);
  // The rest comes when the group is further on: it is answered with where that is.
  FrameHeader end;
  end.mutable_end()->set_num_examples(kExamples);
  end.mutable_end()->set_finite(true);
  ASSERT_TRUE(Write(second.get(), end, ""));
  const PushReply later = ReplyOf(second.get());
  EXPECT_EQ(later.outcome(), DROPPED_LATE);
  EXPECT_EQ(later.step(), step + 1);
  // Weights for a step that was decided are gone, which is no error of the group's.
  TensorClient::Options options;
  options.group = group_;
  options.shard_map = late.reply.shard_map();
  for (Node& node : nodes_) options.shard_addresses.push_back(node.rpc->address());
  const auto client = TensorClient::Create(options);
  ASSERT_TRUE(client.ok());
  EXPECT_EQ((*client)
                ->Pull(TensorClient::Source::kStep, late.reply.generation(), step, views_, Soon())
                .status()
                .code(),
            absl::StatusCode::kOutOfRange);
}

}  // namespace
}  // namespace codistill
