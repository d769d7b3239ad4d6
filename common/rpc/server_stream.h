#ifndef CODISTILL_COMMON_RPC_SERVER_STREAM_H_
#define CODISTILL_COMMON_RPC_SERVER_STREAM_H_

#include <algorithm>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "common/base/mutex.h"
#include "common/rpc/call_registry.h"
#include "common/rpc/grpc_status.h"
#include "grpcpp/support/server_callback.h"

namespace codistill {

// What ServerStream::Send does with a message for which there is no room.
enum class StreamOverflow {
  kLatestWins,  // it replaces the newest one that waits: for states, of which only the last counts
  kRefuse,      // Send answers false
};

// A server-streaming call of a callback service: messages go out one at a time, in order, while
// others wait here, a bounded number of them. What happens to a message for which there is no room,
// because the client reads too slowly, is the service's choice.
//
//   grpc::ServerWriteReactor<GroupState>* Watch(grpc::CallbackServerContext*,
//                                               const WatchRequest*) override {
//     auto stream = ServerStream<GroupState>::Start(&registry_, StreamOverflow::kLatestWins);
//     leader_->AddWatcher([stream](const GroupState& state) { return stream->Send(state); });
//     return stream->reactor();
//   }
//
// Finishes exactly once: by Finish, by cancellation, or by CallRegistry::FinishAll (UNAVAILABLE).
// Holding the pointer longer than the call lives is harmless. Thread-safe.
template <typename T>
class ServerStream final : public ParkedCall, public std::enable_shared_from_this<ServerStream<T>> {
 public:
  using Ptr = std::shared_ptr<ServerStream>;

  // `capacity`: how many messages wait besides the one on its way. `registry` outlives the call.
  static Ptr Start(CallRegistry* registry, StreamOverflow overflow, size_t capacity = 1) {
    Ptr stream(new ServerStream(registry, overflow, capacity));
    stream->reactor_ = new Reactor(stream);
    const absl::Status open = registry->Add(stream);
    if (!open.ok()) stream->End(open);
    return stream;
  }

  // What the method returns; only for that.
  grpc::ServerWriteReactor<T>* reactor() const { return reactor_; }

  // False if the stream has ended, or under kRefuse if there is no room; never blocks.
  bool Send(T message) {
    {
      MutexLock lock(&mu_);
      if (finishing_) return false;
      if (waiting_.size() < capacity_) {
        waiting_.push_back(std::move(message));
      } else if (overflow_ == StreamOverflow::kLatestWins) {
        waiting_.back() = std::move(message);
      } else {
        return false;
      }
    }
    Proceed();
    return true;
  }

  // With OK, after what waits was sent; with an error, at once.
  void Finish(const absl::Status& status) {
    std::function<void()> hook;  // destroyed outside the lock
    {
      MutexLock lock(&mu_);
      if (finishing_) return;
      finishing_ = true;
      status_ = status;
      if (!status.ok()) waiting_.clear();
      hook.swap(hook_);
    }
    Proceed();
  }

  // Whether the stream has ended, or is about to.
  bool ended() const {
    MutexLock lock(&mu_);
    return finishing_;
  }

  // `hook` runs once if the stream ends without us (cancelled, broken, shut down), at once if it
  // has. Called without locks of this class; set it without holding locks that it takes.
  void OnEnd(std::function<void()> hook) {
    {
      MutexLock lock(&mu_);
      if (!ended_without_us_) {
        if (!finishing_) hook_ = std::move(hook);
        return;
      }
    }
    hook();
  }

  void EndForShutdown(const absl::Status& status) override { End(status); }

 private:
  class Reactor final : public grpc::ServerWriteReactor<T> {
   public:
    explicit Reactor(Ptr stream) : stream_(std::move(stream)) {}
    void OnWriteDone(bool ok) override { stream_->Written(ok); }
    void OnCancel() override {
      stream_->End(absl::CancelledError("the client cancelled the call, or its deadline passed"));
    }
    void OnDone() override {
      stream_->registry_->Remove(stream_.get());
      delete this;
    }

   private:
    const Ptr stream_;
  };

  ServerStream(CallRegistry* registry, StreamOverflow overflow, size_t capacity)
      : registry_(registry), overflow_(overflow), capacity_(std::max<size_t>(1, capacity)) {}

  void End(const absl::Status& status) {
    std::function<void()> hook;
    {
      MutexLock lock(&mu_);
      waiting_.clear();
      if (!finishing_) {
        finishing_ = true;
        ended_without_us_ = true;
        status_ = status;
        hook.swap(hook_);
      }
    }
    if (hook) hook();
    Proceed();
  }

  void Written(bool ok) {
    {
      MutexLock lock(&mu_);
      writing_ = false;
    }
    if (ok) {
      Proceed();
    } else {
      End(absl::CancelledError("the connection to the client broke"));
    }
  }

  // Starts the next write, or the end, unless a write is in flight. gRPC is called outside the
  // lock; `writing_` and `finished_` see to it that only one thread does. The reactor lives until
  // it was finished.
  void Proceed() {
    bool write = false;
    grpc::Status status;
    {
      MutexLock lock(&mu_);
      if (writing_ || finished_) return;
      if (!waiting_.empty()) {
        write = writing_ = true;
        outgoing_ = std::move(waiting_.front());
        waiting_.pop_front();
      } else if (finishing_) {
        finished_ = true;
        status = ToGrpcStatus(status_);
      } else {
        return;
      }
    }
    if (write) {
      reactor_->StartWrite(&outgoing_);
    } else {
      reactor_->Finish(status);
    }
  }

  CallRegistry* const registry_;
  const StreamOverflow overflow_;
  const size_t capacity_;
  Reactor* reactor_ = nullptr;
  T outgoing_;  // gRPC's while writing_

  mutable Mutex mu_;
  std::deque<T> waiting_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool finishing_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_without_us_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  std::function<void()> hook_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_SERVER_STREAM_H_
