// A small daemon in this process, driven over the network as operators would.

#include "common/daemon/daemon.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/flags/flag.h"
#include "absl/flags/reflection.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/fault.h"
#include "common/base/file.h"
#include "common/base/mutex.h"
#include "common/daemon/flags.h"
#include "common/daemon/process.h"
#include "common/rpc/address.h"
#include "common/rpc/bulk_stream.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "common/rpc/unary_call.h"
#include "gtest/gtest.h"
#include "httplib.h"
#include "nlohmann/json.hpp"
#include "proto/control.grpc.pb.h"
#include "proto/fault_injection.grpc.pb.h"
#include "proto/parameter_server.grpc.pb.h"

namespace codistill {
namespace {

absl::Time In(double seconds) { return absl::Now() + absl::Seconds(seconds); }

bool Eventually(const std::function<bool()>& condition) {
  for (const absl::Time end = In(20); absl::Now() < end; absl::SleepFor(absl::Milliseconds(2))) {
    if (condition()) return true;
  }
  return false;
}

// Parks every GetHistory call.
class ParkingLeader : public Leader::CallbackService {
 public:
  grpc::ServerUnaryReactor* GetHistory(grpc::CallbackServerContext* context,
                                       const GetHistoryRequest* request,
                                       GetHistoryReply* reply) override {
    auto call =
        UnaryCall<GetHistoryRequest, GetHistoryReply>::Start(context, request, reply, &registry);
    ++parked;
    return call->reactor();
  }
  CallRegistry registry;
  std::atomic<int> parked{0};
};

// A bulk method nobody ever answers.
class Silent : public BulkHandler {
 public:
  void OnStart(std::shared_ptr<BulkCall> call) override { call->Read(); }
  void OnMessage(grpc::ByteBuffer) override {}
  void OnHalfClose() override {}
  void OnWritten() override {}
  void OnDone(bool) override {}
};

class DaemonTest : public testing::Test {
 protected:
  Daemon::Options Options() {
    Daemon::Options options;
    options.kind = "parameter_server";
    options.job = "mnist";
    options.run_id = "run-1";
    options.group = "north";
    options.index = 3;
    options.services = {&leader_};
    options.registries = {&leader_.registry};
    options.fill_status = [](DaemonStatus* status) {
      status->set_state("training");
      status->set_step(41);
    };
    options.ready = [this] { return ready_.load(); };
    options.metrics = metrics_.get();
    return options;
  }

  void Start(Daemon::Options options) {
    auto daemon = Daemon::Start(std::move(options));
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = std::move(*daemon);
    run_ = std::thread([this] { result_ = daemon_->Run(); });
    channel_ = MakeChannel(daemon_->address(), ChannelUse::kControl);
    control_ = Control::NewStub(channel_);
  }
  absl::Status Join() {
    run_.join();
    return result_;
  }
  void TearDown() override {
    if (run_.joinable()) {
      daemon_->Stop(absl::OkStatus());
      run_.join();
    }
  }

  httplib::Result Get(const std::string& path) {
    return httplib::Client("127.0.0.1", ParseHostPort(daemon_->http_address())->port)
        .Get(path.c_str());
  }
  absl::StatusOr<DaemonStatus> GetStatus() {
    DaemonStatus status;
    const absl::Status result =
        FromGrpcStatus(control_->GetStatus(MakeContext(In(20)).get(), GetStatusRequest(), &status));
    if (!result.ok()) return result;
    return status;
  }
  // grpc.health.v1.Health/Check of the whole server: its message has one enum field, SERVING = 1.
  int Health() {
    const std::string reply = Raw("/grpc.health.v1.Health/Check", "");
    return reply.size() == 2 && reply[0] == 0x08 ? reply[1] : -1;
  }
  // One message there and one back.
  std::string Raw(const std::string& method, const std::string& request) {
    auto stream = BulkStream::Open(channel_, method, In(20));
    grpc::Slice slice(request);
    grpc::ByteBuffer message(&slice, 1);
    stream->Write(message);
    stream->WritesDone();
    std::string text;
    if (stream->Read(&message)) {
      std::vector<grpc::Slice> slices;
      EXPECT_TRUE(message.Dump(&slices).ok());
      for (const grpc::Slice& part : slices) text.append(part.begin(), part.end());
    }
    const absl::Status status = stream->Finish();
    EXPECT_TRUE(status.ok()) << status;
    return text;
  }

