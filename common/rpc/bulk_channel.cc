#include "common/rpc/bulk_channel.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "common/rpc/bulk_call.h"
#include "common/rpc/channel.h"
#include "common/rpc/fault_stream.h"
#include "common/rpc/frame.h"
#include "common/rpc/shm_message.h"
#include "glog/logging.h"
#include "proto/local_transport.pb.h"

namespace codistill {
namespace {

// How long the question for shared memory, and the way to it, may take. A server of this host
// answers in a millisecond; of another, the stream that follows waits for no longer than this.
constexpr absl::Duration kAskFor = absl::Seconds(1);
// When a server that has none, or is on another host, is asked again: it may have been restarted.
constexpr absl::Duration kAskAgain = absl::Seconds(60);
// The same for one that did not answer.
constexpr absl::Duration kRetry = absl::Seconds(1);
constexpr size_t kMaxIdle = 2;  // of one method

std::atomic<bool>& Allowed() {
  static std::atomic<bool> allowed{true};
  return allowed;
}

}  // namespace

void AllowSharedMemory(bool allow) { Allowed().store(allow); }
bool SharedMemoryAllowed() { return Allowed().load(); }

// One call on a link. The link goes back to its channel after a call that ended in order; otherwise
// it is cut, which is how the server learns that the call is over.
class BulkChannel::ShmStream final : public BulkStream {
 public:
  ShmStream(std::shared_ptr<BulkChannel> channel, std::shared_ptr<ShmLink> link,
            const std::string& method, absl::Time deadline, uint64_t call)
      : channel_(std::move(channel)),
        link_(std::move(link)),
        method_(method),
        deadline_(deadline),
        call_(call),
        writer_(link_.get()),
        reader_(link_, kMaxFrameBytes) {
    LocalCallStart start;
    start.set_method(method);
    // A year is for ever, and no arithmetic on it overflows.
    start.set_timeout_us(absl::ToInt64Microseconds(
        std::clamp(deadline - absl::Now(), absl::ZeroDuration(), absl::Hours(24 * 365))));
    writer_.Start(ShmLink::Kind::kCallStart, start.SerializeAsString());
    PumpOut(/*until_ended=*/false);
  }

  ~ShmStream() override {
    if (!finished_) link_->Shutdown();
  }

  bool Write(grpc::ByteBuffer message) override {
    if (writes_done_ || end_.has_value()) return false;
    writer_.Start(message);
    if (PumpOut(/*until_ended=*/true)) return true;
    writes_done_ = true;
    return false;
  }

  void WritesDone() override {
    if (writes_done_ || end_.has_value()) return;
    writes_done_ = true;
    if (link_->ended() == call_) return;  // nobody wants to know
    writer_.Start(ShmLink::Kind::kHalfClose, "");
    PumpOut(/*until_ended=*/true);
  }

  bool Read(grpc::ByteBuffer* message) override {
    message->Clear();
    while (!end_.has_value()) {
      if (cancelled_.load() || absl::Now() >= deadline_) {
        Fail(absl::DeadlineExceededError("the deadline has passed"));
        break;
      }
      ShmLink::Frame frame;
      if (!link_->Take(&frame)) {
        Wait([this] { return link_->HasFrame(); }, /*frames_may_be_left=*/true);
        continue;
      }
      switch (frame.kind) {
        case ShmLink::Kind::kMessage:
        case ShmLink::Kind::kMessageEnd:
          switch (reader_.Add(frame)) {
            case ShmMessageReader::Result::kMore:
              break;
            case ShmMessageReader::Result::kComplete:
              *message = reader_.Message();
              return true;
            case ShmMessageReader::Result::kTooLong:
              Fail(absl::ResourceExhaustedError(absl::StrCat(
                  "message of more than ", kMaxFrameBytes, " bytes, which is the most accepted")));
              break;
          }
          break;
        case ShmLink::Kind::kCallEnd: {
          LocalCallEnd end;
          const bool parsed = end.ParseFromString(
              std::string(reinterpret_cast<const char*>(frame.data), frame.bytes));
          link_->Release(frame.slot);
          if (!parsed) {
            Fail(absl::UnavailableError("the end of a call makes no sense"));
          } else {
            end_ = absl::Status(static_cast<absl::StatusCode>(end.code()), end.message());
            in_order_ = true;
          }
          break;
        }
        default:
          link_->Release(frame.slot);
          Fail(absl::UnavailableError("a frame that a server does not send"));
      }
    }
    return false;
  }

