#include "common/rpc/grpc_status.h"

#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "common/base/retry_after.h"
#include "google/protobuf/any.pb.h"
#include "google/protobuf/unknown_field_set.h"

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

// google.rpc.Status { int32 code = 1; string message = 2; repeated google.protobuf.Any details = 3;
// }, which gRPC carries beside a status in the trailer grpc-status-details-bin.
constexpr int kCodeField = 1;
constexpr int kMessageField = 2;
constexpr int kDetailsField = 3;

// When to try again, for clients of any language; empty where the status says nothing of it.
std::string DetailsOf(const absl::Status& status, const std::string& message) {
  const absl::optional<absl::Cord> info = status.GetPayload(kRetryInfoType);
  if (!info.has_value()) return "";
  google::protobuf::Any any;
  any.set_type_url(kRetryInfoType);
  any.set_value(std::string(*info));
  google::protobuf::UnknownFieldSet fields;
  fields.AddVarint(kCodeField, static_cast<uint64_t>(status.code()));
  fields.AddLengthDelimited(kMessageField, message);
  fields.AddLengthDelimited(kDetailsField, any.SerializeAsString());
  std::string details;
  fields.SerializeToString(&details);
  return details;
}

void TakeRetryInfo(const std::string& details, absl::Status* status) {
  google::protobuf::UnknownFieldSet fields;
  if (details.empty() || !fields.ParseFromString(details)) return;
  for (int i = 0; i < fields.field_count(); ++i) {
    const google::protobuf::UnknownField& field = fields.field(i);
    google::protobuf::Any any;
    if (field.number() == kDetailsField &&
        field.type() == google::protobuf::UnknownField::TYPE_LENGTH_DELIMITED &&
        any.ParseFromString(field.length_delimited()) && any.type_url() == kRetryInfoType) {
      status->SetPayload(kRetryInfoType, absl::Cord(any.value()));
    }
  }
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  std::string message(status.message());
  if (message.size() > kMaxMessageBytes) {
    const size_t total = message.size();
    message.resize(kMaxMessageBytes);
    absl::StrAppend(&message, "... (", total - kMaxMessageBytes, " more bytes)");
  }
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message,
                      DetailsOf(status, message));
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  // absl::Status::code() maps numbers it does not know to UNKNOWN.
  absl::Status converted(static_cast<absl::StatusCode>(status.error_code()),
                         status.error_message());
  TakeRetryInfo(status.error_details(), &converted);
  return converted;
}

absl::Status FromUncancelledCall(const grpc::Status& status) {
  if (status.error_code() != grpc::StatusCode::CANCELLED) return FromGrpcStatus(status);
  return absl::UnavailableError(absl::StrCat("cancelled by the server: ", status.error_message()));
}

}  // namespace codistill