  absl::FlagSaver flags_;
  std::unique_ptr<Metrics> metrics_ = Metrics::Create({{"group", "north"}});
  std::atomic<bool> ready_{true};
  ParkingLeader leader_;
  std::unique_ptr<Daemon> daemon_;
  std::thread run_;
  absl::Status result_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<Control::Stub> control_;
};

TEST_F(DaemonTest, StatusOverGrpcAndHttp) {
  metrics_->counter("codistill_test_total", "Test.")->Add(2);
  Start(Options());
  const absl::StatusOr<DaemonStatus> status = GetStatus();
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_EQ(status->kind(), "parameter_server");
  EXPECT_EQ(status->job(), "mnist");
  EXPECT_EQ(status->run_id(), "run-1");
  EXPECT_EQ(status->group(), "north");
  EXPECT_EQ(status->index(), 3);
  EXPECT_EQ(status->state(), "training");
  EXPECT_EQ(status->step(), 41);
  EXPECT_EQ(status->pid(), getpid());
  EXPECT_EQ(status->address(), daemon_->address());
  EXPECT_EQ(status->http_address(), daemon_->http_address());
  EXPECT_FALSE(status->version().empty());

  EXPECT_TRUE(absl::StrContains(Get("/statusz")->body, "parameter_server north/3"));
  EXPECT_EQ(nlohmann::json::parse(Get("/statusz?json")->body)["step"], "41");
  EXPECT_EQ(Get("/healthz")->status, 200);
  EXPECT_TRUE(
      absl::StrContains(Get("/metrics")->body, "codistill_test_total{group=\"north\"} 2\n"));
}

TEST_F(DaemonTest, CallsAreCounted) {
  Daemon::Options options = Options();
  BulkServer bulk(1);
  bulk.RegisterMethod("/t.T/Silent", [] { return std::make_unique<Silent>(); });
  options.bulk = &bulk;
  Start(std::move(options));
  EXPECT_TRUE(GetStatus().ok());
  ResumeReply resume;
  EXPECT_FALSE(control_->Resume(MakeContext(In(20)).get(), ResumeRequest(), &resume).ok());
  {
    // Cancelled at the end of this block.
    auto stream = BulkStream::Open(channel_, "/t.T/Silent", In(20));
    const std::string text(1000, 'x');
    grpc::Slice slice(text);
    stream->Write(grpc::ByteBuffer(&slice, 1));
    EXPECT_TRUE(Eventually([this] {
      return absl::StrContains(
          metrics_->Text(),
          "codistill_rpc_received_bytes_total{group=\"north\",method=\"t.T/Silent\"} 1000\n");
    }));
  }
  const auto count = [this](const char* code, const char* method) {
    return absl::StrContains(
        metrics_->Text(), absl::StrCat("codistill_rpc_seconds_count{group=\"north\",code=\"", code,
                                       "\",method=\"", method, "\"} 1\n"));
  };
  EXPECT_TRUE(Eventually([&] { return count("OK", "codistill.Control/GetStatus"); }));
  EXPECT_TRUE(Eventually([&] { return count("FAILED_PRECONDITION", "codistill.Control/Resume"); }));
  EXPECT_TRUE(Eventually([&] { return count("CANCELLED", "t.T/Silent"); }));
  // A name that a client made up is no label.
  BulkStream::Open(channel_, "/t.T/MadeUp", In(20))->Finish().IgnoreError();
  EXPECT_FALSE(absl::StrContains(metrics_->Text(), "MadeUp"));
  daemon_->Stop(absl::OkStatus());
  run_.join();
  daemon_.reset();
}

TEST_F(DaemonTest, HealthAndReadinessFollowTheHook) {
  Start(Options());
  EXPECT_TRUE(Eventually([this] { return Health() == 1; }));
  EXPECT_EQ(Get("/readyz")->status, 200);
  ready_ = false;
  EXPECT_EQ(Get("/readyz")->status, 503);
  EXPECT_TRUE(Eventually([this] { return Health() == 2; }));
  ready_ = true;
  EXPECT_TRUE(Eventually([this] { return Health() == 1; }));
}

TEST_F(DaemonTest, ReflectionListsTheServices) {
  Start(Options());
  // ServerReflectionRequest{list_services: ""}: field 7, empty string.
  const std::string reply = Raw("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                                std::string("\x3a\0", 2));
  for (const char* service : {"codistill.Control", "codistill.Leader", "grpc.health.v1.Health"}) {
    EXPECT_TRUE(absl::StrContains(reply, service)) << service;
  }
}

TEST_F(DaemonTest, ControlCallsReachTheHooks) {
  Daemon::Options options = Options();
  std::atomic<bool> paused{false};
  options.pause = [&] {
    paused = true;
    return absl::OkStatus();
  };
  options.checkpoint = []() -> absl::StatusOr<CheckpointReply> {
    CheckpointReply reply;
    reply.set_bytes(77);
    return reply;
  };
  options.set = [](const std::string& name,
                   const std::string& value) -> absl::StatusOr<std::string> {
    if (name != "v") return absl::NotFoundError("there is only v");
    return absl::StrCat("not ", value);
  };
  Start(std::move(options));
  PauseReply pause;
  EXPECT_TRUE(control_->Pause(MakeContext(In(20)).get(), PauseRequest(), &pause).ok());
  EXPECT_TRUE(paused);
  ResumeReply resume;
  const absl::Status status =
      FromGrpcStatus(control_->Resume(MakeContext(In(20)).get(), ResumeRequest(), &resume));
  EXPECT_EQ(status, absl::FailedPreconditionError("this parameter_server cannot resume"));
  CheckpointReply checkpoint;
  EXPECT_TRUE(
      control_->Checkpoint(MakeContext(In(20)).get(), CheckpointRequest(), &checkpoint).ok());
  EXPECT_EQ(checkpoint.bytes(), 77u);
  SetRequest set;
  SetReply previous;
  set.set_name("v");
  set.set_value("2");
  EXPECT_TRUE(control_->Set(MakeContext(In(20)).get(), set, &previous).ok());
  EXPECT_EQ(previous.previous_value(), "not 2");
  set.set_name("w");
  EXPECT_EQ(control_->Set(MakeContext(In(20)).get(), set, &previous).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(DaemonTest, EveryDaemonCanSetTheVerbosityOfItsLog) {
  Start(Options());
  SetRequest set;
  SetReply previous;
  set.set_name("v");
  set.set_value("2");
  EXPECT_TRUE(control_->Set(MakeContext(In(20)).get(), set, &previous).ok());
  EXPECT_EQ(previous.previous_value(), "0");
  set.set_value("0");
  EXPECT_TRUE(control_->Set(MakeContext(In(20)).get(), set, &previous).ok());
  EXPECT_EQ(previous.previous_value(), "2");
  set.set_value("loud");
  EXPECT_EQ(control_->Set(MakeContext(In(20)).get(), set, &previous).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  set.set_name("w");
  const grpc::Status unknown = control_->Set(MakeContext(In(20)).get(), set, &previous);
  EXPECT_EQ(unknown.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_NE(unknown.error_message().find("there is: v"), std::string::npos);
}

TEST_F(DaemonTest, FaultsNeedLeave) {
  Start(Options());
  const auto faults = FaultInjection::NewStub(channel_);
  InjectFaultsRequest request;
  request.mutable_rules()->Add()->set_point("rpc:/codistill.Leader/GetHistory");
  request.mutable_rules(0)->set_times(1);
  InjectFaultsReply reply;
  absl::Status status =
      FromGrpcStatus(faults->InjectFaults(MakeContext(In(20)).get(), request, &reply));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(absl::StrContains(status.message(), "--allow_fault_injection")) << status;

  FaultInjector::Global().Enable();  // as the flag does
  status = FromGrpcStatus(faults->InjectFaults(MakeContext(In(20)).get(), request, &reply));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(status.message(), "rules[0]")) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "DROP_REPLY")) << status;

  request.mutable_rules(0)->set_kind(FaultRuleProto::DROP);
  status = FromGrpcStatus(faults->InjectFaults(MakeContext(In(20)).get(), request, &reply));
  ASSERT_TRUE(status.ok()) << status;
  // A channel made since then meets the fault, once.
  const auto leader = Leader::NewStub(MakeChannel(daemon_->address(), ChannelUse::kControl));
  GetHistoryReply history;
  status =
      FromGrpcStatus(leader->GetHistory(MakeContext(In(20)).get(), GetHistoryRequest(), &history));
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_EQ(leader_.parked, 0);
  ASSERT_TRUE(
      FromGrpcStatus(faults->GetFaults(MakeContext(In(20)).get(), GetFaultsRequest(), &reply))
          .ok());
  ASSERT_EQ(reply.counts_size(), 1);
  EXPECT_EQ(reply.counts(0).rule().kind(), FaultRuleProto::DROP);
  EXPECT_EQ(reply.counts(0).hits(), 1);
  EXPECT_EQ(reply.counts(0).faults(), 1);
  ASSERT_TRUE(FaultInjector::Global().SetRules(0, {}).ok());
}

TEST_F(DaemonTest, DrainRunsTheHookAndEndsParkedCalls) {
  Daemon::Options options = Options();
  BulkServer bulk(1);
  bulk.RegisterMethod("/t.T/Silent", [] { return std::make_unique<Silent>(); });
  options.bulk = &bulk;
  Mutex mu;
  bool proceed = false, drained = false;
  options.drain = [&] {
    MutexLock lock(&mu);
    EXPECT_TRUE(mu.AwaitWithTimeout(absl::Condition(&proceed), absl::Seconds(20)));
    drained = true;
    return absl::OkStatus();
  };
  Start(std::move(options));
  auto stream =
      BulkStream::Open(MakeChannel(daemon_->address(), ChannelUse::kBulk), "/t.T/Silent", In(60));
  std::thread parked([this] {
    GetHistoryReply reply;
    auto leader = Leader::NewStub(channel_);
    EXPECT_EQ(
        leader->GetHistory(MakeContext(In(60)).get(), GetHistoryRequest(), &reply).error_code(),
        grpc::StatusCode::UNAVAILABLE);
  });
  EXPECT_TRUE(Eventually([this] { return leader_.parked == 1; }));

  DrainReply reply;
  EXPECT_TRUE(control_->Drain(MakeContext(In(20)).get(), DrainRequest(), &reply).ok());
  // While the hook is at work everything is still served, but nothing claims to be ready.
  EXPECT_TRUE(Eventually([this] { return GetStatus()->state() == "draining"; }));
  EXPECT_EQ(Get("/readyz")->status, 503);
  EXPECT_TRUE(Eventually([this] { return Health() == 2; }));
  const absl::Time start = absl::Now();
  {
    MutexLock lock(&mu);
    EXPECT_FALSE(drained);
    proceed = true;
  }
  EXPECT_TRUE(Join().ok()) << result_;
  EXPECT_TRUE(drained);
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
  parked.join();
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(Get("/healthz"));
  stream.reset();
  daemon_.reset();
}

TEST_F(DaemonTest, DrainErrorIsTheResult) {
  Daemon::Options options = Options();
  options.drain = [] { return absl::ResourceExhaustedError("no space left"); };
  Start(std::move(options));
  daemon_->RequestDrain("test");
  daemon_->RequestDrain("again");
  EXPECT_EQ(Join(), absl::ResourceExhaustedError("no space left"));
}

TEST_F(DaemonTest, HangingDrainGivesDeadlineExceeded) {
  absl::SetFlag(&FLAGS_drain_timeout_s, 0.1);
  Daemon::Options options = Options();
  Mutex mu;
  bool release = false;
  options.drain = [&] {
    MutexLock lock(&mu);
    mu.AwaitWithTimeout(absl::Condition(&release), absl::Seconds(60));
    return absl::OkStatus();
  };
  Start(std::move(options));
  daemon_->RequestDrain("test");
  EXPECT_EQ(Join().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(absl::StrContains(result_.message(), "--drain_timeout_s")) << result_;
  {
    MutexLock lock(&mu);
    release = true;
  }
  daemon_.reset();
}

TEST_F(DaemonTest, StopEndsRunWithItsStatus) {
  Start(Options());
  daemon_->Stop(absl::DataLossError("shard 2 is gone"));
  daemon_->Stop(absl::OkStatus());
  EXPECT_EQ(Join(), absl::DataLossError("shard 2 is gone"));
}

TEST_F(DaemonTest, SigtermDrains) {
  Daemon::Options options = Options();
  std::atomic<bool> drained{false};
  options.drain = [&] {
    drained = true;
    return absl::OkStatus();
  };
  Start(std::move(options));
  ASSERT_EQ(kill(getpid(), SIGTERM), 0);
  EXPECT_TRUE(Join().ok()) << result_;
  EXPECT_TRUE(drained);
}

TEST_F(DaemonTest, SigtermDrainsWhicheverThreadGetsIt) {
  Start(Options());
  std::thread([] { pthread_kill(pthread_self(), SIGTERM); }).join();
  EXPECT_TRUE(Join().ok()) << result_;
}

TEST_F(DaemonTest, ReadyFileNamesTheAddresses) {
  const std::string path = JoinPath(testing::TempDir(), "ready.json");
  absl::SetFlag(&FLAGS_ready_file, path);
  Start(Options());
  EXPECT_TRUE(Eventually([&] { return FileSystem::Real()->Exists(path); }));
  const auto ready = nlohmann::json::parse(ReadFile(path, 10000).value());
  EXPECT_EQ(ready["kind"], "parameter_server");
  EXPECT_EQ(ready["group"], "north");
  EXPECT_EQ(ready["index"], 3);
  EXPECT_EQ(ready["address"], daemon_->address());
  EXPECT_EQ(ready["http_address"], daemon_->http_address());
  EXPECT_EQ(ready["pid"], getpid());
}

TEST_F(DaemonTest, UnwritableReadyFileIsAnError) {
  absl::SetFlag(&FLAGS_ready_file, JoinPath(testing::TempDir(), "no/such/dir/ready.json"));
  Start(Options());
  EXPECT_TRUE(absl::StrContains(Join().message(), "no/such/dir")) << result_;
}

TEST_F(DaemonTest, PortsInUseAreNamed) {
  Start(Options());
  Daemon::Options options = Options();
  options.address = daemon_->address();
  absl::Status status = Daemon::Start(options).status();
  EXPECT_TRUE(absl::StrContains(status.message(), daemon_->address())) << status;
  options.address = "";
  options.http_address = daemon_->http_address();
  status = Daemon::Start(options).status();
  EXPECT_TRUE(absl::StrContains(status.message(), daemon_->http_address())) << status;
}

TEST_F(DaemonTest, AddressesOfJobAndFlags) {
  using internal::ChooseAddress;
  EXPECT_EQ(*ChooseAddress("", -1), "127.0.0.1:0");
  EXPECT_EQ(*ChooseAddress("localhost:7001", -1), "localhost:7001");
  EXPECT_EQ(*ChooseAddress("localhost:7001", 7002), "localhost:7002");
  EXPECT_EQ(*ChooseAddress("localhost:7001", 0), "localhost:0");
  absl::SetFlag(&FLAGS_host, "::1");
  EXPECT_EQ(*ChooseAddress("localhost:7001", -1), "[::1]:7001");
  EXPECT_EQ(ChooseAddress("localhost", -1).status().code(), absl::StatusCode::kInvalidArgument);
  absl::SetFlag(&FLAGS_host, "0.0.0.0");
  const absl::Status status = Daemon::Start(Options()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_TRUE(absl::StrContains(status.message(), "--insecure_listen")) << status;
  absl::SetFlag(&FLAGS_insecure_listen, true);
  EXPECT_TRUE(Daemon::Start(Options()).ok());
}

using DaemonDeathTest = DaemonTest;

TEST_F(DaemonDeathTest, SecondSignalExitsAtOnce) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        Daemon::Options options = Options();
        std::atomic<bool> draining{false};
        options.drain = [&] {
          draining = true;
          absl::SleepFor(absl::Hours(1));
          return absl::OkStatus();
        };
        Start(std::move(options));
        kill(getpid(), SIGINT);
        Eventually([&] { return draining.load(); });
        kill(getpid(), SIGTERM);
        run_.join();
      },
      testing::ExitedWithCode(1), "second signal");
}

TEST_F(DaemonDeathTest, WatchdogEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        internal::Watchdog watchdog("the test", absl::Milliseconds(10));
        absl::SleepFor(absl::Hours(1));
      },
      testing::ExitedWithCode(1), "the test does not end");
  internal::Watchdog in_time("the test", absl::Hours(1));
}

TEST(ExitCodeTest, ZeroOnlyForOk) {
  EXPECT_EQ(ExitCode("worker", absl::OkStatus()), 0);
  testing::internal::CaptureStderr();
  EXPECT_EQ(ExitCode("worker", absl::NotFoundError("no job.textproto")), 1);
  EXPECT_TRUE(
      absl::StrContains(testing::internal::GetCapturedStderr(), "worker: no job.textproto\n"));
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  codistill::InitDaemon(argc, argv, "Test of the daemon library.");
  return RUN_ALL_TESTS();
}
