#ifndef CODISTILL_COMMON_RPC_UNARY_CALL_H_
#define CODISTILL_COMMON_RPC_UNARY_CALL_H_

#include <functional>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/rpc/call_registry.h"
#include "common/rpc/grpc_status.h"
#include "grpcpp/support/server_callback.h"

namespace codistill {

// One unary call of a callback service that may be parked: answered later, by whoever has the
// answer.
//
//   grpc::ServerUnaryReactor* GetAssignments(grpc::CallbackServerContext* context,
//                                            const GetAssignmentsRequest* request,
//                                            GetAssignmentsReply* reply) override {
//     auto call = UnaryCall<GetAssignmentsRequest, GetAssignmentsReply>::Start(context, request,
//     reply,
//                                                                              &registry_);
//     leader_->WhenAssigned(*request, call->deadline(), [call](absl::StatusOr<...> assigned) {
//       assigned.ok() ? call->FinishWith(*std::move(assigned)) : call->Finish(assigned.status());
//     });
//     return call->reactor();
//   }
//
// However it goes, the call finishes exactly once: by Finish, by the client's cancellation or
// deadline (CANCELLED), or by CallRegistry::FinishAll (UNAVAILABLE); what comes later is ignored.
// Holding the pointer longer than the call lives is harmless. Thread-safe. A handler that blocks:
// see RunUnary below.
template <typename Request, typename Reply>
class UnaryCall final : public ParkedCall,
                        public std::enable_shared_from_this<UnaryCall<Request, Reply>> {
 public:
  using Ptr = std::shared_ptr<UnaryCall>;

  // At the beginning of a service's method, with its arguments. `registry` outlives the call.
  static Ptr Start(grpc::CallbackServerContext* context, const Request* request, Reply* reply,
                   CallRegistry* registry) {
    Ptr call(new UnaryCall(context, request, reply, registry));
    call->reactor_ = new Reactor(call);
    const absl::Status open = registry->Add(call);
    if (!open.ok()) call->End(open);
    return call;
  }

  // What the method returns; only for that.
  grpc::ServerUnaryReactor* reactor() const { return reactor_; }

  // gRPC's: gone when the call has finished, which by cancellation may be any time after the method
  // returned. Copy what a parked call needs later.
  const Request& request() const { return *request_; }
  absl::Time deadline() const { return deadline_; }

  // Whether the call has ended without us (the answer would go nowhere).
  bool ended() const {
    MutexLock lock(&mu_);
    return !end_.ok() || finished_;
  }

  // `hook` runs once if the call ends without us, at once if it has: to take a parked call off its
  // list. Called without locks of this class; set it without holding locks that it takes.
  void OnEnd(std::function<void()> hook) {
    {
      MutexLock lock(&mu_);
      if (end_.ok()) {
        if (!finished_) hook_ = std::move(hook);
        return;
      }
    }
    hook();
  }

  void Finish(const absl::Status& status) { FinishOnce(status, nullptr); }
  void FinishWith(Reply reply) { FinishOnce(absl::OkStatus(), &reply); }

  void EndForShutdown(const absl::Status& status) override { End(status); }

  // A handler works on request and reply until EndWork, which finishes the call; cancellation and
  // shutdown only set ended() meanwhile. For RunUnary.
  void BeginWork() {
    MutexLock lock(&mu_);
    working_ = true;
  }
  void EndWork(const absl::Status& status) {
    {
      MutexLock lock(&mu_);
      working_ = false;
    }
    FinishOnce(status, nullptr);
  }
  // Between BeginWork and EndWork. OK, or why the call has ended without us.
  absl::Status end() const {
    MutexLock lock(&mu_);
    return end_;
  }
  Reply* mutable_reply() { return reply_; }

 private:
  class Reactor final : public grpc::ServerUnaryReactor {
   public:
    explicit Reactor(Ptr call) : call_(std::move(call)) {}
    void OnCancel() override {
      call_->End(absl::CancelledError("the client cancelled the call, or its deadline passed"));
    }
    void OnDone() override {
      call_->registry_->Remove(call_.get());
      delete this;
    }

   private:
    const Ptr call_;
  };

  UnaryCall(grpc::CallbackServerContext* context, const Request* request, Reply* reply,
            CallRegistry* registry)
      : registry_(registry),
        request_(request),
        reply_(reply),
        deadline_(absl::FromChrono(context->deadline())) {}

  void FinishOnce(absl::Status status, Reply* reply) {
    std::function<void()> hook;  // destroyed outside the lock
    {
      MutexLock lock(&mu_);
      if (finished_ || working_) return;
      finished_ = true;
      hook.swap(hook_);
      if (reply != nullptr) reply_->Swap(reply);
    }
    // The reactor lives until this call has had its effect.
    reactor_->Finish(ToGrpcStatus(status));
  }

  void End(const absl::Status& status) {
    std::function<void()> hook;
    {
      MutexLock lock(&mu_);
      if (finished_ || !end_.ok()) return;
      end_ = status;
      hook.swap(hook_);
    }
    if (hook) hook();
    FinishOnce(status, nullptr);
  }

  CallRegistry* const registry_;
  const Request* const request_;
  Reply* const reply_;
  const absl::Time deadline_;
  Reactor* reactor_ = nullptr;

  mutable Mutex mu_;
  bool working_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status end_ ABSL_GUARDED_BY(mu_);
  std::function<void()> hook_ ABSL_GUARDED_BY(mu_);
};

// A method whose handler may block: runs `absl::Status handler(const Request&, Reply*,
// const UnaryCall<Request, Reply>&)` on `executor` and finishes the call with what it returns. A
// handler that waits watches call.ended() and call.deadline(). RESOURCE_EXHAUSTED when the
// executor's queue is full; a call that ended while it was queued is not run. Shut the executor
// down before what the handler uses is destroyed, and after the server: calls that it drops would
// never finish.
//
//   return RunUnary(executor_, &registry_, context, request, reply,
//                   [this](const RestoreRequest& request, RestoreReply* reply, const auto& call) {
//                     return store_->Restore(request, call.deadline(), reply);
//                   });
template <typename Request, typename Reply, typename Handler>
grpc::ServerUnaryReactor* RunUnary(Executor* executor, CallRegistry* registry,
                                   grpc::CallbackServerContext* context, const Request* request,
                                   Reply* reply, Handler handler) {
  auto call = UnaryCall<Request, Reply>::Start(context, request, reply, registry);
  grpc::ServerUnaryReactor* const reactor = call->reactor();
  call->BeginWork();
  const absl::Status scheduled = executor->Schedule([call, handler = std::move(handler)]() mutable {
    absl::Status status = call->end();
    if (status.ok()) status = handler(call->request(), call->mutable_reply(), *call);
    call->EndWork(status);
  });
  if (!scheduled.ok()) call->EndWork(scheduled);
  return reactor;
}

// A method that is answered at once, its reply filled in.
inline grpc::ServerUnaryReactor* AnswerUnary(grpc::CallbackServerContext* context,
                                             const absl::Status& status) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_UNARY_CALL_H_
