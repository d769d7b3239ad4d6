#include <algorithm>
#include <thread>
#include <utility>

#include "absl/random/random.h"
#include "absl/time/clock.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/client/leader_client.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "glog/logging.h"
#include "grpcpp/client_context.h"
#include "proto/parameter_server.grpc.pb.h"

namespace codistill {
namespace {

constexpr absl::Duration kMaxSilence = absl::Seconds(5);
// A stream has a deadline like any other call; a new one takes its place.
constexpr absl::Duration kMaxStream = absl::Hours(1);
constexpr absl::Duration kFirstBackoff = absl::Milliseconds(50);
constexpr absl::Duration kMaxBackoff = absl::Seconds(1);

// One Watch stream. Its owner reads message by message, waiting for each with a limit.
class WatchCall final : public grpc::ClientReadReactor<GroupState> {
 public:
  WatchCall(Leader::Stub* stub, const WatchRequest& request)
      : request_(request), context_(MakeContext(absl::Now() + kMaxStream)) {
    stub->async()->Watch(context_.get(), &request_, this);
    // Reads are started by the owner's thread: without a hold, gRPC could be done with the call by
    // the time it starts the next.
    AddHold();
    StartCall();
  }
  ~WatchCall() override { End().IgnoreError(); }

  // False: the stream has ended, was silent until `deadline`, or Stop was called. Then comes End.
  bool Next(absl::Time deadline, GroupState* state) {
    {
      MutexLock lock(&mu_);
      answered_ = false;
    }
    StartRead(&incoming_);
    MutexLock lock(&mu_);
    mu_.AwaitWithDeadline(absl::Condition(this, &WatchCall::AnsweredOrStopped), deadline);
    if (stopped_ || !answered_ || !read_ok_) return false;
    *state = std::move(incoming_);
    return true;
  }

  // From any thread: ends a Next.
  void Stop() {
    MutexLock lock(&mu_);
    stopped_ = true;
  }

  // Cancels what has not ended, and waits until gRPC has let go of this object. Tells why the
  // stream ended.
  absl::Status End() {
    bool cancel;
    {
      MutexLock lock(&mu_);
      if (done_) return status_;
      cancel = !answered_ || read_ok_;
    }
    if (cancel) context_->TryCancel();
    RemoveHold();
    MutexLock lock(&mu_);
    mu_.Await(absl::Condition(&done_));
    return status_;
  }

  void OnReadDone(bool ok) override {
    MutexLock lock(&mu_);
    answered_ = true;
    read_ok_ = ok;
  }

  void OnDone(const grpc::Status& status) override {
    MutexLock lock(&mu_);
    status_ = FromGrpcStatus(status);
    done_ = true;
  }

 private:
  bool AnsweredOrStopped() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return answered_ || stopped_;
  }

  const WatchRequest request_;
  const std::unique_ptr<grpc::ClientContext> context_;
  GroupState incoming_;  // gRPC's from StartRead to OnReadDone
  mutable Mutex mu_;
  bool answered_ ABSL_GUARDED_BY(mu_) = false;
  bool read_ok_ ABSL_GUARDED_BY(mu_) = false;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  bool done_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

class GroupWatcherImpl final : public GroupWatcher {
 public:
  GroupWatcherImpl(const std::string& leader_address, GroupRef group,
                   std::function<void(const GroupState&)> on_state)
      : address_(leader_address),
        on_state_(std::move(on_state)),
        stub_(Leader::NewStub(MakeChannel(leader_address, ChannelUse::kControl))) {
    *request_.mutable_group() = std::move(group);
    thread_ = std::thread([this] {
      SetThreadName("watch");
      Run();
    });
  }

  ~GroupWatcherImpl() override {
    {
      MutexLock lock(&mu_);
      stopping_ = true;
      if (call_ != nullptr) call_->Stop();
    }
    thread_.join();
  }

  GroupState state() const override {
    MutexLock lock(&mu_);
    return state_;
  }

  absl::Duration silence() const override {
    MutexLock lock(&mu_);
    return last_message_ == absl::InfinitePast() ? absl::InfiniteDuration()
                                                 : absl::Now() - last_message_;
  }

 private:
  void Run() {
    absl::BitGen random;
    absl::Duration backoff = kFirstBackoff;
    bool told = false;  // of a lost leader: once, not every second
    while (true) {
      bool any = false;
      absl::Status why;
      {
        WatchCall call(stub_.get(), request_);
        if (!SetCall(&call)) return;
        GroupState state;
        while (call.Next(absl::Now() + kMaxSilence, &state)) {
          any = true;
          Take(std::move(state));
        }
        if (!SetCall(nullptr)) return;
        why = call.End();
      }
      if (any) {
        backoff = kFirstBackoff;
        told = false;
      }
      if (!told) {
        LOG(WARNING) << "group " << request_.group().group() << ": lost its leader at " << address_
                     << " (" << (absl::IsCancelled(why) ? "no word for 5 s" : why.ToString())
                     << "); trying again";
        told = true;
      }
      MutexLock lock(&mu_);
      mu_.AwaitWithTimeout(absl::Condition(&stopping_), backoff * absl::Uniform(random, 0.8, 1.2));
      if (stopping_) return;
      backoff = std::min(backoff * 2, kMaxBackoff);
    }
  }

  // False: this watcher is being destroyed.
  bool SetCall(WatchCall* call) {
    MutexLock lock(&mu_);
    call_ = call;
    return !stopping_;
  }

  void Take(GroupState state) {
    if (state.has_shard_map()) {
      map_ = state.shard_map();
      map_digest_ = state.shard_map_digest();
    } else if (map_digest_ != 0 && state.shard_map_digest() == map_digest_) {
      *state.mutable_shard_map() = map_;
    }
    {
      MutexLock lock(&mu_);
      state_ = state;
      last_message_ = absl::Now();
    }
    if (on_state_) on_state_(state);
  }

  const std::string address_;
  const std::function<void(const GroupState&)> on_state_;
  const std::unique_ptr<Leader::Stub> stub_;
  WatchRequest request_;
  ShardMap map_;  // newest known; the thread's own
  uint64_t map_digest_ = 0;

  mutable Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  WatchCall* call_ ABSL_GUARDED_BY(mu_) = nullptr;
  GroupState state_ ABSL_GUARDED_BY(mu_);
  absl::Time last_message_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  std::thread thread_;
};

}  // namespace

std::unique_ptr<GroupWatcher> GroupWatcher::Start(const std::string& leader_address, GroupRef group,
                                                  std::function<void(const GroupState&)> on_state) {
  return std::make_unique<GroupWatcherImpl>(leader_address, std::move(group), std::move(on_state));
}

}  // namespace codistill
