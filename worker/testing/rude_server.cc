#include "worker/testing/rude_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "glog/logging.h"

namespace codistill {

RudeServer::RudeServer(Manner manner) : manner_(manner) {
  listener_ = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  CHECK(listener_ >= 0 && bind(listener_, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
        listen(listener_, 16) == 0 &&
        getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  port_ = ntohs(address.sin_port);
  thread_ = std::thread([this] { Run(); });
}

RudeServer::~RudeServer() {
  stopping_ = true;
  thread_.join();
  close(listener_);
  for (const int connection : open_) close(connection);
}

std::string RudeServer::address() const { return absl::StrCat("127.0.0.1:", port_); }

void RudeServer::Run() {
  while (!stopping_) {
    pollfd waiting = {listener_, POLLIN, 0};
    if (poll(&waiting, 1, /*timeout=*/20) <= 0) continue;
    const int connection = accept(listener_, nullptr, nullptr);
    if (connection < 0) continue;
    ++connections_;
    if (manner_ == kHangsUp) {
      close(connection);
      continue;
    }
    if (manner_ == kGarbage) {
      const std::string garbage(4096, '\x5a');
      // What becomes of it is the client's business.
      static_cast<void>(send(connection, garbage.data(), garbage.size(), MSG_NOSIGNAL));
    }
    open_.push_back(connection);
  }
}

}  // namespace codistill
