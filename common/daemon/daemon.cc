#include "common/daemon/daemon.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/debugging/failure_signal_handler.h"
#include "absl/debugging/symbolize.h"
#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/flags/usage_config.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/deadlock_detection.h"
#include "common/base/executor.h"
#include "common/base/file.h"
#include "common/base/mutex.h"
#include "common/base/status.h"
#include "common/base/trace.h"
#include "common/daemon/control_service.h"
#include "common/daemon/fault_service.h"
#include "common/daemon/flags.h"
#include "common/daemon/process.h"
#include "common/daemon/version.h"
#include "common/http/status_server.h"
#include "common/rpc/bulk_channel.h"
#include "common/rpc/server.h"
#include "glog/logging.h"
#include "nlohmann/json.hpp"

namespace codistill {
namespace {

// How often the health service asks `ready`.
constexpr absl::Duration kHealthInterval = absl::Milliseconds(200);
// After the drain: for calls to end, before they are cancelled.
constexpr absl::Duration kCallsGrace = absl::Seconds(3);
// For what cannot be broken off: calls that ignore cancellation, a drain hook past its time.
constexpr absl::Duration kShutdownLimit = absl::Seconds(15);

void WriteTrace() {
  const absl::Status status = TraceRecorder::Global().Write();
  LOG_IF(ERROR, !status.ok()) << status;
}

class DaemonImpl : public Daemon {
 public:
  explicit DaemonImpl(Options options) : options_(std::move(options)), started_(absl::Now()) {}

  ~DaemonImpl() override {
    Shutdown();
    if (drain_thread_.joinable()) {
      internal::Watchdog watchdog("the drain", kShutdownLimit);
      drain_thread_.join();
    }
  }

  absl::Status Listen() {
    TraceRecorder::Global().SetProcess(
        options_.group.empty()
            ? options_.kind
            : absl::StrCat(options_.kind, " ", options_.group, ".", options_.index));
    CODISTILL_ASSIGN_OR_RETURN(
        const std::string address,
        internal::ChooseAddress(options_.address, absl::GetFlag(FLAGS_port)));
    CODISTILL_ASSIGN_OR_RETURN(
        const std::string http_address,
        internal::ChooseAddress(options_.http_address, absl::GetFlag(FLAGS_http_port)));
    CODISTILL_ASSIGN_OR_RETURN(control_, internal::ControlService::Create(ControlHooks()));

    // The status port first, so that pages are there when the first call is.
    StatusServer::Options http;
    http.address = http_address;
    http.insecure_listen = absl::GetFlag(FLAGS_insecure_listen);
    http.status = [this] { return StatusNow(); };
    http.ready = [this] { return Ready(); };
    http.metrics = [this] {
      return options_.metrics == nullptr ? std::string() : options_.metrics->Text();
    };
    CODISTILL_ASSIGN_OR_RETURN(http_, StatusServer::Start(std::move(http)));

    RpcServer::Options rpc;
    rpc.address = address;
    rpc.insecure_listen = absl::GetFlag(FLAGS_insecure_listen);
    rpc.services = options_.services;
    rpc.services.push_back(control_.get());
    rpc.services.push_back(&faults_);
    rpc.bulk = options_.bulk;
    rpc.registries = options_.registries;
    rpc.registries.push_back(control_->registry());
    rpc.metrics = options_.metrics;
    rpc.max_message_bytes = options_.max_message_bytes;
    CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<RpcServer> server, RpcServer::Start(std::move(rpc)));
    {
      MutexLock lock(&mu_);
      address_ = server->address();
      http_address_ = http_->address();
    }
    rpc_ = std::move(server);
    rpc_->SetServing(Ready());

    PeriodicTask::Options health;
    health.name = "health";
    health.interval = kHealthInterval;
    health_ = std::make_unique<PeriodicTask>(health, [this] { rpc_->SetServing(Ready()); });
    signals_ = std::make_unique<internal::SignalThread>(
        [this](const std::string& name) { RequestDrain(name); });
    return absl::OkStatus();
  }

