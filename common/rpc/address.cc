#include "common/rpc/address.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace codistill {
namespace {

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

absl::StatusOr<AddressList> Resolve(const HostPort& address) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const int error =
      getaddrinfo(address.host.c_str(), absl::StrCat(address.port).c_str(), &hints, &list);
  if (error != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "address ", address.ToString(), ": cannot resolve its host: ", gai_strerror(error)));
  }
  return AddressList(list, &freeaddrinfo);
}

bool IsLoopback(const sockaddr& address) {
  if (address.sa_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
    return (ntohl(v4.sin_addr.s_addr) >> 24) == 127;
  }
  if (address.sa_family == AF_INET6) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address);
    return IN6_IS_ADDR_LOOPBACK(&v6.sin6_addr);
  }
  return false;
}

}  // namespace

std::string HostPort::ToString() const {
  const bool brackets = host.find(':') != std::string::npos;
  return absl::StrCat(brackets ? "[" : "", host, brackets ? "]" : "", ":", port);
}

absl::StatusOr<HostPort> ParseHostPort(absl::string_view address) {
  const auto bad = [address] {
    return absl::InvalidArgumentError(
        absl::StrCat("address \"", address, "\" is not host:port with a port from 0 to 65535"));
  };
  const size_t colon = address.rfind(':');
  if (colon == absl::string_view::npos) return bad();
  absl::string_view host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  } else if (host.find(':') != absl::string_view::npos) {
    return bad();
  }
  HostPort result;
  result.host = std::string(host);
  if (host.empty() || !absl::SimpleAtoi(address.substr(colon + 1), &result.port) ||
      result.port < 0 || result.port > 65535) {
    return bad();
  }
  return result;
}

absl::Status CheckListenAddress(const HostPort& address, bool insecure_listen) {
  absl::StatusOr<AddressList> list = Resolve(address);
  if (!list.ok()) return list.status();
  if (insecure_listen) return absl::OkStatus();
  for (const addrinfo* entry = list->get(); entry != nullptr; entry = entry->ai_next) {
    if (IsLoopback(*entry->ai_addr)) continue;
    return absl::PermissionDeniedError(absl::StrCat(
        "address ", address.ToString(),
        " can be reached from other machines, and what is served "
        "there is neither encrypted nor authenticated: give --insecure_listen to allow it, or "
        "listen on 127.0.0.1"));
  }
  return absl::OkStatus();
}

absl::Status ExplainListenFailure(const HostPort& address) {
  const std::string what = absl::StrCat("cannot listen on ", address.ToString());
  absl::StatusOr<AddressList> list = Resolve(address);
  if (!list.ok()) return list.status();
  for (const addrinfo* entry = list->get(); entry != nullptr; entry = entry->ai_next) {
    const int fd = socket(entry->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    // As servers do it: not disturbed by closed connections that linger.
    const int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    const bool failed = bind(fd, entry->ai_addr, entry->ai_addrlen) != 0 || listen(fd, 1) != 0;
    const int error = errno;
    close(fd);
    if (failed) return absl::ErrnoToStatus(error, what);
  }
  return absl::UnavailableError(what);
}

}  // namespace codistill
