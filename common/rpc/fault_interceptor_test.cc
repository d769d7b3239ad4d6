// Calls over loopback that meet every kind of fault on their way out.

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "common/base/fault.h"
#include "common/base/mutex.h"
#include "common/rpc/call_registry.h"
#include "common/rpc/channel.h"
#include "common/rpc/server.h"
#include "common/rpc/unary_call.h"
#include "gtest/gtest.h"
#include "proto/parameter_server.grpc.pb.h"

namespace codistill {
namespace {

constexpr char kPoint[] = "rpc:/codistill.Leader/Heartbeat";

// Notes what arrives, in order.
class TestLeader : public Leader::CallbackService {
 public:
  grpc::ServerUnaryReactor* Heartbeat(grpc::CallbackServerContext* context,
                                      const HeartbeatRequest* request,
                                      HeartbeatReply* reply) override {
    reply->set_generation(7);
    {
      MutexLock lock(&mu_);
      arrived_.push_back(request->rank());
    }
    return AnswerUnary(context, absl::OkStatus());
  }

  // Waits for so many.
  std::vector<int> Arrived(size_t count) {
    MutexLock lock(&mu_);
    const auto enough = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return arrived_.size() >= count; };
    mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(30));
    return arrived_;
  }

 private:
  Mutex mu_;
  std::vector<int> arrived_ ABSL_GUARDED_BY(mu_);
};

class FaultInterceptorTest : public testing::Test {
 protected:
  void SetUp() override {
    FaultInjector::Global().Enable();
    RpcServer::Options options;
    options.services = {&leader_};
    auto server = RpcServer::Start(options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    stub_ = Leader::NewStub(MakeChannel(server_->address(), ChannelUse::kControl));
  }
  void TearDown() override { ASSERT_TRUE(FaultInjector::Global().SetRules(0, {}).ok()); }

  static void Set(FaultKind kind, absl::Duration delay = absl::Milliseconds(20)) {
    FaultRule rule;
    rule.point = kPoint;
    rule.kind = kind;
    rule.times = 1;
    rule.delay = delay;
    ASSERT_TRUE(FaultInjector::Global().SetRules(1, {rule}).ok());
  }

  grpc::Status Call(int rank, HeartbeatReply* reply = nullptr) {
    HeartbeatRequest request;
    request.set_rank(rank);
    HeartbeatReply own;
    const auto context = MakeContext(absl::Now() + absl::Seconds(30));
    return stub_->Heartbeat(context.get(), request, reply == nullptr ? &own : reply);
  }

  TestLeader leader_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<Leader::Stub> stub_;
};

TEST_F(FaultInterceptorTest, ADroppedCallNeverArrives) {
  Set(FaultKind::kDrop);
  const grpc::Status status = Call(1);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_NE(status.error_message().find("injected fault"), std::string::npos);
  EXPECT_TRUE(Call(2).ok());
  EXPECT_EQ(leader_.Arrived(1), std::vector<int>({2}));
}

TEST_F(FaultInterceptorTest, OfADroppedReplyTheWorkIsDone) {
  Set(FaultKind::kDropReply);
  EXPECT_EQ(Call(1).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(Call(2).ok());
  EXPECT_EQ(leader_.Arrived(2), std::vector<int>({1, 2}));
}

TEST_F(FaultInterceptorTest, ADuplicateArrivesTwiceAndIsAnsweredOnce) {
  Set(FaultKind::kDuplicate);
  HeartbeatReply reply;
  EXPECT_TRUE(Call(1, &reply).ok());
  EXPECT_EQ(reply.generation(), 7u);
  EXPECT_EQ(leader_.Arrived(2), std::vector<int>({1, 1}));
}

TEST_F(FaultInterceptorTest, ADelayedCallIsThatMuchLater) {
  Set(FaultKind::kDelay, absl::Milliseconds(120));
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(Call(1).ok());
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(115));
}

TEST_F(FaultInterceptorTest, TheNextCallOvertakesAReorderedOne) {
  Set(FaultKind::kReorder, absl::Seconds(20));
  std::thread held([&] { EXPECT_TRUE(Call(1).ok()); });
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  while (FaultInjector::Global().counts()[0].faults == 0 && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  // Sent off before the held one follows, and its answer is here before that one's is awaited.
  EXPECT_TRUE(Call(2).ok());
  held.join();
  const std::vector<int> arrived = leader_.Arrived(2);
  EXPECT_EQ(arrived.size(), 2u);
  EXPECT_NE(std::find(arrived.begin(), arrived.end(), 1), arrived.end());
}

TEST_F(FaultInterceptorTest, AReorderedCallThatNobodyOvertakesGoesByItself) {
  Set(FaultKind::kReorder, absl::Milliseconds(50));
  EXPECT_TRUE(Call(1).ok());
  EXPECT_EQ(leader_.Arrived(1), std::vector<int>({1}));
}

}  // namespace
}  // namespace codistill
