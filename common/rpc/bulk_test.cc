// Bulk streams against real servers on loopback.

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/mutex.h"
#include "common/rpc/bulk_server.h"
#include "common/rpc/bulk_stream.h"
#include "common/rpc/channel.h"
#include "common/rpc/frame.h"
#include "common/rpc/server.h"
#include "gtest/gtest.h"
#include "proto/parameter_server.pb.h"

namespace codistill {
namespace {

constexpr int kField = TensorFrame::kPayloadFieldNumber;

absl::Time In(double seconds) { return absl::Now() + absl::Seconds(seconds); }

grpc::ByteBuffer Bytes(const std::string& bytes) {
  grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

std::string Text(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string text;
  for (const grpc::Slice& slice : slices) text.append(slice.begin(), slice.end());
  return text;
}

// What the handlers of a test have seen.
struct Log {
  void Add(const std::string& event) {
    MutexLock lock(&mu);
    events.push_back(event);
  }
  // Waits until `event` was seen `times` times.
  bool Await(const std::string& event, int times = 1) {
    const auto seen = [this, &event, times]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
      return std::count(events.begin(), events.end(), event) >= times;
    };
    MutexLock lock(&mu);
    return mu.AwaitWithTimeout(absl::Condition(&seen), absl::Seconds(20));
  }
  Mutex mu;
  std::vector<std::string> events ABSL_GUARDED_BY(mu);
  std::vector<std::shared_ptr<BulkCall>> parked ABSL_GUARDED_BY(mu);
};

class Handler : public BulkHandler {
 public:
  explicit Handler(Log* log) : log_(log) {}
  ~Handler() override { log_->Add("destroyed"); }
  void OnStart(std::shared_ptr<BulkCall> call) override {
    log_->Add("started");
    call_ = std::move(call);
    call_->Read();
  }
  void OnMessage(grpc::ByteBuffer) override { call_->Read(); }
  void OnHalfClose() override { log_->Add("half-close"); }
  void OnWritten() override {}
  void OnDone(bool cancelled) override { log_->Add(cancelled ? "cancelled" : "done"); }

 protected:
  Log* const log_;
  std::shared_ptr<BulkCall> call_;
};

// Sends every message back, then ends well.
class Echo : public Handler {
 public:
  using Handler::Handler;
  void OnMessage(grpc::ByteBuffer message) override { call_->Write(std::move(message)); }
  void OnWritten() override { call_->Read(); }
  void OnHalfClose() override { call_->Finish(absl::OkStatus()); }
};

// Adds up all bytes it is sent; answers with the sum and the count.
class Sum : public Handler {
 public:
  using Handler::Handler;
  void OnMessage(grpc::ByteBuffer message) override {
    TensorFrame small;
    DecodedPayload payload;
    const absl::Status status = DecodedPayload::Decode(&message, kField, &small, &payload);
    if (!status.ok()) return call_->Finish(status);
    for (int i = 0; i < payload.count(); ++i) {
      for (const absl::Span<const uint8_t> part : payload.parts(i)) {
        const uint8_t* data = part.data();
        const size_t size = part.size();
        for (size_t i = 0; i < size; ++i) sum_ = sum_ * 31 + data[i];
        bytes_ += size;
      }
    }
    call_->Read();
  }
  void OnHalfClose() override { call_->FinishWith(Bytes(absl::StrCat(bytes_, " ", sum_))); }

