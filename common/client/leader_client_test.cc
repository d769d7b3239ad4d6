#include "common/client/leader_client.h"

#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "common/base/mutex.h"
#include "common/rpc/grpc_status.h"
#include "gmock/gmock.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "proto/parameter_server.grpc.pb.h"

namespace codistill {
namespace {

// Answers unary calls with what it was asked, and Watch with the states given to it.
class EchoLeader final : public Leader::Service {
 public:
  grpc::Status Register(grpc::ServerContext* context, const RegisterRequest* request,
                        RegisterReply* reply) override {
    has_deadline = context->deadline() < std::chrono::system_clock::now() + std::chrono::hours(1);
    if (request->rank() == 9) return {grpc::StatusCode::INVALID_ARGUMENT, "rank 9"};
    *reply->add_shard_addresses() = request->group().run_id() + "/" + request->group().group();
    return grpc::Status::OK;
  }
  grpc::Status GetAssignments(grpc::ServerContext*, const GetAssignmentsRequest* request,
                              GetAssignmentsReply* reply) override {
    reply->set_finished(request->group().group() == "alpha");
    return grpc::Status::OK;
  }
  grpc::Status Heartbeat(grpc::ServerContext*, const HeartbeatRequest* request,
                         HeartbeatReply* reply) override {
    reply->set_drain(request->group().group() == "alpha");
    return grpc::Status::OK;
  }
  grpc::Status ReportEvaluation(grpc::ServerContext*, const ReportEvaluationRequest* request,
                                ReportEvaluationReply*) override {
    evaluated_step = request->group().group() == "alpha" ? request->result().version().step() : -1;
    return grpc::Status::OK;
  }
  grpc::Status GetHistory(grpc::ServerContext*, const GetHistoryRequest* request,
                          GetHistoryReply* reply) override {
    reply->set_examples(request->group().group() == "alpha" ? 7 : 0);
    return grpc::Status::OK;
  }
  grpc::Status Watch(grpc::ServerContext* context, const WatchRequest* request,
                     grpc::ServerWriter<GroupState>* writer) override {
    size_t next;
    {
      MutexLock lock(&mu_);
      ++watches_;
      next = sent_;
      EXPECT_EQ(request->group().group(), "alpha");
    }
    while (!context->IsCancelled()) {
      MutexLock lock(&mu_);
      mu_.AwaitWithTimeout(
          absl::Condition(
              +[](EchoLeader* self) { return self->sent_ < self->states_.size() || self->break_; },
              this),
          absl::Milliseconds(20));
      if (break_) {
        break_ = false;
        return {grpc::StatusCode::UNAVAILABLE, "restarting"};
      }
      for (; next < states_.size(); ++next) writer->Write(states_[next]);
      sent_ = next;
    }
    return grpc::Status::CANCELLED;
  }

  void Send(GroupState state) {
    MutexLock lock(&mu_);
    states_.push_back(std::move(state));
  }
  void Break() {
    MutexLock lock(&mu_);
    break_ = true;
  }
  int watches() {
    MutexLock lock(&mu_);
    return watches_;
  }

  std::atomic<bool> has_deadline{false};
  std::atomic<int64_t> evaluated_step{0};

 private:
  Mutex mu_;
  std::vector<GroupState> states_ ABSL_GUARDED_BY(mu_);
  size_t sent_ ABSL_GUARDED_BY(mu_) = 0;
  bool break_ ABSL_GUARDED_BY(mu_) = false;
  int watches_ ABSL_GUARDED_BY(mu_) = 0;
};

class LeaderClientTest : public testing::Test {
 protected:
  LeaderClientTest() {
    Serve(0);
    ref_.set_run_id("run");
    ref_.set_group("alpha");
  }
  ~LeaderClientTest() override { StopServing(); }

