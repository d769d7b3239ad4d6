#ifndef CODISTILL_COMMON_CLIENT_FAKE_LEADER_H_
#define CODISTILL_COMMON_CLIENT_FAKE_LEADER_H_

#include <memory>
#include <string>

#include "proto/parameter_server.pb.h"

namespace codistill {

// For tests: a leader that serves Watch over a real socket and tells what it is given. Thread-safe.
class FakeLeader {
 public:
  FakeLeader();
  ~FakeLeader();

  const std::string& address() const { return address_; }
  // Sends `state` to every watcher, at once and when one comes later.
  void Tell(const GroupState& state);

 private:
  class Service;
  std::unique_ptr<Service> service_;
  std::string address_;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_FAKE_LEADER_H_
