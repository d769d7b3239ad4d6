#include "common/daemon/control_service.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/rpc/unary_call.h"
#include "glog/logging.h"

namespace codistill {
namespace internal {
namespace {

// The one setting all daemons have.
absl::StatusOr<std::string> SetLogVerbosity(const std::string& name, const std::string& value) {
  if (name != "v") {
    return absl::NotFoundError(
        absl::StrCat("no setting \"", name, "\"; there is: v (verbosity of the log, 0 to 9)"));
  }
  int level = 0;
  if (!absl::SimpleAtoi(value, &level) || level < 0 || level > 9) {
    return absl::InvalidArgumentError(absl::StrCat("v: \"", value, "\" is no number from 0 to 9"));
  }
  const std::string previous = absl::StrCat(FLAGS_v);
  FLAGS_v = level;
  return previous;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ControlService>> ControlService::Create(Hooks hooks) {
  Executor::Options options;
  options.name = "control";
  // A checkpoint may take minutes; the next command need not wait for it.
  options.threads = 2;
  options.queue_capacity = 8;
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<Executor> executor, Executor::Create(options));
  return std::unique_ptr<ControlService>(new ControlService(std::move(hooks), std::move(executor)));
}

absl::Status ControlService::Unsupported(const char* what) const {
  return absl::FailedPreconditionError(absl::StrCat("this ", hooks_.kind, " cannot ", what));
}

grpc::ServerUnaryReactor* ControlService::GetStatus(grpc::CallbackServerContext* context,
                                                    const GetStatusRequest*, DaemonStatus* reply) {
  *reply = hooks_.status();
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* ControlService::Pause(grpc::CallbackServerContext* context,
                                                const PauseRequest* request, PauseReply* reply) {
  return RunUnary(executor_.get(), &registry_, context, request, reply,
                  [this](const PauseRequest&, PauseReply*, const auto&) {
                    return hooks_.pause ? hooks_.pause() : Unsupported("pause");
                  });
}

grpc::ServerUnaryReactor* ControlService::Resume(grpc::CallbackServerContext* context,
                                                 const ResumeRequest* request, ResumeReply* reply) {
  return RunUnary(executor_.get(), &registry_, context, request, reply,
                  [this](const ResumeRequest&, ResumeReply*, const auto&) {
                    return hooks_.resume ? hooks_.resume() : Unsupported("resume");
                  });
}

grpc::ServerUnaryReactor* ControlService::Drain(grpc::CallbackServerContext* context,
                                                const DrainRequest* request, DrainReply*) {
  hooks_.drain(request->reason());
  return AnswerUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* ControlService::Checkpoint(grpc::CallbackServerContext* context,
                                                     const CheckpointRequest* request,
                                                     CheckpointReply* reply) {
  return RunUnary(executor_.get(), &registry_, context, request, reply,
                  [this](const CheckpointRequest&, CheckpointReply* reply, const auto&) {
                    if (!hooks_.checkpoint) return Unsupported("write checkpoints");
                    absl::StatusOr<CheckpointReply> result = hooks_.checkpoint();
                    if (result.ok()) *reply = *std::move(result);
                    return result.status();
                  });
}

grpc::ServerUnaryReactor* ControlService::Set(grpc::CallbackServerContext* context,
                                              const SetRequest* request, SetReply* reply) {
  return RunUnary(executor_.get(), &registry_, context, request, reply,
                  [this](const SetRequest& request, SetReply* reply, const auto&) {
                    absl::StatusOr<std::string> result =
                        hooks_.set ? hooks_.set(request.name(), request.value())
                                   : SetLogVerbosity(request.name(), request.value());
                    if (result.ok()) reply->set_previous_value(*std::move(result));
                    return result.status();
                  });
}

}  // namespace internal
}  // namespace codistill
