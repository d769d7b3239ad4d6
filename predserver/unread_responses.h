#ifndef CODISTILL_PREDSERVER_UNREAD_RESPONSES_H_
#define CODISTILL_PREDSERVER_UNREAD_RESPONSES_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "common/base/mutex.h"

namespace codistill {

// Counts, for each client, the bytes of responses that were computed and that gRPC still holds
// because the client has not read them. One that stops reading must not fill the server's memory,
// nor must many; those who read are never near the limit.
//
// A client has a limit of its own, and all together have another: nobody may have more than is
// left of that (dynamic thresholds, Choudhury and Hahne 1998), so that however many read nothing,
// there is a share for those who do. Thread-safe.
class UnreadResponses {
 public:
  // Of one client, all its calls together.
  class Account {
   public:
    Account(size_t limit, size_t total_limit, std::shared_ptr<std::atomic<size_t>> total)
        : limit_(limit), total_limit_(total_limit), total_(std::move(total)) {}

    // RESOURCE_EXHAUSTED, with a hint when to retry, while the limit is reached.
    absl::Status Check() const;
    // The same for a response that has been computed: a pass may have answered many requests of one
    // client at once, and such a client may exceed its own limit, but not by what is for others.
    absl::Status CheckRoomFor(size_t bytes) const;
    bool full() const { return bytes() >= limit(); }
    size_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
    // Counts `bytes` until the last copy of what is returned is gone. That keeps the account.
    static std::shared_ptr<const void> Hold(std::shared_ptr<Account> account, size_t bytes);

   private:
    // What is left for everybody.
    size_t left() const {
      return total_limit_ - std::min(total_limit_, total_->load(std::memory_order_relaxed));
    }
    size_t limit() const { return std::min(limit_, left()); }
    absl::Status Refusal(size_t held, size_t most) const;

    const size_t limit_, total_limit_;
    const std::shared_ptr<std::atomic<size_t>> total_;  // of all accounts
    std::atomic<size_t> bytes_{0};
  };

  // `limit`: bytes with which a client is refused. `total`: that all clients may have together.
  UnreadResponses(size_t limit, size_t total) : limit_(limit), total_limit_(total) {}

  // The account of `client`; the same as long as somebody has it.
  std::shared_ptr<Account> Find(const std::string& client);

  // Accounts that somebody has.
  size_t size() const;

 private:
  const size_t limit_, total_limit_;
  const std::shared_ptr<std::atomic<size_t>> total_ = std::make_shared<std::atomic<size_t>>(0);
  mutable Mutex mu_;
  // Those that nobody has any more are swept out now and then.
  std::map<std::string, std::weak_ptr<Account>> accounts_ ABSL_GUARDED_BY(mu_);
  size_t sweep_at_ ABSL_GUARDED_BY(mu_) = 64;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_UNREAD_RESPONSES_H_