  void Serve(int port) {
    grpc::ServerBuilder builder;
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddListeningPort("127.0.0.1:" + std::to_string(port), grpc::InsecureServerCredentials(),
                             &port_);
    builder.RegisterService(&leader_);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
  }
  void StopServing() {
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
    server_.reset();
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  static absl::Time Soon() { return absl::Now() + absl::Seconds(20); }

  EchoLeader leader_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
  GroupRef ref_;
};

TEST_F(LeaderClientTest, CallsCarryTheGroupAndADeadline) {
  const auto client = LeaderClient::Create(address(), ref_);
  const auto reply = client->Register(RegisterRequest(), Soon());
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->shard_addresses(0), "run/alpha");
  EXPECT_TRUE(leader_.has_deadline);
  EXPECT_TRUE(client->GetAssignments(GetAssignmentsRequest(), Soon())->finished());
  EXPECT_TRUE(client->Heartbeat(HeartbeatRequest(), Soon())->drain());
  EXPECT_EQ(client->GetHistory(Soon())->examples(), 7);
  EvaluationResult result;
  result.mutable_version()->set_step(12);
  EXPECT_TRUE(client->ReportEvaluation(result, Soon()).ok());
  EXPECT_EQ(leader_.evaluated_step, 12);
}

TEST_F(LeaderClientTest, CodesComeThrough) {
  const auto client = LeaderClient::Create(address(), ref_);
  RegisterRequest request;
  request.set_rank(9);
  EXPECT_EQ(client->Register(request, Soon()).status(), absl::InvalidArgumentError("rank 9"));
  EXPECT_TRUE(absl::IsUnimplemented(client->ReportEnd(ReportEndRequest(), Soon())));
  StopServing();
  EXPECT_TRUE(absl::IsUnavailable(client->Register(request, Soon()).status()));
}

// Collects what a watcher tells.
class States {
 public:
  void Add(const GroupState& state) {
    MutexLock lock(&mu_);
    states_.push_back(state);
  }
  std::vector<GroupState> WaitFor(size_t n) {
    MutexLock lock(&mu_);
    auto enough = [this, n] { return states_.size() >= n; };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(30)));
    return states_;
  }

 private:
  Mutex mu_;
  std::vector<GroupState> states_;
};

GroupState State(int64_t step, uint64_t digest, bool with_map) {
  GroupState state;
  state.set_phase(GroupState::TRAINING);
  state.mutable_version()->set_step(step);
  state.set_shard_map_digest(digest);
  if (with_map) state.mutable_shard_map()->set_num_shards(static_cast<int>(digest));
  return state;
}

TEST_F(LeaderClientTest, WatcherTellsEveryStateWithItsShardMap) {
  States states;
  const auto watcher =
      GroupWatcher::Start(address(), ref_, [&](const GroupState& s) { states.Add(s); });
  EXPECT_EQ(watcher->state().phase(), GroupState::PHASE_INVALID);
  EXPECT_EQ(watcher->silence(), absl::InfiniteDuration());
  leader_.Send(State(1, 4, true));
  leader_.Send(State(2, 4, false));
  leader_.Send(State(3, 5, false));  // another map, not told yet
  const std::vector<GroupState> seen = states.WaitFor(3);
  EXPECT_EQ(seen[0].shard_map().num_shards(), 4);
  EXPECT_EQ(seen[1].version().step(), 2);
  EXPECT_EQ(seen[1].shard_map().num_shards(), 4);
  EXPECT_FALSE(seen[2].has_shard_map());
  EXPECT_EQ(watcher->state().version().step(), 3);
  EXPECT_LT(watcher->silence(), absl::Seconds(30));
}

TEST_F(LeaderClientTest, WatcherComesBackAfterABrokenStreamAndARestartedServer) {
  States states;
  const auto watcher =
      GroupWatcher::Start(address(), ref_, [&](const GroupState& s) { states.Add(s); });
  leader_.Send(State(1, 4, true));
  states.WaitFor(1);
  leader_.Break();
  leader_.Send(State(2, 4, false));
  EXPECT_EQ(states.WaitFor(2)[1].shard_map().num_shards(), 4);
  const int port = port_;
  StopServing();
  leader_.Send(State(3, 4, false));
  Serve(port);
  EXPECT_EQ(states.WaitFor(3)[2].version().step(), 3);
  EXPECT_GE(leader_.watches(), 3);
}

TEST_F(LeaderClientTest, WatcherOpensANewStreamWhereOneIsSilent) {
  States states;
  const auto watcher =
      GroupWatcher::Start(address(), ref_, [&](const GroupState& s) { states.Add(s); });
  leader_.Send(State(1, 4, true));
  states.WaitFor(1);
  const absl::Time deadline = Soon();
  while (leader_.watches() < 2 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(10));
  EXPECT_GE(leader_.watches(), 2);
  leader_.Send(State(2, 4, false));
  EXPECT_EQ(states.WaitFor(2)[1].version().step(), 2);
}

TEST_F(LeaderClientTest, WatcherStopsAtOnceWhetherConnectedOrNot) {
  const absl::Time start = absl::Now();
  {
    const auto watcher = GroupWatcher::Start(address(), ref_, nullptr);
    while (leader_.watches() == 0) absl::SleepFor(absl::Milliseconds(1));
  }
  { const auto watcher = GroupWatcher::Start("127.0.0.1:1", ref_, nullptr); }
  EXPECT_LT(absl::Now() - start, absl::Seconds(4));
}

}  // namespace
}  // namespace codistill