  std::string address() const override {
    MutexLock lock(&mu_);
    return address_;
  }
  std::string http_address() const override {
    MutexLock lock(&mu_);
    return http_address_;
  }

  absl::Status Run() override {
    LOG(INFO) << "ready: " << options_.kind << " group=" << options_.group
              << " index=" << options_.index << " grpc=" << address() << " http=" << http_address();
    absl::Status status = WriteReadyFile();
    if (status.ok()) {
      MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &DaemonImpl::DrainRequestedOrStopped));
      status = stop_status_;
    }
    if (status.ok()) status = Drain();
    WriteTrace();  // now, in case that somebody does not wait for the rest
    Shutdown();
    LOG(INFO) << options_.kind << " ended: " << status;
    return status;
  }

  void Stop(absl::Status status) override {
    MutexLock lock(&mu_);
    if (stopped_) return;
    stopped_ = true;
    stop_status_ = std::move(status);
  }

  void RequestDrain(const std::string& reason) override {
    MutexLock lock(&mu_);
    if (drain_requested_) return;
    drain_requested_ = true;
    LOG(INFO) << "draining: " << reason;
  }

 private:
  internal::ControlService::Hooks ControlHooks() {
    internal::ControlService::Hooks hooks;
    hooks.kind = options_.kind;
    hooks.status = [this] { return StatusNow(); };
    hooks.drain = [this](const std::string& reason) {
      RequestDrain(reason.empty() ? "asked by the Drain call"
                                  : absl::StrCat("asked by the Drain call: ", reason));
    };
    hooks.pause = options_.pause;
    hooks.resume = options_.resume;
    hooks.checkpoint = options_.checkpoint;
    hooks.set = options_.set;
    return hooks;
  }

  DaemonStatus StatusNow() const {
    DaemonStatus status;
    status.set_state("serving");
    if (options_.fill_status) options_.fill_status(&status);
    status.set_kind(options_.kind);
    status.set_job(options_.job);
    status.set_run_id(options_.run_id);
    status.set_group(options_.group);
    status.set_index(options_.index);
    status.set_pid(getpid());
    status.set_uptime_seconds(absl::ToDoubleSeconds(absl::Now() - started_));
    status.set_version(kVersion);
    MutexLock lock(&mu_);
    status.set_address(address_);
    status.set_http_address(http_address_);
    if (drain_requested_ && status.state() != "finished" && status.state() != "failed") {
      status.set_state("draining");
    }
    return status;
  }

  bool Ready() const {
    {
      MutexLock lock(&mu_);
      if (drain_requested_ || stopped_) return false;
    }
    return !options_.ready || options_.ready();
  }

  absl::Status WriteReadyFile() const {
    const std::string path = absl::GetFlag(FLAGS_ready_file);
    if (path.empty()) return absl::OkStatus();
    const nlohmann::ordered_json json = {
        {"kind", options_.kind},          {"group", options_.group},
        {"index", options_.index},        {"address", address()},
        {"http_address", http_address()}, {"pid", static_cast<int64_t>(getpid())}};
    return Annotate(WriteFileAtomically(path, json.dump() + "\n"), "--ready_file");
  }

  bool DrainRequestedOrStopped() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return drain_requested_ || stopped_;
  }
  bool DrainEndedOrFailed() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return drain_ended_ || (stopped_ && !stop_status_.ok());
  }

  // Runs the drain hook, unless the daemon was stopped, and waits for it within bounds.
  absl::Status Drain() {
    {
      MutexLock lock(&mu_);
      if (stopped_) return stop_status_;
    }
    health_->Stop();
    rpc_->SetServing(false);
    if (!options_.drain) return absl::OkStatus();
    drain_thread_ = std::thread([this] {
      SetThreadName("drain");
      const absl::Status status = options_.drain();
      MutexLock lock(&mu_);
      drain_ended_ = true;
      drain_status_ = status;
    });
    const absl::Duration timeout = absl::Seconds(absl::GetFlag(FLAGS_drain_timeout_s));
    MutexLock lock(&mu_);
    const bool ended =
        mu_.AwaitWithTimeout(absl::Condition(this, &DaemonImpl::DrainEndedOrFailed), timeout);
    if (stopped_ && !stop_status_.ok()) return stop_status_;
    if (!ended) {
      return absl::DeadlineExceededError(absl::StrCat(
          "draining did not end within ", absl::FormatDuration(timeout), " (--drain_timeout_s)"));
    }
    return drain_status_;
  }

  void Shutdown() {
    internal::Watchdog watchdog("shutting down", kShutdownLimit);
    {
      MutexLock lock(&mu_);
      stopped_ = true;  // not ready any more
    }
    if (health_ != nullptr) health_->Stop();
    if (rpc_ != nullptr) rpc_->Shutdown(absl::Now() + kCallsGrace);
    if (http_ != nullptr) http_->Stop();
  }

  const Options options_;
  const absl::Time started_;

  mutable Mutex mu_;
  std::string address_ ABSL_GUARDED_BY(mu_);
  std::string http_address_ ABSL_GUARDED_BY(mu_);
  bool drain_requested_ ABSL_GUARDED_BY(mu_) = false;
  bool drain_ended_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status drain_status_ ABSL_GUARDED_BY(mu_);
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status stop_status_ ABSL_GUARDED_BY(mu_);

  // Destroyed from the last to the first: what calls before what is called.
  internal::FaultService faults_;
  std::unique_ptr<internal::ControlService> control_;
  std::unique_ptr<StatusServer> http_;
  std::unique_ptr<RpcServer> rpc_;
  std::unique_ptr<PeriodicTask> health_;
  std::unique_ptr<internal::SignalThread> signals_;
  std::thread drain_thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Daemon>> Daemon::Start(Options options) {
  auto daemon = std::make_unique<DaemonImpl>(std::move(options));
  CODISTILL_RETURN_IF_ERROR(daemon->Listen());
  return daemon;
}

