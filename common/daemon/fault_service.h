#ifndef CODISTILL_COMMON_DAEMON_FAULT_SERVICE_H_
#define CODISTILL_COMMON_DAEMON_FAULT_SERVICE_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/fault.h"
#include "proto/fault_injection.grpc.pb.h"

namespace codistill {
namespace internal {

// The FaultInjection service over this process's FaultInjector. Thread-safe.
class FaultService : public FaultInjection::CallbackService {
 public:
  grpc::ServerUnaryReactor* InjectFaults(grpc::CallbackServerContext* context,
                                         const InjectFaultsRequest* request,
                                         InjectFaultsReply* reply) override;
  grpc::ServerUnaryReactor* GetFaults(grpc::CallbackServerContext* context,
                                      const GetFaultsRequest* request,
                                      InjectFaultsReply* reply) override;
};

// INVALID_ARGUMENT names the rule without a kind.
absl::StatusOr<std::vector<FaultRule>> ToFaultRules(const InjectFaultsRequest& request);

// Switches faults on and sets the rules of a --fault_plan file (text format of InjectFaultsRequest;
// empty: none). Errors name the file.
absl::Status EnableFaults(const std::string& plan_file);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_COMMON_DAEMON_FAULT_SERVICE_H_
