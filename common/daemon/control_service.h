#ifndef CODISTILL_COMMON_DAEMON_CONTROL_SERVICE_H_
#define CODISTILL_COMMON_DAEMON_CONTROL_SERVICE_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/executor.h"
#include "common/rpc/call_registry.h"
#include "proto/control.grpc.pb.h"

namespace codistill {
namespace internal {

// The Control service over a daemon's hooks. GetStatus and Drain are answered at once; the others
// may block and run on an executor of this service. Thread-safe.
class ControlService : public Control::CallbackService {
 public:
  struct Hooks {
    std::string kind;  // for messages
    std::function<DaemonStatus()> status;
    std::function<void(const std::string& reason)> drain;
    // Null: FAILED_PRECONDITION.
    std::function<absl::Status()> pause, resume;
    std::function<absl::StatusOr<CheckpointReply>()> checkpoint;
    std::function<absl::StatusOr<std::string>(const std::string&, const std::string&)> set;
  };

  static absl::StatusOr<std::unique_ptr<ControlService>> Create(Hooks hooks);

  CallRegistry* registry() { return &registry_; }

  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context,
                                      const GetStatusRequest* request,
                                      DaemonStatus* reply) override;
  grpc::ServerUnaryReactor* Pause(grpc::CallbackServerContext* context, const PauseRequest* request,
                                  PauseReply* reply) override;
  grpc::ServerUnaryReactor* Resume(grpc::CallbackServerContext* context,
                                   const ResumeRequest* request, ResumeReply* reply) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context, const DrainRequest* request,
                                  DrainReply* reply) override;
  grpc::ServerUnaryReactor* Checkpoint(grpc::CallbackServerContext* context,
                                       const CheckpointRequest* request,
                                       CheckpointReply* reply) override;
  grpc::ServerUnaryReactor* Set(grpc::CallbackServerContext* context, const SetRequest* request,
                                SetReply* reply) override;

 private:
  ControlService(Hooks hooks, std::unique_ptr<Executor> executor)
      : hooks_(std::move(hooks)), executor_(std::move(executor)) {}
  absl::Status Unsupported(const char* what) const;

  const Hooks hooks_;
  CallRegistry registry_;
  const std::unique_ptr<Executor> executor_;  // last: its tasks use the rest
};

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_COMMON_DAEMON_CONTROL_SERVICE_H_
