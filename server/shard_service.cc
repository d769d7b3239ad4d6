#include "server/shard_service.h"

#include "common/rpc/unary_call.h"
#include "server/group_check.h"

namespace codistill {

template <typename Request, typename Reply>
grpc::ServerUnaryReactor* ShardService::Run(void (ModelShard::*method)(Request,
                                                                       ModelShard::Done<Reply>),
                                            grpc::CallbackServerContext* context,
                                            const Request* request, Reply* reply) {
  // Copied before the call may end by cancellation.
  Request copy = *request;
  auto call = UnaryCall<Request, Reply>::Start(context, request, reply, &registry_);
  grpc::ServerUnaryReactor* const reactor = call->reactor();
  if (const absl::Status status = CheckGroup(copy.group(), group_); !status.ok()) {
    call->Finish(status);
    return reactor;
  }
  (shard_->*method)(std::move(copy), [call](absl::StatusOr<Reply> answer) {
    if (answer.ok()) {
      call->FinishWith(*std::move(answer));
    } else {
      call->Finish(answer.status());
    }
  });
  return reactor;
}

grpc::ServerUnaryReactor* ShardService::Probe(grpc::CallbackServerContext* context,
                                              const ProbeRequest* request, ProbeReply* reply) {
  const absl::Status status = CheckGroup(request->group(), group_);
  if (status.ok()) *reply = shard_->Probe();
  return AnswerUnary(context, status);
}

grpc::ServerUnaryReactor* ShardService::Restore(grpc::CallbackServerContext* context,
                                                const RestoreRequest* request,
                                                RestoreReply* reply) {
  return Run(&ModelShard::Restore, context, request, reply);
}

grpc::ServerUnaryReactor* ShardService::Prepare(grpc::CallbackServerContext* context,
                                                const PrepareRequest* request,
                                                PrepareReply* reply) {
  return Run(&ModelShard::Prepare, context, request, reply);
}

grpc::ServerUnaryReactor* ShardService::Commit(grpc::CallbackServerContext* context,
                                               const CommitRequest* request, CommitReply* reply) {
  return Run(&ModelShard::Commit, context, request, reply);
}

grpc::ServerUnaryReactor* ShardService::WriteCheckpoint(grpc::CallbackServerContext* context,
                                                        const WriteCheckpointRequest* request,
                                                        WriteCheckpointReply* reply) {
  return Run(&ModelShard::WriteCheckpoint, context, request, reply);
}

}  // namespace codistill
