#include "common/rpc/channel.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/mutex.h"
#include "common/base/retry_after.h"
#include "common/base/status.h"
#include "common/rpc/fault_interceptor.h"
#include "grpc/grpc.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/channel_arguments.h"

namespace codistill {
namespace {

constexpr absl::Duration kFirstBackoff = absl::Milliseconds(50);
constexpr absl::Duration kMaxBackoff = absl::Seconds(1);
constexpr double kBackoffGrowth = 1.6;
constexpr absl::Duration kStopCheck = absl::Milliseconds(20);

int MaxMessageBytes(ChannelUse use) {
  switch (use) {
    case ChannelUse::kBulk:
      return kMaxFrameBytes;
    case ChannelUse::kPrediction:
      return kMaxPredictionBytes;
    case ChannelUse::kControl:
      break;
  }
  return kMaxControlBytes;
}

bool IsTransient(const absl::Status& status) {
  return status.code() == absl::StatusCode::kUnavailable ||
         status.code() == absl::StatusCode::kDeadlineExceeded ||
         // Refused for load, by somebody who says when to come again.
         (status.code() == absl::StatusCode::kResourceExhausted && RetryAfter(status).has_value());
}

}  // namespace

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, ChannelUse use) {
  internal::KeepGrpcRunning();
  grpc::ChannelArguments arguments;
  // The guard against a bad length, on both sides.
  arguments.SetMaxReceiveMessageSize(MaxMessageBytes(use));
  arguments.SetMaxSendMessageSize(MaxMessageBytes(use));
  // A daemon that was restarted is found again within about a second.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  // For predictions sooner: a step cannot wait for them.
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, use == ChannelUse::kPrediction ? 500 : 1000);
  // In spite of its name: how long an attempt to connect may take, handshake included. A busy
  // machine needs longer than the first back-off; one that drops packets should not be waited for
  // much longer.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 2000);
  // A peer that vanished without a word is noticed within half a minute. Servers allow a ping every
  // 10 s (common/rpc/server.cc): the two belong together.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // Peers of a job talk directly, whatever proxy the environment names.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // Channels of equal target and arguments share a connection; tensors must not queue up before
  // heartbeats, so they get one of their own.
  if (use != ChannelUse::kControl) arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  auto faults = MakeFaultInterceptors(address);
  if (faults.empty()) {
    return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
  }
  return grpc::experimental::CreateCustomChannelWithInterceptors(
      address, grpc::InsecureChannelCredentials(), arguments, std::move(faults));
}

std::unique_ptr<grpc::ClientContext> MakeContext(absl::Time deadline) {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(absl::ToChronoTime(deadline));
  return context;
}

absl::Status RetryUntil(absl::Time deadline, const std::function<absl::Status()>& attempt,
                        const std::function<bool()>& stop) {
  absl::BitGen random;
  absl::Duration backoff = kFirstBackoff;
  while (true) {
    if (stop && stop()) return absl::CancelledError("stopped before the next attempt");
    const absl::Status status = attempt();
    if (!IsTransient(status)) return status;
    // Jitter keeps the clients of a restarted server from coming back all at once.
    const absl::Duration hint = RetryAfter(status).value_or(absl::ZeroDuration());
    const absl::Time next = absl::Now() + std::max(backoff * absl::Uniform(random, 0.8, 1.2), hint);
    backoff = std::min(backoff * kBackoffGrowth, kMaxBackoff);
    if (next >= deadline) return Annotate(status, "gave up trying again");
    while (absl::Now() < next) {
      if (stop && stop()) return absl::CancelledError("stopped before the next attempt");
      absl::SleepFor(std::min(next - absl::Now(), stop ? kStopCheck : kMaxBackoff));
    }
  }
}

namespace internal {
namespace {

// gRPC up to 1.60 looks at errno some calls after connect(2) (tcp_client_posix.cc), one of which
// may wait for a mutex. The first time that two threads of a process wait for the same one, Abseil
// looks for a file that most kernels do not have, to learn the processor's frequency; if that is
// there and then, a connection in progress is taken for one that failed with ENOENT. So we let two
// threads wait for a mutex before the first connection.
void LearnProcessorFrequency() {
  Mutex mu;
  int waiting = 0;
  bool go = false;
  const auto wait = [&] {
    MutexLock lock(&mu);
    ++waiting;
    mu.Await(absl::Condition(&go));
  };
  std::thread first(wait), second(wait);
  {
    MutexLock lock(&mu);
    const auto both = +[](int* n) { return *n == 2; };
    mu.Await(absl::Condition(both, &waiting));
    go = true;
  }
  first.join();
  second.join();
}

}  // namespace

void KeepGrpcRunning() {
  static const bool once = [] {
    LearnProcessorFrequency();
    grpc_init();
    return true;
  }();
  static_cast<void>(once);
}

}  // namespace internal
}  // namespace codistill
