// Parked unary calls and server streams against a real server on loopback, with the services of the
// project as examples.

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/rpc/channel.h"
#include "common/rpc/server.h"
#include "common/rpc/server_stream.h"
#include "common/rpc/unary_call.h"
#include "gtest/gtest.h"
#include "proto/parameter_server.grpc.pb.h"

namespace codistill {
namespace {

absl::Time In(double seconds) { return absl::Now() + absl::Seconds(seconds); }

using AssignmentCall = UnaryCall<GetAssignmentsRequest, GetAssignmentsReply>;

// GetAssignments parks, Heartbeat blocks on an executor, Register answers at once, Watch streams.
class TestLeader : public Leader::CallbackService {
 public:
  explicit TestLeader(Executor* executor, CallRegistry* registry)
      : executor_(executor), registry_(registry) {}

  grpc::ServerUnaryReactor* GetAssignments(grpc::CallbackServerContext* context,
                                           const GetAssignmentsRequest* request,
                                           GetAssignmentsReply* reply) override {
    auto call = AssignmentCall::Start(context, request, reply, registry_);
    call->OnEnd([this] { ++ended; });
    MutexLock lock(&mu);
    parked.push_back(call);
    return call->reactor();
  }

  grpc::ServerUnaryReactor* Heartbeat(grpc::CallbackServerContext* context,
                                      const HeartbeatRequest* request,
                                      HeartbeatReply* reply) override {
    return RunUnary(
        executor_, registry_, context, request, reply,
        [this](const HeartbeatRequest& request, HeartbeatReply* reply, const auto& call) {
          ++started;
          MutexLock lock(&mu);
          while (!release && !call.ended()) {
            mu.AwaitWithTimeout(absl::Condition(&release), absl::Milliseconds(5));
          }
          reply->set_generation(request.incarnation());
          return absl::OkStatus();
        });
  }

  grpc::ServerUnaryReactor* Register(grpc::CallbackServerContext* context,
                                     const RegisterRequest* request,
                                     RegisterReply* reply) override {
    if (request->rank() < 0) return AnswerUnary(context, absl::InvalidArgumentError("rank"));
    reply->set_incarnation(7);
    return AnswerUnary(context, absl::OkStatus());
  }

  grpc::ServerWriteReactor<GroupState>* Watch(grpc::CallbackServerContext*,
                                              const WatchRequest*) override {
    auto stream = ServerStream<GroupState>::Start(registry_, overflow, capacity);
    stream->OnEnd([this] { ++ended; });
    MutexLock lock(&mu);
    streams.push_back(stream);
    return stream->reactor();
  }

  template <typename T>
  T Await(std::vector<T>* list, size_t count = 1) {
    const auto there = [list, count] { return list->size() >= count; };
    MutexLock lock(&mu);
    EXPECT_TRUE(mu.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(20)));
    return list->back();
  }

  Mutex mu;
  std::vector<AssignmentCall::Ptr> parked ABSL_GUARDED_BY(mu);
  std::vector<ServerStream<GroupState>::Ptr> streams ABSL_GUARDED_BY(mu);
  bool release ABSL_GUARDED_BY(mu) = false;
  std::atomic<int> started{0}, ended{0};
  StreamOverflow overflow = StreamOverflow::kLatestWins;
  size_t capacity = 1;

