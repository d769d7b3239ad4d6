#ifndef CODISTILL_COMMON_BASE_RETRY_AFTER_H_
#define CODISTILL_COMMON_BASE_RETRY_AFTER_H_

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"

// A hint in an error that refuses for load: when it is worth trying again. It is the status payload
// google.rpc.RetryInfo, under which gRPC clients of any language look for it
// (github.com/googleapis/googleapis, google/rpc/error_details.proto).
namespace codistill {

// Type URL of the payload, and its bytes: a serialized google.rpc.RetryInfo.
inline constexpr char kRetryInfoType[] = "type.googleapis.com/google.rpc.RetryInfo";

// `status` with the hint. OK stays OK. `delay` is at least 0.
absl::Status WithRetryAfter(absl::Status status, absl::Duration delay);

// The hint, if there is one that can be read.
absl::optional<absl::Duration> RetryAfter(const absl::Status& status);

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_RETRY_AFTER_H_
