#ifndef CODISTILL_SERVER_PENDING_CALLS_H_
#define CODISTILL_SERVER_PENDING_CALLS_H_

#include <functional>
#include <memory>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "grpcpp/client_context.h"

namespace codistill {

// Unary client calls under way, each with a deadline, whose answers come to callbacks on gRPC's
// threads. Destruction cancels what is left and waits for its callbacks, so that they may refer to
// what outlives this object. Thread-safe.
class PendingCalls {
 public:
  PendingCalls() = default;
  ~PendingCalls() { CancelAll(); }
  PendingCalls(const PendingCalls&) = delete;
  PendingCalls& operator=(const PendingCalls&) = delete;

  // `start(context, request, reply, on_done)` is a stub's async() method. `done` is called once, at
  // once with UNAVAILABLE after CancelAll.
  template <typename Request, typename Reply, typename Start>
  void Call(const Request& request, absl::Duration timeout, Start start,
            std::function<void(absl::StatusOr<Reply>)> done) {
    struct State {
      std::unique_ptr<grpc::ClientContext> context;
      Request request;
      Reply reply;
      std::function<void(absl::StatusOr<Reply>)> done;
    };
    auto state = std::make_shared<State>();
    state->context = MakeContext(absl::Now() + timeout);
    state->request = request;
    state->done = std::move(done);
    {
      MutexLock lock(&mu_);
      if (!cancelled_) {
        contexts_.insert(state->context.get());
      } else {
        state->context.reset();
      }
    }
    if (state->context == nullptr) {
      state->done(absl::UnavailableError("the connection is being closed"));
      return;
    }
    start(state->context.get(), &state->request, &state->reply, [this, state](grpc::Status status) {
      if (status.ok()) {
        state->done(std::move(state->reply));
      } else {
        state->done(FromGrpcStatus(status));
      }
      MutexLock lock(&mu_);
      contexts_.erase(state->context.get());
    });
  }

  void CancelAll() {
    MutexLock lock(&mu_);
    cancelled_ = true;
    for (grpc::ClientContext* context : contexts_) context->TryCancel();
    mu_.Await(absl::Condition(this, &PendingCalls::Empty));
  }

 private:
  bool Empty() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return contexts_.empty(); }

  Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::set<grpc::ClientContext*> contexts_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_PENDING_CALLS_H_