  absl::Status Finish() override {
    if (finished_) return status_;
    WritesDone();
    grpc::ByteBuffer dropped;
    while (Read(&dropped)) {
    }
    finished_ = true;
    reader_.Clear();
    MutexLock lock(&mu_);
    status_ = cancelled_.load() ? absl::CancelledError("cancelled") : *end_;
    // What an unfinished message of ours left in the slots is dropped by the server.
    if (in_order_ && !cancelled_.load()) {
      returned_ = true;
      channel_->Return(method_, link_, call_);
    } else {
      link_->Shutdown();
    }
    return status_;
  }

  void Cancel() override {
    MutexLock lock(&mu_);
    if (returned_) return;  // the link is somebody else's
    cancelled_.store(true);
    link_->Shutdown();
  }

 private:
  // False: the call has ended, with its end still to be read, or failed.
  bool PumpOut(bool until_ended) {
    while (!end_.has_value()) {
      if (until_ended && link_->ended() == call_) return false;
      if (cancelled_.load() || absl::Now() >= deadline_) {
        Fail(absl::DeadlineExceededError("the deadline has passed"));
        break;
      }
      if (writer_.Pump()) return true;
      Wait([this] { return link_->HasFreeSlot() || link_->ended() == call_; },
           /*frames_may_be_left=*/true);
    }
    return false;
  }

  void Wait(absl::FunctionRef<bool()> ready, bool frames_may_be_left) {
    switch (link_->Wait(deadline_, ready)) {
      case ShmLink::Wake::kReady:
        return;
      case ShmLink::Wake::kDeadline:
        return Fail(absl::DeadlineExceededError("the deadline has passed"));
      case ShmLink::Wake::kHangUp: {
        // The server may have ended the call just before.
        if (frames_may_be_left && !cancelled_.load() && link_->HasFrame()) return;
        const absl::Status error = link_->error();
        return Fail(!error.ok() ? error
                    : absl::Now() >= deadline_
                        ? absl::DeadlineExceededError("the deadline has passed")
                        : absl::UnavailableError(absl::StrCat("process ", link_->peer_pid(),
                                                              " ended the connection")));
      }
    }
  }

  void Fail(absl::Status status) {
    end_ = std::move(status);
    link_->Shutdown();
  }

