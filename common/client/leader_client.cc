#include "common/client/leader_client.h"

#include <utility>

#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "grpcpp/client_context.h"
#include "proto/parameter_server.grpc.pb.h"

namespace codistill {
namespace {

class LeaderClientImpl final : public LeaderClient {
 public:
  LeaderClientImpl(const std::string& address, GroupRef group)
      : group_(std::move(group)),
        stub_(Leader::NewStub(MakeChannel(address, ChannelUse::kControl))) {}

  absl::StatusOr<RegisterReply> Register(RegisterRequest request, absl::Time deadline) override {
    *request.mutable_group() = group_;
    return Call<RegisterReply>(&Leader::Stub::Register, request, deadline);
  }

  absl::StatusOr<GetAssignmentsReply> GetAssignments(GetAssignmentsRequest request,
                                                     absl::Time deadline) override {
    *request.mutable_group() = group_;
    return Call<GetAssignmentsReply>(&Leader::Stub::GetAssignments, request, deadline);
  }

  absl::StatusOr<HeartbeatReply> Heartbeat(HeartbeatRequest request, absl::Time deadline) override {
    *request.mutable_group() = group_;
    return Call<HeartbeatReply>(&Leader::Stub::Heartbeat, request, deadline);
  }

  absl::Status ReportEnd(ReportEndRequest request, absl::Time deadline) override {
    *request.mutable_group() = group_;
    return Call<ReportEndReply>(&Leader::Stub::ReportEnd, request, deadline).status();
  }

  absl::Status ReportEvaluation(EvaluationResult result, absl::Time deadline) override {
    ReportEvaluationRequest request;
    *request.mutable_group() = group_;
    *request.mutable_result() = std::move(result);
    return Call<ReportEvaluationReply>(&Leader::Stub::ReportEvaluation, request, deadline).status();
  }

  absl::StatusOr<GetHistoryReply> GetHistory(absl::Time deadline) override {
    GetHistoryRequest request;
    *request.mutable_group() = group_;
    return Call<GetHistoryReply>(&Leader::Stub::GetHistory, request, deadline);
  }

 private:
  template <typename Reply, typename Request>
  absl::StatusOr<Reply> Call(grpc::Status (Leader::Stub::*method)(grpc::ClientContext*,
                                                                  const Request&, Reply*),
                             const Request& request, absl::Time deadline) {
    const std::unique_ptr<grpc::ClientContext> context = MakeContext(deadline);
    Reply reply;
    const grpc::Status status = (stub_.get()->*method)(context.get(), request, &reply);
    if (!status.ok()) return FromUncancelledCall(status);
    return reply;
  }

  const GroupRef group_;
  const std::unique_ptr<Leader::Stub> stub_;
};

}  // namespace

std::unique_ptr<LeaderClient> LeaderClient::Create(const std::string& address, GroupRef group) {
  return std::make_unique<LeaderClientImpl>(address, std::move(group));
}

}  // namespace codistill
