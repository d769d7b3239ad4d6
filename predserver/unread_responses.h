#ifndef CODISTILL_PREDSERVER_UNREAD_RESPONSES_H_
#define CODISTILL_PREDSERVER_UNREAD_RESPONSES_H_

#include <atomic>
#include <cstddef>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "common/base/mutex.h"

namespace codistill {

// Counts, for each client, the bytes of responses that were computed and that gRPC still holds
// because the client has not read them. One that stops reading must not fill the server's memory;
// those who read are never near the limit. Thread-safe.
class UnreadResponses {
 public:
  // Of one client, all its calls together.
  class Account {
   public:
    explicit Account(size_t limit) : limit_(limit) {}

    // RESOURCE_EXHAUSTED, with a hint when to retry, while the limit is reached.
    absl::Status Check() const;
    bool full() const { return bytes_.load(std::memory_order_relaxed) >= limit_; }
    size_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
    // Counts `bytes` until the last copy of what is returned is gone. That keeps the account.
    static std::shared_ptr<const void> Hold(std::shared_ptr<Account> account, size_t bytes);

   private:
    const size_t limit_;
    std::atomic<size_t> bytes_{0};
  };

  // `limit`: bytes with which a client is refused.
  explicit UnreadResponses(size_t limit) : limit_(limit) {}

  // The account of `client`; the same as long as somebody has it.
  std::shared_ptr<Account> Find(const std::string& client);

  // Accounts that somebody has.
  size_t size() const;

 private:
  const size_t limit_;
  mutable Mutex mu_;
  // Those that nobody has any more are swept out now and then.
  std::map<std::string, std::weak_ptr<Account>> accounts_ ABSL_GUARDED_BY(mu_);
  size_t sweep_at_ ABSL_GUARDED_BY(mu_) = 64;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_UNREAD_RESPONSES_H_