  const std::shared_ptr<BulkChannel> channel_;
  const std::shared_ptr<ShmLink> link_;
  const std::string method_;
  const absl::Time deadline_;
  const uint64_t call_;  // number on its link, from 1
  ShmMessageWriter writer_;
  ShmMessageReader reader_;
  bool writes_done_ = false;
  bool finished_ = false;
  bool in_order_ = false;            // the end came from the server
  std::optional<absl::Status> end_;  // of the call
  absl::Status status_;
  std::atomic<bool> cancelled_{false};
  Mutex mu_;
  bool returned_ ABSL_GUARDED_BY(mu_) = false;
};

std::shared_ptr<BulkChannel> BulkChannel::Create(const std::string& address,
                                                 const Options& options) {
  return std::shared_ptr<BulkChannel>(new BulkChannel(address, options));
}

BulkChannel::BulkChannel(const std::string& address, const Options& options)
    : address_(address),
      shared_memory_(options.shared_memory && SharedMemoryAllowed()),
      channel_(MakeChannel(address, ChannelUse::kBulk)) {}

BulkChannel::Counts BulkChannel::counts() const {
  MutexLock lock(&mu_);
  return counts_;
}

std::unique_ptr<BulkStream> BulkChannel::Open(const std::string& full_method, absl::Time deadline) {
  auto idle = std::make_shared<Idle>();
  if (shared_memory_) *idle = GetLink(full_method, deadline);
  {
    MutexLock lock(&mu_);
    ++(idle->link != nullptr ? counts_.shared_memory : counts_.grpc);
  }
  if (idle->link == nullptr) return BulkStream::Open(channel_, full_method, deadline);
  return OpenWithFaults(
      full_method,
      [self = shared_from_this(), idle, full_method, deadline]() -> std::unique_ptr<BulkStream> {
        Idle taken = std::exchange(*idle, Idle());
        if (taken.link == nullptr) taken = self->GetLink(full_method, deadline);  // a duplicate's
        if (taken.link == nullptr) return BulkStream::Open(self->channel_, full_method, deadline);
        return std::make_unique<ShmStream>(self, std::move(taken.link), full_method, deadline,
                                           taken.calls + 1);
      });
}

BulkChannel::Idle BulkChannel::GetLink(const std::string& method, absl::Time deadline) {
  {
    std::vector<Idle> dead;
    MutexLock lock(&mu_);
    std::vector<Idle>& idle = idle_[method];
    while (!idle.empty()) {
      Idle newest = std::move(idle.back());
      idle.pop_back();
      if (newest.link->Alive()) return newest;
      dead.push_back(std::move(newest));
    }
    if (absl::Now() < retry_at_) return {};
  }
  absl::StatusOr<std::shared_ptr<ShmLink>> link = Connect(deadline);
  MutexLock lock(&mu_);
  if (link.ok()) {
    if (!told_) LOG(INFO) << address_ << ": tensors go through shared memory";
    told_ = true;
    return {*std::move(link), 0};
  }
  // The server is away, which the stream will say better.
  const bool away = absl::IsUnavailable(link.status()) || absl::IsDeadlineExceeded(link.status());
  retry_at_ = absl::Now() + (away ? kRetry : kAskAgain);
  if (!away && !told_) {
    LOG(INFO) << address_ << ": tensors go through gRPC: " << link.status().message();
    told_ = true;
  }
  return {};
}

absl::StatusOr<std::shared_ptr<ShmLink>> BulkChannel::Connect(absl::Time deadline) {
  const absl::Time until = std::min(deadline, absl::Now() + kAskFor);
  const auto stream = BulkStream::Open(channel_, kLocalEndpointMethod, until);
  stream->WritesDone();
  grpc::ByteBuffer reply;
  const bool replied = stream->Read(&reply);
  CODISTILL_RETURN_IF_ERROR(stream->Finish());
  LocalEndpoint endpoint;
  DecodedPayload none;
  if (!replied) return absl::FailedPreconditionError("no endpoint of shared memory was named");
  CODISTILL_RETURN_IF_ERROR(DecodedPayload::Decode(&reply, /*payload_field=*/0, &endpoint, &none));
  if (endpoint.boot_id().empty() || endpoint.boot_id() != BootId()) {
    return absl::FailedPreconditionError("the server is on another host");
  }
  absl::StatusOr<std::shared_ptr<ShmLink>> link = ShmLink::Connect(endpoint.socket_name(), until);
  if (!link.ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat("shared memory of this host: ", link.status().message()));
  }
  return link;
}

void BulkChannel::Return(const std::string& method, std::shared_ptr<ShmLink> link, uint64_t calls) {
  MutexLock lock(&mu_);
  std::vector<Idle>& idle = idle_[method];
  if (idle.size() < kMaxIdle) {
    idle.push_back({std::move(link), calls});
  } else {
    link->Shutdown();
  }
}

}  // namespace codistill
