#include "predserver/request_queue.h"

#include <algorithm>
#include <utility>

namespace codistill {

const RequestQueue::Client* RequestQueue::Donor(const std::string& client) const {
  const Client* most = nullptr;
  for (const Client& other : turns_) {
    if (most == nullptr || other.waiting.size() > most->waiting.size()) most = &other;
  }
  if (most == nullptr) return nullptr;
  const auto own = by_name_.find(client);
  const size_t has = own == by_name_.end() ? 0 : own->second->waiting.size();
  // Equals do not push each other out in turn.
  return has + 1 < most->waiting.size() ? most : nullptr;
}

bool RequestQueue::Fits(int64_t bytes, int64_t aside, const WaitingRequest* gone) const {
  const int others = size_ - (gone == nullptr ? 0 : 1);
  const int64_t theirs = bytes_ + aside - (gone == nullptr ? 0 : gone->bytes);
  return others < capacity_ && (theirs == 0 || bytes <= max_bytes_ - theirs);
}

bool RequestQueue::HasRoom(const std::string& client, int64_t bytes, int64_t aside) const {
  if (Fits(bytes, aside, nullptr)) return true;
  const Client* const donor = Donor(client);
  return donor != nullptr && Fits(bytes, aside, donor->waiting.back().get());
}

void RequestQueue::Uncount(const WaitingRequest& item) {
  --size_;
  bytes_ -= item.bytes;
  examples_ -= item.examples();
}

RequestQueue::Item RequestQueue::Remove(Client* client, bool newest) {
  Item item;
  if (newest) {
    item = std::move(client->waiting.back());
    client->waiting.pop_back();
  } else {
    item = std::move(client->waiting.front());
    client->waiting.pop_front();
  }
  Uncount(*item);
  return item;
}

void RequestQueue::Forget(Clients::iterator client) {
  by_name_.erase(client->name);
  turns_.erase(client);
}

RequestQueue::Item RequestQueue::Push(Item item, int64_t aside) {
  Item displaced;
  if (!Fits(item->bytes, aside, nullptr)) {
    // Has two or more, so it stays.
    displaced = Remove(const_cast<Client*>(Donor(item->request.client)), /*newest=*/true);
  }
  auto [entry, fresh] = by_name_.try_emplace(item->request.client);
  if (fresh) {
    turns_.emplace_back().name = item->request.client;
    entry->second = std::prev(turns_.end());
  }
  ++size_;
  bytes_ += item->bytes;
  examples_ += item->examples();
  entry->second->waiting.push_back(std::move(item));
  return displaced;
}

std::vector<RequestQueue::Item> RequestQueue::RemoveIf(
    const std::function<bool(const WaitingRequest&)>& dead) {
  std::vector<Item> removed;
  for (auto client = turns_.begin(); client != turns_.end();) {
    std::deque<Item>& waiting = client->waiting;
    const auto end = std::stable_partition(waiting.begin(), waiting.end(),
                                           [&](const Item& item) { return !dead(*item); });
    for (auto item = end; item != waiting.end(); ++item) {
      Uncount(**item);
      removed.push_back(std::move(*item));
    }
    waiting.erase(end, waiting.end());
    const auto next = std::next(client);
    if (waiting.empty()) Forget(client);
    client = next;
  }
  return removed;
}

std::vector<RequestQueue::Item> RequestQueue::Take(
    const std::function<Verdict(const WaitingRequest&)>& verdict) {
  std::vector<Item> taken;
  size_t skipped = 0;
  while (skipped < turns_.size()) {
    const auto client = turns_.begin();
    const Verdict said = client->skipped ? Verdict::kSkip : verdict(*client->waiting.front());
    if (said == Verdict::kStop) break;
    if (said == Verdict::kTake) taken.push_back(Remove(&*client, /*newest=*/false));
    if (client->waiting.empty()) {
      Forget(client);
      continue;
    }
    if (said == Verdict::kSkip && !client->skipped) {
      client->skipped = true;
      ++skipped;
    }
    turns_.splice(turns_.end(), turns_, client);
  }
  // Those who were passed over keep their turns before those who were not.
  if (skipped > 0) {
    Clients first;
    for (auto client = turns_.begin(); client != turns_.end();) {
      const auto next = std::next(client);
      if (std::exchange(client->skipped, false)) first.splice(first.end(), turns_, client);
      client = next;
    }
    turns_.splice(turns_.begin(), first);
  }
  return taken;
}

}  // namespace codistill
