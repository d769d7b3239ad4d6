#ifndef CODISTILL_PREDSERVER_REQUEST_QUEUE_H_
#define CODISTILL_PREDSERVER_REQUEST_QUEUE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "predserver/cached_rows.h"
#include "predserver/prediction.h"
#include "predserver/request_check.h"

namespace codistill {

// A request that has been checked and waits to be computed.
struct WaitingRequest {
  PredictionRequest request;
  RequestPlan plan;
  absl::Time arrived;
  bool accepted = false;  // until it is answered, nobody may go
  bool open = false;      // a BatchPolicy counts on it
  absl::Time taken;       // out of the queue, into a pass
  std::function<void(absl::StatusOr<Prediction>)> done;
  // Where predictions are cached: those there are so far. Else null.
  std::unique_ptr<CachedRows> cached;
  // The examples to compute, ascending; empty: all.
  std::vector<int32_t> only;
  // Memory that it takes while it waits; does not change as long as it does.
  int64_t bytes = 0;

  int64_t examples() const { return only.empty() ? plan.batch : static_cast<int64_t>(only.size()); }
};

// Bounded in requests and bytes, and fair between clients: their requests take turns, those of one
// client stay in order, and of a full queue the client that has most in it gives up its newest
// request for one of a client with clearly fewer. Not thread-safe.
class RequestQueue {
 public:
  using Item = std::unique_ptr<WaitingRequest>;
  // A single request may have more than `max_bytes`.
  RequestQueue(int capacity, int64_t max_bytes) : capacity_(capacity), max_bytes_(max_bytes) {}

  int size() const { return size_; }
  int64_t examples() const { return examples_; }
  int64_t bytes() const { return bytes_; }

  // Whether Push would take a request of this client and size. `aside`: bytes of requests that wait
  // elsewhere and count too.
  bool HasRoom(const std::string& client, int64_t bytes, int64_t aside) const;
  // Requires HasRoom with its client and bytes. What had to go in exchange, or null.
  Item Push(Item item, int64_t aside);

  // Removes what `dead` says, in no particular order.
  std::vector<Item> RemoveIf(const std::function<bool(const WaitingRequest&)>& dead);

  enum class Verdict {
    kTake,
    kSkip,  // neither this one nor what its client has behind it
    kStop,  // no more at all
  };
  // Takes requests in the order of turns, each as `verdict` says.
  std::vector<Item> Take(const std::function<Verdict(const WaitingRequest&)>& verdict);

 private:
  struct Client {
    std::string name;
    std::deque<Item> waiting;  // never empty between calls
    bool skipped = false;      // by the Take under way
  };
  using Clients = std::list<Client>;

  // Whose newest request gives way to one of `client`, if somebody's does.
  const Client* Donor(const std::string& client) const;
  // Whether a request fits once `gone`, if there is one, has gone.
  bool Fits(int64_t bytes, int64_t aside, const WaitingRequest* gone) const;
  // Has left.
  void Uncount(const WaitingRequest& item);
  Item Remove(Client* client, bool newest);
  void Forget(Clients::iterator client);

  const int capacity_;
  const int64_t max_bytes_;
  int size_ = 0;
  int64_t bytes_ = 0;
  int64_t examples_ = 0;
  Clients turns_;  // whose turn is next comes first
  absl::flat_hash_map<std::string, Clients::iterator> by_name_;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_REQUEST_QUEUE_H_