std::vector<std::string> InitDaemon(int argc, char** argv, const std::string& usage) {
  DisableDeadlockDetection();
  absl::InitializeSymbolizer(argv[0]);
  absl::InstallFailureSignalHandler({});
  internal::CatchDrainSignals();
  absl::FlagsUsageConfig config;
  config.contains_help_flags = [](absl::string_view file) {
    return !absl::StrContains(file, "absl/");
  };
  config.version_string = [] { return absl::StrCat("codistill ", kVersion, "\n"); };
  absl::SetFlagsUsageConfig(config);
  absl::SetProgramUsageMessage(usage);
  const std::vector<char*> arguments = absl::ParseCommandLine(argc, argv);

  const internal::LoggingFlags logging = internal::GetLoggingFlags();
  FLAGS_v = logging.v;
  FLAGS_logtostderr = logging.logtostderr;
  if (!logging.log_dir.empty()) FLAGS_log_dir = logging.log_dir;
  if (!google::IsGoogleLoggingInitialized()) google::InitGoogleLogging(argv[0]);

  if (!absl::GetFlag(FLAGS_trace).empty()) {
    TraceRecorder::Global().Start(BaseName(argv[0]), absl::GetFlag(FLAGS_trace));
  }
  AllowSharedMemory(absl::GetFlag(FLAGS_shared_memory));
  if (absl::GetFlag(FLAGS_allow_fault_injection)) {
    // Before the first channel is made: those made earlier would know no faults.
    const absl::Status faults = internal::EnableFaults(absl::GetFlag(FLAGS_fault_plan));
    if (!faults.ok()) std::exit(ExitCode("--fault_plan", faults));
  } else if (!absl::GetFlag(FLAGS_fault_plan).empty()) {
    std::exit(ExitCode("--fault_plan",
                       absl::InvalidArgumentError("--fault_plan needs --allow_fault_injection")));
  }
  return std::vector<std::string>(arguments.begin() + 1, arguments.end());
}

int ExitCode(const std::string& kind, const absl::Status& status) {
  WriteTrace();
  if (status.ok()) return 0;
  LOG(ERROR) << kind << ": " << status;
  google::FlushLogFiles(google::INFO);
  std::fprintf(stderr, "%s: %s\n", kind.c_str(), std::string(status.message()).c_str());
  return 1;
}

}  // namespace codistill
