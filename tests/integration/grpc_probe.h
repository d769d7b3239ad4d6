#ifndef CODISTILL_TESTS_INTEGRATION_GRPC_PROBE_H_
#define CODISTILL_TESTS_INTEGRATION_GRPC_PROBE_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace codistill {

// What gRPC's own tools ask of any server, by the bytes of the standard's messages: Debian ships no
// generated code for them.

// grpc.health.v1.Health/Check of the whole server: whether it says SERVING.
absl::StatusOr<bool> Healthy(const std::string& address, absl::Duration timeout);

// The list of services of grpc.reflection.v1alpha.ServerReflection, as the raw answer: service
// names stand in it as text.
absl::StatusOr<std::string> ReflectedServices(const std::string& address, absl::Duration timeout);

}  // namespace codistill

#endif  // CODISTILL_TESTS_INTEGRATION_GRPC_PROBE_H_
