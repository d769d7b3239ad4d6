#include "server/leader_service.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/time/clock.h"
#include "common/rpc/server_stream.h"
#include "common/rpc/unary_call.h"
#include "server/group_check.h"

namespace codistill {
namespace {

// An empty answer leaves this long before the caller's deadline, so that it arrives.
constexpr absl::Duration kAnswerMargin = absl::Milliseconds(200);
constexpr absl::Duration kLongestWait = absl::Minutes(1);

// Sends the group's state to one follower at every change.
class Watcher final : public GroupObserver {
 public:
  Watcher(GroupLeader* leader, ServerStream<GroupState>::Ptr stream)
      : leader_(leader), stream_(std::move(stream)) {}

  void SendFirst() { stream_->Send(leader_->State(/*with_map=*/true)); }
  void OnGroupChange() override { stream_->Send(leader_->State(/*with_map=*/false)); }

 private:
  GroupLeader* const leader_;
  const ServerStream<GroupState>::Ptr stream_;
};

}  // namespace

grpc::ServerUnaryReactor* LeaderService::Register(grpc::CallbackServerContext* context,
                                                  const RegisterRequest* request,
                                                  RegisterReply* reply) {
  absl::Status status = CheckGroup(request->group(), group_);
  if (status.ok()) {
    absl::StatusOr<RegisterReply> answer = leader_->Register(*request);
    status = answer.status();
    if (answer.ok()) *reply = *std::move(answer);
  }
  return AnswerUnary(context, status);
}

grpc::ServerUnaryReactor* LeaderService::GetAssignments(grpc::CallbackServerContext* context,
                                                        const GetAssignmentsRequest* request,
                                                        GetAssignmentsReply* reply) {
  auto call = UnaryCall<GetAssignmentsRequest, GetAssignmentsReply>::Start(context, request, reply,
                                                                           &registry_);
  grpc::ServerUnaryReactor* const reactor = call->reactor();
  const GetAssignmentsRequest wanted = *request;
  if (const absl::Status status = CheckGroup(wanted.group(), group_); !status.ok()) {
    call->Finish(status);
    return reactor;
  }
  const absl::Time deadline =
      std::min(call->deadline() - kAnswerMargin, absl::Now() + kLongestWait);
  leader_->GetAssignments(wanted, deadline, [call](absl::StatusOr<GetAssignmentsReply> answer) {
    if (answer.ok()) {
      call->FinishWith(*std::move(answer));
    } else {
      call->Finish(answer.status());
    }
  });
  return reactor;
}

grpc::ServerUnaryReactor* LeaderService::Heartbeat(grpc::CallbackServerContext* context,
                                                   const HeartbeatRequest* request,
                                                   HeartbeatReply* reply) {
  absl::Status status = CheckGroup(request->group(), group_);
  if (status.ok()) {
    absl::StatusOr<HeartbeatReply> answer = leader_->Heartbeat(*request);
    status = answer.status();
    if (answer.ok()) *reply = *std::move(answer);
  }
  return AnswerUnary(context, status);
}

grpc::ServerWriteReactor<GroupState>* LeaderService::Watch(grpc::CallbackServerContext*,
                                                           const WatchRequest* request) {
  auto stream = ServerStream<GroupState>::Start(&registry_, StreamOverflow::kLatestWins);
  grpc::ServerWriteReactor<GroupState>* const reactor = stream->reactor();
  if (const absl::Status status = CheckGroup(request->group(), group_); !status.ok()) {
    stream->Finish(status);
    return reactor;
  }
  auto watcher = std::make_shared<Watcher>(leader_, stream);
  watcher->SendFirst();
  leader_->Observe(watcher);
  // The stream keeps its watcher, and lets go of it at its end.
  stream->OnEnd([watcher] {});
  return reactor;
}

grpc::ServerUnaryReactor* LeaderService::ReportEnd(grpc::CallbackServerContext* context,
                                                   const ReportEndRequest* request,
                                                   ReportEndReply*) {
  absl::Status status = CheckGroup(request->group(), group_);
  if (status.ok()) status = leader_->ReportEnd(*request);
  return AnswerUnary(context, status);
}

grpc::ServerUnaryReactor* LeaderService::ReportEvaluation(grpc::CallbackServerContext* context,
                                                          const ReportEvaluationRequest* request,
                                                          ReportEvaluationReply*) {
  absl::Status status = CheckGroup(request->group(), group_);
  if (status.ok()) status = leader_->ReportEvaluation(*request);
  return AnswerUnary(context, status);
}

grpc::ServerUnaryReactor* LeaderService::GetHistory(grpc::CallbackServerContext* context,
                                                    const GetHistoryRequest* request,
                                                    GetHistoryReply* reply) {
  const absl::Status status = CheckGroup(request->group(), group_);
  if (status.ok()) *reply = leader_->GetHistory();
  return AnswerUnary(context, status);
}

}  // namespace codistill
