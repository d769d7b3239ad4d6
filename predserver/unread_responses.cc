#include "predserver/unread_responses.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/base/retry_after.h"

namespace codistill {
namespace {

// When a client that reads again will have room: as good a guess as any, and not soon enough to be
// a burden.
constexpr absl::Duration kRetryAfter = absl::Milliseconds(100);

}  // namespace

absl::Status UnreadResponses::Account::Check() const {
  const size_t held = bytes(), most = limit();
  return held < most ? absl::OkStatus() : Refusal(held, most);
}

absl::Status UnreadResponses::Account::CheckRoomFor(size_t more) const {
  const size_t held = bytes(), most = left();
  return held == 0 || held + more <= most ? absl::OkStatus() : Refusal(held, most);
}

absl::Status UnreadResponses::Account::Refusal(size_t held, size_t most) const {
  return WithRetryAfter(
      absl::ResourceExhaustedError(absl::StrCat(
          held, " bytes of responses to this client wait to be read; no more are computed above ",
          most)),
      kRetryAfter);
}

std::shared_ptr<const void> UnreadResponses::Account::Hold(std::shared_ptr<Account> account,
                                                           size_t bytes) {
  account->bytes_.fetch_add(bytes, std::memory_order_relaxed);
  account->total_->fetch_add(bytes, std::memory_order_relaxed);
  Account* const counted = account.get();
  return std::shared_ptr<const void>(counted, [account = std::move(account), bytes](const void*) {
    account->bytes_.fetch_sub(bytes, std::memory_order_relaxed);
    account->total_->fetch_sub(bytes, std::memory_order_relaxed);
  });
}

std::shared_ptr<UnreadResponses::Account> UnreadResponses::Find(const std::string& client) {
  MutexLock lock(&mu_);
  std::weak_ptr<Account>& known = accounts_[client];
  std::shared_ptr<Account> account = known.lock();
  if (account == nullptr) {
    account = std::make_shared<Account>(limit_, total_limit_, total_);
    known = account;
  }
  if (accounts_.size() >= sweep_at_) {
    for (auto it = accounts_.begin(); it != accounts_.end();) {
      it = it->second.expired() ? accounts_.erase(it) : std::next(it);
    }
    sweep_at_ = std::max<size_t>(64, 2 * accounts_.size());
  }
  return account;
}

size_t UnreadResponses::size() const {
  MutexLock lock(&mu_);
  return std::count_if(accounts_.begin(), accounts_.end(),
                       [](const auto& entry) { return !entry.second.expired(); });
}

}  // namespace codistill
