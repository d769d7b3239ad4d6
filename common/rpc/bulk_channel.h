#ifndef CODISTILL_COMMON_RPC_BULK_CHANNEL_H_
#define CODISTILL_COMMON_RPC_BULK_CHANNEL_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/rpc/bulk_stream.h"
#include "common/rpc/shm_link.h"
#include "grpcpp/channel.h"

namespace codistill {

// Where bulk streams to one server come from. They go through shared memory where the server is on
// this host and both sides allow it, otherwise through gRPC; what is sent is the same. Nobody has
// to say which: the server is asked over gRPC, and whenever shared memory is not to be had, for
// whatever reason, gRPC is used and the question asked again later. Thread-safe.
class BulkChannel : public std::enable_shared_from_this<BulkChannel> {
 public:
  struct Options {
    bool shared_memory = true;  // and SharedMemoryAllowed()
  };
  // `address`: host:port of the server.
  static std::shared_ptr<BulkChannel> Create(const std::string& address, const Options& options);

  std::unique_ptr<BulkStream> Open(const std::string& full_method, absl::Time deadline);

  struct Counts {
    int64_t shared_memory = 0;  // streams opened
    int64_t grpc = 0;
  };
  Counts counts() const;

 private:
  class ShmStream;
  struct Idle {
    std::shared_ptr<ShmLink> link;
    uint64_t calls = 0;  // it has carried
  };

  BulkChannel(const std::string& address, const Options& options);
  // One to begin a call on; without a link: gRPC.
  Idle GetLink(const std::string& method, absl::Time deadline);
  absl::StatusOr<std::shared_ptr<ShmLink>> Connect(absl::Time deadline);
  // A link without a call on it, for the next of the same method.
  void Return(const std::string& method, std::shared_ptr<ShmLink> link, uint64_t calls);

  const std::string address_;
  const bool shared_memory_;
  const std::shared_ptr<grpc::Channel> channel_;

  mutable Mutex mu_;
  // By method: a push's link never has its other direction touched, which would cost memory.
  std::map<std::string, std::vector<Idle>> idle_ ABSL_GUARDED_BY(mu_);
  absl::Time retry_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  bool told_ ABSL_GUARDED_BY(mu_) = false;
  Counts counts_ ABSL_GUARDED_BY(mu_);
};

// Whether this process uses shared memory at all (--shared_memory). True unless set otherwise.
void AllowSharedMemory(bool allow);
bool SharedMemoryAllowed();

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_BULK_CHANNEL_H_