 private:
  uint64_t sum_ = 0;
  uint64_t bytes_ = 0;
};

// Waits for somebody to finish the call.
class Park : public Handler {
 public:
  using Handler::Handler;
  void OnHalfClose() override {
    MutexLock lock(&log_->mu);
    log_->parked.push_back(call_);
    log_->events.push_back("parked");
  }
};

// Sends without end.
class Flood : public Handler {
 public:
  using Handler::Handler;
  void OnStart(std::shared_ptr<BulkCall> call) override {
    call_ = std::move(call);
    OnWritten();
  }
  void OnWritten() override { call_->Write(Bytes(std::string(1 << 20, 'x'))); }
};

class BulkTest : public testing::Test {
 protected:
  void SetUp() override {
    Register<Echo>("/t.T/Echo");
    Register<Sum>("/t.T/Sum");
    Register<Park>("/t.T/Park");
    Register<Flood>("/t.T/Flood");
    RpcServer::Options options;
    options.bulk = &bulk_;
    auto server = RpcServer::Start(options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
    channel_ = MakeChannel(server_->address(), ChannelUse::kBulk);
  }

  template <typename T>
  void Register(const std::string& method) {
    bulk_.RegisterMethod(method, [this] { return std::make_unique<T>(&log_); });
  }

  std::unique_ptr<BulkStream> Open(const std::string& method, double seconds = 30) {
    return BulkStream::Open(channel_, method, In(seconds));
  }

  Log log_;
  BulkServer bulk_{2};
  std::unique_ptr<RpcServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(BulkTest, EchoesInOrder) {
  auto stream = Open("/t.T/Echo");
  grpc::ByteBuffer message;
  for (int i = 0; i < 100; ++i) {
    ASSERT_TRUE(stream->Write(Bytes(absl::StrCat("message ", i))));
    ASSERT_TRUE(stream->Read(&message));
    ASSERT_EQ(Text(message), absl::StrCat("message ", i));
  }
  stream->WritesDone();
  EXPECT_FALSE(stream->Read(&message));
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_FALSE(stream->Write(Bytes("late")));
  EXPECT_TRUE(log_.Await("done"));
  EXPECT_TRUE(log_.Await("destroyed"));
}

TEST_F(BulkTest, Moves64MegabytesUnharmed) {
  constexpr size_t kSize = 64 << 20;
  auto data = std::make_shared<std::vector<uint8_t>>(kSize);
  uint32_t x = 1;
  uint64_t expected = 0;
  uint8_t* bytes = data->data();
  for (size_t i = 0; i < kSize; ++i) {
    x = x * 1664525 + 1013904223;
    bytes[i] = x >> 24;
    expected = expected * 31 + bytes[i];
  }
  auto stream = Open("/t.T/Sum", 120);
  for (size_t begin = 0; begin < kSize; begin += kFramePayloadBytes) {
    TensorFrame header;
    header.mutable_header()->mutable_chunk()->set_begin(begin);
    const PayloadRef payload{bytes + begin, kFramePayloadBytes, data};
    ASSERT_TRUE(stream->Write(EncodeWithPayload(header, kField, {payload})));
  }
  stream->WritesDone();
  grpc::ByteBuffer reply;
  ASSERT_TRUE(stream->Read(&reply));
  EXPECT_EQ(Text(reply), absl::StrCat(kSize, " ", expected));
  EXPECT_TRUE(stream->Finish().ok());
  // gRPC lets go of the slices, in its own time.
  stream.reset();
  server_.reset();
  channel_.reset();
  for (const absl::Time end = In(10); data.use_count() > 1 && absl::Now() < end;) {
    std::this_thread::yield();
  }
  EXPECT_EQ(data.use_count(), 1);
}

TEST_F(BulkTest, ManyStreamsAtOnce) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([this, t] {
      for (int call = 0; call < 20; ++call) {
        auto stream = Open("/t.T/Echo");
        grpc::ByteBuffer message;
        const std::string text(1000 * t + call, 'a' + t);
        for (int i = 0; i < 5; ++i) {
          ASSERT_TRUE(stream->Write(Bytes(text)));
          ASSERT_TRUE(stream->Read(&message));
          ASSERT_EQ(Text(message), text);
        }
        ASSERT_TRUE(stream->Finish().ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(log_.Await("destroyed", 160));
}

TEST_F(BulkTest, CancelInMidStreamReachesTheHandler) {
  auto stream = Open("/t.T/Flood");
  grpc::ByteBuffer message;
  ASSERT_TRUE(stream->Read(&message));
  std::thread canceller([&] { stream->Cancel(); });
  while (stream->Read(&message)) {
  }
  canceller.join();
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(log_.Await("cancelled"));
  EXPECT_TRUE(log_.Await("destroyed"));
}

TEST_F(BulkTest, DroppingTheStreamCancelsIt) {
  {
    auto stream = Open("/t.T/Sum");
    ASSERT_TRUE(stream->Write(Bytes("")));
  }
  EXPECT_TRUE(log_.Await("cancelled"));
}

TEST_F(BulkTest, DeadlineEndsAParkedCallOnBothSides) {
  auto stream = Open("/t.T/Park", 0.2);
  stream->WritesDone();
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(log_.Await("cancelled"));
  MutexLock lock(&log_.mu);
  for (const auto& call : log_.parked) call->Finish(absl::OkStatus());  // ignored
}

TEST_F(BulkTest, ParkedCallIsFinishedFromAnotherThreadOnce) {
  auto stream = Open("/t.T/Park");
  stream->WritesDone();
  ASSERT_TRUE(log_.Await("parked"));
  std::shared_ptr<BulkCall> call;
  {
    MutexLock lock(&log_.mu);
    call = log_.parked[0];
  }
  EXPECT_NE(call->peer().find("127.0.0.1"), std::string::npos);
  Mutex mu;
  bool posted = false;
  call->Post([&] {
    MutexLock lock(&mu);
    posted = true;
  });
  {
    MutexLock lock(&mu);
    EXPECT_TRUE(mu.AwaitWithTimeout(absl::Condition(&posted), absl::Seconds(20)));
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([call, i] { call->FinishWith(Bytes(absl::StrCat(i))); });
  }
  for (std::thread& thread : threads) thread.join();
  call->Finish(absl::InternalError("ignored"));
  grpc::ByteBuffer reply;
  EXPECT_TRUE(stream->Read(&reply));
  EXPECT_EQ(Text(reply).size(), 1u);
  EXPECT_FALSE(stream->Read(&reply));
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_TRUE(log_.Await("done"));
  call->Post([] { ADD_FAILURE() << "the call is over"; });
}

TEST_F(BulkTest, StatusOfTheHandlerArrives) {
  auto stream = Open("/t.T/Sum");
  ASSERT_TRUE(stream->Write(Bytes("\x7f")));
  const absl::Status status = stream->Finish();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
}

TEST_F(BulkTest, UnknownMethodIsUnimplemented) {
  auto stream = Open("/t.T/Nothing");
  const absl::Status status = stream->Finish();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(status.message().find("/t.T/Nothing"), std::string::npos);
}

TEST_F(BulkTest, OversizeMessagesAreRefusedOnBothSides) {
  // The client's own limit.
  auto stream = Open("/t.T/Sum");
  stream->Write(Bytes(std::string(kMaxFrameBytes + 1, 'x')));
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kResourceExhausted);
  // A client without one: the method's limit, and the server's.
  channel_ = MakeChannel(server_->address(), ChannelUse::kPrediction);
  for (const int size : {kMaxFrameBytes + 1, kMaxControlBytes + 1}) {
    stream = Open("/t.T/Sum");
    stream->Write(Bytes(std::string(size, 'x')));
    const absl::Status status = stream->Finish();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  }
}

TEST_F(BulkTest, ShutdownEndsParkedCallsAtOnce) {
  std::vector<std::unique_ptr<BulkStream>> streams;
  for (int i = 0; i < 10; ++i) {
    streams.push_back(Open("/t.T/Park"));
    streams.back()->WritesDone();
  }
  ASSERT_TRUE(log_.Await("parked", 10));
  auto idle = Open("/t.T/Sum");  // waits for a message that does not come
  ASSERT_TRUE(log_.Await("started", 11));
  const absl::Time start = absl::Now();
  std::thread shutdown([this] { server_->Shutdown(In(20)); });
  for (auto& stream : streams) {
    EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kUnavailable);
  }
  EXPECT_EQ(idle->Finish().code(), absl::StatusCode::kUnavailable);
  shutdown.join();
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
  EXPECT_TRUE(log_.Await("destroyed", 11));
  // BulkCalls that somebody kept are harmless.
  MutexLock lock(&log_.mu);
  for (const auto& call : log_.parked) {
    call->Finish(absl::OkStatus());
    call->Post([] { ADD_FAILURE(); });
  }
}

TEST_F(BulkTest, ShutdownCancelsACallWhoseClientDoesNotRead) {
  auto stream = Open("/t.T/Flood");
  grpc::ByteBuffer message;
  ASSERT_TRUE(stream->Read(&message));
  server_->Shutdown(In(0.2));
  EXPECT_TRUE(log_.Await("destroyed"));
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kUnavailable);
}

TEST_F(BulkTest, ChannelFindsARestartedServerSoon) {
  EXPECT_TRUE(Open("/t.T/Echo")->Finish().ok());
  const std::string address = server_->address();
  server_.reset();
  EXPECT_EQ(Open("/t.T/Echo")->Finish().code(), absl::StatusCode::kUnavailable);
  BulkServer again(1);
  again.RegisterMethod("/t.T/Echo", [this] { return std::make_unique<Echo>(&log_); });
  RpcServer::Options options;
  options.bulk = &again;
  options.address = address;
  auto server = RpcServer::Start(options);
  ASSERT_TRUE(server.ok()) << server.status();
  const absl::Time start = absl::Now();
  const absl::Status status =
      RetryUntil(In(20), [this] { return Open("/t.T/Echo", 20)->Finish(); });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  server->reset();
}

TEST(RpcServerTest, PortInUseNamesTheAddress) {
  auto first = RpcServer::Start({});
  ASSERT_TRUE(first.ok()) << first.status();
  RpcServer::Options options;
  BulkServer bulk(1);
  options.bulk = &bulk;
  options.address = (*first)->address();
  auto second = RpcServer::Start(options);
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find((*first)->address()), std::string::npos)
      << second.status();
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(RpcServerTest, OtherAddressesNeedTheFlag) {
  RpcServer::Options options;
  options.address = "0.0.0.0:0";
  const absl::Status status = RpcServer::Start(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_NE(status.message().find("0.0.0.0:0"), std::string::npos);
  EXPECT_NE(status.message().find("--insecure_listen"), std::string::npos);
  options.insecure_listen = true;
  EXPECT_TRUE(RpcServer::Start(options).ok());
  for (const char* bad : {"127.0.0.1", "127.0.0.1:", ":1", "a:b:1", "127.0.0.1:65536", ""}) {
    options.address = bad;
    EXPECT_EQ(RpcServer::Start(options).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

}  // namespace
}  // namespace codistill
