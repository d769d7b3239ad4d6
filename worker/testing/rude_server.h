#ifndef CODISTILL_WORKER_TESTING_RUDE_SERVER_H_
#define CODISTILL_WORKER_TESTING_RUDE_SERVER_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace codistill {

// A TCP server that speaks no protocol, on a port of its own on loopback. Stops when destroyed.
class RudeServer {
 public:
  enum Manner {
    kSilent,   // accepts connections and never says a word
    kGarbage,  // answers with bytes that mean nothing, and keeps the connection
    kHangsUp,  // closes every connection at once
  };
  explicit RudeServer(Manner manner);
  ~RudeServer();

  std::string address() const;
  int64_t connections() const { return connections_; }  // accepted so far

 private:
  void Run();

  const Manner manner_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<bool> stopping_{false};
  std::atomic<int64_t> connections_{0};
  std::vector<int> open_;
  std::thread thread_;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TESTING_RUDE_SERVER_H_
