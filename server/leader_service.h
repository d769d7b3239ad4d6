#ifndef CODISTILL_SERVER_LEADER_SERVICE_H_
#define CODISTILL_SERVER_LEADER_SERVICE_H_

#include "common/rpc/call_registry.h"
#include "proto/parameter_server.grpc.pb.h"
#include "server/leader.h"

namespace codistill {

// Service Leader over gRPC: decodes, calls, encodes. The leader outlives the server.
class LeaderService final : public Leader::CallbackService {
 public:
  LeaderService(GroupLeader* leader, GroupRef group) : leader_(leader), group_(std::move(group)) {}

  CallRegistry* registry() { return &registry_; }

  grpc::ServerUnaryReactor* Register(grpc::CallbackServerContext* context,
                                     const RegisterRequest* request, RegisterReply* reply) override;
  grpc::ServerUnaryReactor* GetAssignments(grpc::CallbackServerContext* context,
                                           const GetAssignmentsRequest* request,
                                           GetAssignmentsReply* reply) override;
  grpc::ServerUnaryReactor* Heartbeat(grpc::CallbackServerContext* context,
                                      const HeartbeatRequest* request,
                                      HeartbeatReply* reply) override;
  grpc::ServerWriteReactor<GroupState>* Watch(grpc::CallbackServerContext* context,
                                              const WatchRequest* request) override;
  grpc::ServerUnaryReactor* ReportEnd(grpc::CallbackServerContext* context,
                                      const ReportEndRequest* request,
                                      ReportEndReply* reply) override;
  grpc::ServerUnaryReactor* ReportEvaluation(grpc::CallbackServerContext* context,
                                             const ReportEvaluationRequest* request,
                                             ReportEvaluationReply* reply) override;
  grpc::ServerUnaryReactor* GetHistory(grpc::CallbackServerContext* context,
                                       const GetHistoryRequest* request,
                                       GetHistoryReply* reply) override;

 private:
  GroupLeader* const leader_;
  const GroupRef group_;
  CallRegistry registry_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_LEADER_SERVICE_H_
