#ifndef CODISTILL_COMMON_RPC_CALL_REGISTRY_H_
#define CODISTILL_COMMON_RPC_CALL_REGISTRY_H_

#include <cstddef>
#include <memory>
#include <unordered_map>

#include "absl/status/status.h"
#include "common/base/mutex.h"

namespace codistill {

// A call that may wait on the server for something to happen.
class ParkedCall {
 public:
  virtual ~ParkedCall() = default;
  // The server goes down: end with `status` unless ended already. Any thread.
  virtual void EndForShutdown(const absl::Status& status) = 0;
};

// The open calls of a service, so that shutting down can end them: a grpc::Server waits for every
// unfinished call. Thread-safe; outlives its calls, which is to say its grpc::Server.
class CallRegistry {
 public:
  CallRegistry() = default;
  CallRegistry(const CallRegistry&) = delete;
  CallRegistry& operator=(const CallRegistry&) = delete;

  // OK, or what to end the call with at once: FinishAll was called.
  absl::Status Add(const std::shared_ptr<ParkedCall>& call);
  void Remove(ParkedCall* call);

  // Ends every open call, and every later one, with `status`.
  void FinishAll(absl::Status status = absl::UnavailableError("this daemon is shutting down"));

  size_t size() const;

 private:
  mutable Mutex mu_;
  absl::Status closed_ ABSL_GUARDED_BY(mu_);  // OK while open
  std::unordered_map<ParkedCall*, std::weak_ptr<ParkedCall>> calls_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_CALL_REGISTRY_H_
