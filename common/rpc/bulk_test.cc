// Bulk streams against real servers on loopback, through gRPC and through shared memory.

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/mutex.h"
#include "common/rpc/bulk_channel.h"
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
    written = -1;
    OnWritten();
  }
  void OnWritten() override {
    ++written;
    call_->Write(Bytes(std::string(1 << 20, 'x')));
  }
  static inline std::atomic<int64_t> written{0};
};

enum class Path { kGrpc, kSharedMemory };

class BulkTest : public testing::TestWithParam<Path> {
 protected:
  void SetUp() override {
    Register<Echo>("/t.T/Echo");
    Register<Sum>("/t.T/Sum");
    Register<Park>("/t.T/Park");
    Register<Flood>("/t.T/Flood");
    RpcServer::Options options;
    options.bulk = &bulk_;
    if (shared_memory()) bulk_.ServeSharedMemory();
    auto server = RpcServer::Start(options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
    channel_ = BulkChannel::Create(server_->address(), {});
  }

  // What was tested was what was meant.
  void TearDown() override {
    if (channel_ == nullptr) return;
    const BulkChannel::Counts counts = channel_->counts();
    if (shared_memory()) {
      EXPECT_GT(counts.shared_memory, 0);
    } else {
      EXPECT_EQ(counts.shared_memory, 0);
    }
  }

  static bool shared_memory() { return GetParam() == Path::kSharedMemory; }

  template <typename T>
  void Register(const std::string& method) {
    bulk_.RegisterMethod(method, [this] { return std::make_unique<T>(&log_); });
  }

  std::unique_ptr<BulkStream> Open(const std::string& method, double seconds = 30) {
    return channel_->Open(method, In(seconds));
  }

  Log log_;
  BulkServer bulk_{2};
  std::unique_ptr<RpcServer> server_;
  std::shared_ptr<BulkChannel> channel_;
};

TEST_P(BulkTest, EchoesInOrder) {
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

TEST_P(BulkTest, Moves64MegabytesUnharmed) {
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

TEST_P(BulkTest, ManyStreamsAtOnce) {
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

TEST_P(BulkTest, CancelInMidStreamReachesTheHandler) {
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

TEST_P(BulkTest, DroppingTheStreamCancelsIt) {
  {
    auto stream = Open("/t.T/Sum");
    ASSERT_TRUE(stream->Write(Bytes("")));
  }
  EXPECT_TRUE(log_.Await("cancelled"));
}

TEST_P(BulkTest, DeadlineEndsAParkedCallOnBothSides) {
  auto stream = Open("/t.T/Park", 0.2);
  stream->WritesDone();
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(log_.Await("cancelled"));
  MutexLock lock(&log_.mu);
  for (const auto& call : log_.parked) call->Finish(absl::OkStatus());  // ignored
}

TEST_P(BulkTest, ParkedCallIsFinishedFromAnotherThreadOnce) {
  auto stream = Open("/t.T/Park");
  stream->WritesDone();
  ASSERT_TRUE(log_.Await("parked"));
  std::shared_ptr<BulkCall> call;
  {
    MutexLock lock(&log_.mu);
    call = log_.parked[0];
  }
  EXPECT_NE(call->peer().find(shared_memory() ? absl::StrCat("pid ", getpid()) : "127.0.0.1"),
            std::string::npos)
      << call->peer();
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

TEST_P(BulkTest, StatusOfTheHandlerArrives) {
  auto stream = Open("/t.T/Sum");
  ASSERT_TRUE(stream->Write(Bytes("\x7f")));
  const absl::Status status = stream->Finish();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
}

TEST_P(BulkTest, UnknownMethodIsUnimplemented) {
  auto stream = Open("/t.T/Nothing");
  const absl::Status status = stream->Finish();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(status.message().find("/t.T/Nothing"), std::string::npos);
}

TEST_P(BulkTest, OversizeMessagesAreRefusedOnBothSides) {
  // The client's own limit.
  auto stream = Open("/t.T/Sum");
  stream->Write(Bytes(std::string(kMaxFrameBytes + 1, 'x')));
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kResourceExhausted);
  // A client without one: the method's limit, and the server's.
  const auto channel = MakeChannel(server_->address(), ChannelUse::kPrediction);
  for (const int size : {kMaxFrameBytes + 1, kMaxControlBytes + 1}) {
    stream = shared_memory() ? Open("/t.T/Sum") : BulkStream::Open(channel, "/t.T/Sum", In(30));
    stream->Write(Bytes(std::string(size, 'x')));
    const absl::Status status = stream->Finish();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  }
}

TEST_P(BulkTest, ShutdownEndsParkedCallsAtOnce) {
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

TEST_P(BulkTest, ShutdownCancelsACallWhoseClientDoesNotRead) {
  auto stream = Open("/t.T/Flood");
  grpc::ByteBuffer message;
  ASSERT_TRUE(stream->Read(&message));
  server_->Shutdown(In(0.2));
  EXPECT_TRUE(log_.Await("destroyed"));
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kUnavailable);
}

TEST_P(BulkTest, ChannelFindsARestartedServerSoon) {
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

// A link carries one call after another, and the calls of a method share few of them.
TEST_P(BulkTest, LinksAreUsedAgain) {
  if (!shared_memory()) GTEST_SKIP() << "gRPC has no links";
  grpc::ByteBuffer message;
  for (int i = 0; i < 50; ++i) {
    auto stream = Open("/t.T/Echo");
    ASSERT_TRUE(stream->Write(Bytes(absl::StrCat("call ", i))));
    ASSERT_TRUE(stream->Read(&message));
    EXPECT_EQ(Text(message), absl::StrCat("call ", i));
    ASSERT_TRUE(stream->Finish().ok());
  }
  EXPECT_EQ(bulk_.shared_memory_connections(), 1);
  // A call that ended early leaves nothing of itself to the next one.
  for (int i = 0; i < 20; ++i) {
    auto refused = Open("/t.T/Sum");
    while (refused->Write(Bytes("\x7f"))) {
    }
    EXPECT_EQ(refused->Finish().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(bulk_.shared_memory_connections(), 2);
}

// Messages of all lengths around those of frames and slots arrive as they were.
TEST_P(BulkTest, AnyLengthArrives) {
  auto stream = Open("/t.T/Echo");
  grpc::ByteBuffer message;
  for (const int around :
       {0, 4096, (512 << 10) + 4096, 1 << 20, 2 * ((512 << 10) + 4096), kMaxFrameBytes}) {
    for (int size = std::max(0, around - 2); size <= std::min(around + 2, kMaxFrameBytes); ++size) {
      std::string text(size, 'a');
      for (int i = 0; i < size; i += 61) text[i] = static_cast<char>('a' + i % 23);
      ASSERT_TRUE(stream->Write(Bytes(text))) << size;
      ASSERT_TRUE(stream->Read(&message)) << size;
      ASSERT_TRUE(Text(message) == text) << size;
    }
  }
  EXPECT_TRUE(stream->Finish().ok());
}

// Whoever keeps messages does not stop the stream, however many.
TEST_P(BulkTest, KeptMessagesDoNotStopTheStream) {
  auto stream = Open("/t.T/Echo");
  std::vector<grpc::ByteBuffer> kept;
  for (int i = 0; i < 40; ++i) {
    const std::string text(600000, 'a' + i % 26);
    ASSERT_TRUE(stream->Write(Bytes(text)));
    ASSERT_TRUE(stream->Read(&kept.emplace_back()));
  }
  EXPECT_TRUE(stream->Finish().ok());
  for (int i = 0; i < 40; ++i) EXPECT_EQ(Text(kept[i]), std::string(600000, 'a' + i % 26));
}

// The server sends no further than a client reads.
TEST_P(BulkTest, ASlowReaderStopsTheWriter) {
  auto stream = Open("/t.T/Flood", 60);
  grpc::ByteBuffer message;
  ASSERT_TRUE(stream->Read(&message));
  int64_t before = -1, sent = Flood::written.load();
  for (const absl::Time end = In(20); sent != before && absl::Now() < end;) {
    before = sent;
    absl::SleepFor(absl::Milliseconds(50));
    sent = Flood::written.load();
  }
  EXPECT_EQ(sent, before);
  if (shared_memory()) {
    EXPECT_LE(sent, 8);  // 7 slots of half a message
  }
  stream->Cancel();
}

INSTANTIATE_TEST_SUITE_P(Paths, BulkTest, testing::Values(Path::kGrpc, Path::kSharedMemory),
                         [](const testing::TestParamInfo<Path>& info) {
                           return info.param == Path::kGrpc ? "Grpc" : "SharedMemory";
                         });

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
