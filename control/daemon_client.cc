#include "control/daemon_client.h"

#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "proto/control.grpc.pb.h"

namespace codistill {
namespace {

// One call of a Control method. `call` is (stub, context) -> grpc::Status.
template <typename Call>
absl::Status CallControl(const std::string& address, absl::Duration timeout, Call call) {
  const auto channel = MakeChannel(address, ChannelUse::kControl);
  const std::unique_ptr<Control::Stub> stub = Control::NewStub(channel);
  const std::unique_ptr<grpc::ClientContext> context = MakeContext(absl::Now() + timeout);
  return Annotate(FromGrpcStatus(call(stub.get(), context.get())), address);
}

}  // namespace

absl::StatusOr<DaemonStatus> GetDaemonStatus(const std::string& address, absl::Duration timeout) {
  DaemonStatus status;
  CODISTILL_RETURN_IF_ERROR(CallControl(address, timeout, [&](auto* stub, auto* context) {
    return stub->GetStatus(context, GetStatusRequest(), &status);
  }));
  return status;
}

absl::Status DrainDaemon(const std::string& address, const std::string& reason,
                         absl::Duration timeout) {
  DrainRequest request;
  request.set_reason(reason);
  DrainReply reply;
  return CallControl(address, timeout, [&](auto* stub, auto* context) {
    return stub->Drain(context, request, &reply);
  });
}

absl::Status PauseDaemon(const std::string& address, absl::Duration timeout) {
  PauseReply reply;
  return CallControl(address, timeout, [&](auto* stub, auto* context) {
    return stub->Pause(context, PauseRequest(), &reply);
  });
}

absl::Status ResumeDaemon(const std::string& address, absl::Duration timeout) {
  ResumeReply reply;
  return CallControl(address, timeout, [&](auto* stub, auto* context) {
    return stub->Resume(context, ResumeRequest(), &reply);
  });
}

absl::StatusOr<CheckpointReply> CheckpointGroup(const std::string& leader_address,
                                                absl::Duration timeout) {
  CheckpointReply reply;
  CODISTILL_RETURN_IF_ERROR(CallControl(leader_address, timeout, [&](auto* stub, auto* context) {
    return stub->Checkpoint(context, CheckpointRequest(), &reply);
  }));
  return reply;
}

absl::StatusOr<std::string> SetOnDaemon(const std::string& address, const std::string& name,
                                        const std::string& value, absl::Duration timeout) {
  SetRequest request;
  request.set_name(name);
  request.set_value(value);
  SetReply reply;
  CODISTILL_RETURN_IF_ERROR(CallControl(address, timeout, [&](auto* stub, auto* context) {
    return stub->Set(context, request, &reply);
  }));
  return reply.previous_value();
}

}  // namespace codistill