 private:
  Executor* const executor_;
  CallRegistry* const registry_;
};

class CallbackTest : public testing::Test {
 protected:
  void SetUp() override {
    Executor::Options executor_options;
    executor_options.threads = 1;
    executor_options.queue_capacity = 1;
    executor_ = Executor::Create(executor_options).value();
    leader_ = std::make_unique<TestLeader>(executor_.get(), &registry_);
    RpcServer::Options options;
    options.services = {leader_.get()};
    options.registries = {&registry_};
    auto server = RpcServer::Start(options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
    stub_ = Leader::NewStub(MakeChannel(server_->address(), ChannelUse::kControl));
  }
  // Before the server: it waits for what the executor holds.
  void TearDown() override { server_.reset(); }

  bool Eventually(const std::function<bool()>& condition) {
    for (const absl::Time end = In(20); absl::Now() < end; std::this_thread::yield()) {
      if (condition()) return true;
    }
    return false;
  }

  absl::Status GetAssignments(double seconds, GetAssignmentsReply* reply) {
    return FromGrpcStatus(
        stub_->GetAssignments(MakeContext(In(seconds)).get(), GetAssignmentsRequest(), reply));
  }

  CallRegistry registry_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<TestLeader> leader_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<Leader::Stub> stub_;
};

TEST_F(CallbackTest, AnswersAtOnce) {
  RegisterRequest request;
  RegisterReply reply;
  EXPECT_TRUE(stub_->Register(MakeContext(In(20)).get(), request, &reply).ok());
  EXPECT_EQ(reply.incarnation(), 7u);
  request.set_rank(-1);
  EXPECT_EQ(stub_->Register(MakeContext(In(20)).get(), request, &reply).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(CallbackTest, ParkedCallsAreFinishedOnceByAnyThread) {
  for (int round = 0; round < 30; ++round) {
    std::thread client([this] {
      GetAssignmentsReply reply;
      EXPECT_TRUE(GetAssignments(20, &reply).ok());
      EXPECT_TRUE(reply.finished());
    });
    const auto call = leader_->Await(&leader_->parked, round + 1);
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([call] {
        GetAssignmentsReply reply;
        reply.set_finished(true);
        call->FinishWith(reply);
      });
    }
    for (std::thread& thread : threads) thread.join();
    call->Finish(absl::InternalError("ignored"));
    client.join();
    EXPECT_TRUE(call->ended());
  }
  EXPECT_TRUE(Eventually([this] { return registry_.size() == 0; }));
  EXPECT_EQ(leader_->ended, 0);
}

TEST_F(CallbackTest, DeadlineEndsAParkedCallAndRunsTheHook) {
  GetAssignmentsReply reply;
  EXPECT_EQ(GetAssignments(0.05, &reply).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(Eventually([this] { return leader_->ended == 1; }));
  const auto call = leader_->Await(&leader_->parked);
  bool ran = false;
  call->OnEnd([&] { ran = true; });
  EXPECT_TRUE(ran);
  // The reply's memory is gone by now: this must not touch it.
  EXPECT_TRUE(Eventually([this] { return registry_.size() == 0; }));
  reply.set_finished(true);
  call->FinishWith(reply);
}

TEST_F(CallbackTest, BlockingHandlersRunOnTheExecutorAndOverflowIsRefused) {
  const auto beat = [this](uint64_t incarnation) {
    HeartbeatRequest request;
    HeartbeatReply reply;
    request.set_incarnation(incarnation);
    const absl::Status status =
        FromGrpcStatus(stub_->Heartbeat(MakeContext(In(20)).get(), request, &reply));
    if (status.ok()) {
      EXPECT_EQ(reply.generation(), incarnation);
    }
    return status;
  };
  std::thread running([&] { EXPECT_TRUE(beat(1).ok()); });
  EXPECT_TRUE(Eventually([this] { return leader_->started == 1; }));
  std::thread queued([&] { EXPECT_TRUE(beat(2).ok()); });
  EXPECT_TRUE(Eventually([this] { return executor_->queue_size() == 1; }));
  EXPECT_EQ(beat(3).code(), absl::StatusCode::kResourceExhausted);
  {
    MutexLock lock(&leader_->mu);
    leader_->release = true;
  }
  running.join();
  queued.join();
}

TEST_F(CallbackTest, CancelledWhileWorkingEndsWhenTheHandlerReturns) {
  HeartbeatReply reply;
  EXPECT_EQ(stub_->Heartbeat(MakeContext(In(0.05)).get(), HeartbeatRequest(), &reply).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(Eventually([this] { return registry_.size() == 0; }));
}

TEST_F(CallbackTest, ShutdownEndsParkedWorkingAndStreamingCalls) {
  std::vector<std::thread> clients;
  std::atomic<int> unavailable{0};
  for (int i = 0; i < 5; ++i) {
    clients.emplace_back([&] {
      GetAssignmentsReply reply;
      if (GetAssignments(30, &reply).code() == absl::StatusCode::kUnavailable) ++unavailable;
    });
  }
  clients.emplace_back([&] {
    HeartbeatReply reply;
    stub_->Heartbeat(MakeContext(In(30)).get(), HeartbeatRequest(), &reply);
  });
  clients.emplace_back([&] {
    auto context = MakeContext(In(30));
    auto reader = stub_->Watch(context.get(), WatchRequest());
    GroupState state;
    EXPECT_FALSE(reader->Read(&state));
    if (reader->Finish().error_code() == grpc::StatusCode::UNAVAILABLE) ++unavailable;
  });
  leader_->Await(&leader_->parked, 5);
  leader_->Await(&leader_->streams, 1);
  EXPECT_TRUE(Eventually([this] { return leader_->started == 1; }));
  const absl::Time start = absl::Now();
  server_->Shutdown(In(20));
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(unavailable, 6);
  EXPECT_EQ(leader_->ended, 6);
  EXPECT_EQ(registry_.size(), 0u);
}

TEST_F(CallbackTest, StreamSendsInOrderThenFinishes) {
  leader_->overflow = StreamOverflow::kRefuse;
  leader_->capacity = 100;
  auto context = MakeContext(In(20));
  auto reader = stub_->Watch(context.get(), WatchRequest());
  const auto stream = leader_->Await(&leader_->streams);
  GroupState state;
  for (int i = 1; i <= 100; ++i) {
    state.set_stop_steps(i);
    ASSERT_TRUE(stream->Send(state));
  }
  stream->Finish(absl::OkStatus());
  EXPECT_FALSE(stream->Send(state));
  for (int i = 1; i <= 100; ++i) {
    ASSERT_TRUE(reader->Read(&state));
    EXPECT_EQ(state.stop_steps(), i);
  }
  EXPECT_FALSE(reader->Read(&state));
  EXPECT_TRUE(reader->Finish().ok());
}

// A client that does not read: what waits stays one message, and it is the newest that arrives
// last.
TEST_F(CallbackTest, LatestWinsWhenTheClientIsSlow) {
  auto context = MakeContext(In(30));
  auto reader = stub_->Watch(context.get(), WatchRequest());
  const auto stream = leader_->Await(&leader_->streams);
  constexpr int kSent = 2000;
  GroupState state;
  state.set_error(std::string(100000, 'x'));  // fills the connection's windows soon
  for (int i = 1; i <= kSent; ++i) {
    state.set_stop_steps(i);
    ASSERT_TRUE(stream->Send(state));
  }
  stream->Finish(absl::OkStatus());
  int received = 0;
  int64_t last = 0;
  while (reader->Read(&state)) {
    ++received;
    EXPECT_GT(state.stop_steps(), last);
    last = state.stop_steps();
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(last, kSent);
  EXPECT_LT(received, kSent);
}

TEST_F(CallbackTest, FullStreamRefuses) {
  leader_->overflow = StreamOverflow::kRefuse;
  auto context = MakeContext(In(20));
  auto reader = stub_->Watch(context.get(), WatchRequest());
  const auto stream = leader_->Await(&leader_->streams);
  GroupState state;
  state.set_error(std::string(1 << 20, 'x'));
  bool refused = false;
  for (int i = 0; i < 1000 && !refused; ++i) refused = !stream->Send(state);
  EXPECT_TRUE(refused);
  context->TryCancel();
  EXPECT_TRUE(Eventually([&] { return stream->ended() && registry_.size() == 0; }));
  EXPECT_EQ(leader_->ended, 1);
}

}  // namespace
}  // namespace codistill
