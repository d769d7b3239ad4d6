#ifndef CODISTILL_COMMON_RPC_GRPC_STATUS_H_
#define CODISTILL_COMMON_RPC_GRPC_STATUS_H_

#include "absl/status/status.h"
#include "grpcpp/support/status.h"

namespace codistill {

// The one converter between absl's and gRPC's codes, which are the same numbers (static_asserted).
grpc::Status ToGrpcStatus(const absl::Status& status);
absl::Status FromGrpcStatus(const grpc::Status& status);

// The same, on the client's side, for a call that nobody there has cancelled: CANCELLED then means
// that the server went down before it looked at the call, or while it was at it, which is
// UNAVAILABLE.
absl::Status FromUncancelledCall(const grpc::Status& status);

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_GRPC_STATUS_H_
