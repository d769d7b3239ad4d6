// Streams that meet every kind of fault on their way to a server that notes what arrives.

#include "common/rpc/fault_stream.h"

#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "common/base/fault.h"
#include "common/base/mutex.h"
#include "common/rpc/bulk_server.h"
#include "common/rpc/channel.h"
#include "common/rpc/server.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr char kMethod[] = "/t.T/Note";

grpc::ByteBuffer Message(const std::string& text) {
  grpc::Slice slice(text);
  return grpc::ByteBuffer(&slice, 1);
}

std::string Text(const grpc::ByteBuffer& message) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(message.Dump(&slices).ok());
  std::string text;
  for (const grpc::Slice& part : slices) text.append(part.begin(), part.end());
  return text;
}

// What arrived, call by call; a call that was half-closed is answered with "ok".
class Notes {
 public:
  struct Call {
    std::vector<std::string> messages;
    bool whole = false;
  };

  class Handler final : public BulkHandler {
   public:
    explicit Handler(Notes* notes) : notes_(notes) {}
    void OnStart(std::shared_ptr<BulkCall> call) override {
      call_ = std::move(call);
      call_->Read();
    }
    void OnMessage(grpc::ByteBuffer message) override {
      noted_.messages.push_back(Text(message));
      call_->Read();
    }
    void OnHalfClose() override {
      noted_.whole = true;
      call_->FinishWith(Message("ok"));
    }
    void OnWritten() override {}
    void OnDone(bool) override {
      MutexLock lock(&notes_->mu_);
      notes_->calls_.push_back(noted_);
    }

   private:
    Notes* const notes_;
    std::shared_ptr<BulkCall> call_;
    Call noted_;
  };

  std::vector<Call> Await(size_t count) {
    MutexLock lock(&mu_);
    const auto there = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return calls_.size() >= count; };
    mu_.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(30));
    return calls_;
  }
  // Until one of them was half-closed: calls that were broken off may end before or after it.
  std::vector<Call> AwaitWhole() {
    MutexLock lock(&mu_);
    const auto there = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      return std::any_of(calls_.begin(), calls_.end(), [](const Call& call) { return call.whole; });
    };
    mu_.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(30));
    return calls_;
  }

 private:
  Mutex mu_;
  std::vector<Call> calls_ ABSL_GUARDED_BY(mu_);
};

class FaultStreamTest : public testing::Test {
 protected:
  void SetUp() override {
    FaultInjector::Global().Enable();
    bulk_.RegisterMethod(kMethod, [this] { return std::make_unique<Notes::Handler>(&notes_); });
    RpcServer::Options options;
    options.bulk = &bulk_;
    auto server = RpcServer::Start(options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = MakeChannel(server_->address(), ChannelUse::kBulk);
  }
  void TearDown() override { ASSERT_TRUE(FaultInjector::Global().SetRules(0, {}).ok()); }

  static void Set(FaultKind kind, uint64_t seed = 1) {
    FaultRule rule;
    rule.point = "stream:*";
    rule.kind = kind;
    rule.times = 1;
    ASSERT_TRUE(FaultInjector::Global().SetRules(seed, {rule}).ok());
  }

  // Sends "begin", "1" to "8" and "end".
  absl::Status Call(int middle = 8) {
    const auto stream = BulkStream::Open(channel_, kMethod, absl::Now() + absl::Seconds(30));
    bool open = stream->Write(Message("begin"));
    for (int i = 1; open && i <= middle; ++i) open = stream->Write(Message(std::to_string(i)));
    if (open) stream->Write(Message("end"));
    stream->WritesDone();
    grpc::ByteBuffer reply;
    stream->Read(&reply);
    return stream->Finish();
  }

  const std::vector<std::string> all_ = {"begin", "1", "2", "3", "4", "5", "6", "7", "8", "end"};
  Notes notes_;
  BulkServer bulk_{1};
  std::unique_ptr<RpcServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(FaultStreamTest, WithoutRulesNothingHappens) {
  EXPECT_TRUE(Call().ok());
  const auto calls = notes_.Await(1);
  EXPECT_EQ(calls[0].messages, all_);
  EXPECT_TRUE(calls[0].whole);
}

TEST_F(FaultStreamTest, ADroppedStreamBreaksInItsMiddle) {
  Set(FaultKind::kDrop);
  EXPECT_TRUE(absl::IsUnavailable(Call()));
  EXPECT_TRUE(Call().ok());
  // The first may never have arrived at all; if it did, not as a whole.
  int whole = 0;
  for (const Notes::Call& call : notes_.AwaitWhole()) {
    whole += call.whole && call.messages == all_ ? 1 : 0;
  }
  EXPECT_EQ(whole, 1);
}

TEST_F(FaultStreamTest, ADroppedStreamOfFewMessagesBreaksToo) {
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    Set(FaultKind::kDrop, seed);
    EXPECT_TRUE(absl::IsUnavailable(Call(/*middle=*/0))) << seed;
    EXPECT_TRUE(Call(/*middle=*/0).ok()) << seed;
  }
}

TEST_F(FaultStreamTest, OfADroppedReplyTheWorkIsDone) {
  Set(FaultKind::kDropReply);
  EXPECT_TRUE(absl::IsUnavailable(Call()));
  EXPECT_EQ(notes_.Await(1)[0].messages, all_);
}

TEST_F(FaultStreamTest, ADuplicateArrivesAsACallOfItsOwn) {
  Set(FaultKind::kDuplicate);
  EXPECT_TRUE(Call().ok());
  const auto calls = notes_.Await(2);
  ASSERT_EQ(calls.size(), 2u);
  EXPECT_EQ(calls[0].messages, all_);
  EXPECT_EQ(calls[1].messages, all_);
}

TEST_F(FaultStreamTest, ReorderedMessagesKeepTheFirstAndTheLast) {
  std::set<std::vector<std::string>> orders;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    Set(FaultKind::kReorder, seed);
    EXPECT_TRUE(Call().ok());
    std::vector<std::string> messages = notes_.Await(seed)[seed - 1].messages;
    ASSERT_EQ(messages.size(), all_.size());
    EXPECT_EQ(messages.front(), "begin");
    EXPECT_EQ(messages.back(), "end");
    orders.insert(messages);
    std::sort(messages.begin(), messages.end());
    std::vector<std::string> sorted = all_;
    std::sort(sorted.begin(), sorted.end());
    EXPECT_EQ(messages, sorted);
  }
  EXPECT_GT(orders.size(), 2u);
}

}  // namespace
}  // namespace codistill
