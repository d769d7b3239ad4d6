#ifndef CODISTILL_COMMON_RPC_ADDRESS_H_
#define CODISTILL_COMMON_RPC_ADDRESS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace codistill {

// "host:port", "[ipv6]:port". The host is kept without brackets.
struct HostPort {
  std::string host;
  int port = 0;

  // With brackets where the host needs them.
  std::string ToString() const;
};

// INVALID_ARGUMENT, naming the address, unless it has a host and a port in [0, 65535].
absl::StatusOr<HostPort> ParseHostPort(absl::string_view address);

// Whether a daemon may listen on `address`. What we serve is neither encrypted nor authenticated,
// so without `insecure_listen` (the flag --insecure_listen) every address the host name stands for
// must be of loopback; PERMISSION_DENIED, naming the address and the flag, if not. INVALID_ARGUMENT
// for a host nobody knows.
absl::Status CheckListenAddress(const HostPort& address, bool insecure_listen);

// After a server could not listen on `address`: why not, in the system's words, naming the address.
absl::Status ExplainListenFailure(const HostPort& address);

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_ADDRESS_H_
