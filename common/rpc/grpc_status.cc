#include "common/rpc/grpc_status.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace codistill {
namespace {

// A status travels in HTTP/2 trailers, of which peers accept 8 KiB, percent-encoded (three bytes
// for each that is not printable ASCII). A longer one would fail the call with another error than
// its own.
constexpr size_t kMaxMessageBytes = 2048;

#define CODISTILL_SAME_CODE(absl_name, grpc_name)                  \
  static_assert(static_cast<int>(absl::StatusCode::absl_name) ==   \
                    static_cast<int>(grpc::StatusCode::grpc_name), \
                "absl and gRPC number their status codes the same")
CODISTILL_SAME_CODE(kOk, OK);
CODISTILL_SAME_CODE(kCancelled, CANCELLED);
CODISTILL_SAME_CODE(kUnknown, UNKNOWN);
CODISTILL_SAME_CODE(kInvalidArgument, INVALID_ARGUMENT);
CODISTILL_SAME_CODE(kDeadlineExceeded, DEADLINE_EXCEEDED);
CODISTILL_SAME_CODE(kNotFound, NOT_FOUND);
CODISTILL_SAME_CODE(kAlreadyExists, ALREADY_EXISTS);
CODISTILL_SAME_CODE(kPermissionDenied, PERMISSION_DENIED);
CODISTILL_SAME_CODE(kResourceExhausted, RESOURCE_EXHAUSTED);
CODISTILL_SAME_CODE(kFailedPrecondition, FAILED_PRECONDITION);
CODISTILL_SAME_CODE(kAborted, ABORTED);
CODISTILL_SAME_CODE(kOutOfRange, OUT_OF_RANGE);
CODISTILL_SAME_CODE(kUnimplemented, UNIMPLEMENTED);
CODISTILL_SAME_CODE(kInternal, INTERNAL);
CODISTILL_SAME_CODE(kUnavailable, UNAVAILABLE);
CODISTILL_SAME_CODE(kDataLoss, DATA_LOSS);
CODISTILL_SAME_CODE(kUnauthenticated, UNAUTHENTICATED);
#undef CODISTILL_SAME_CODE

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  std::string message(status.message());
  if (message.size() > kMaxMessageBytes) {
    const size_t total = message.size();
    message.resize(kMaxMessageBytes);
    absl::StrAppend(&message, "... (", total - kMaxMessageBytes, " more bytes)");
  }
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message);
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  // absl::Status::code() maps numbers it does not know to UNKNOWN.
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

absl::Status FromUncancelledCall(const grpc::Status& status) {
  if (status.error_code() != grpc::StatusCode::CANCELLED) return FromGrpcStatus(status);
  return absl::UnavailableError(absl::StrCat("cancelled by the server: ", status.error_message()));
}

}  // namespace codistill
