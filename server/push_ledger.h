#ifndef CODISTILL_SERVER_PUSH_LEDGER_H_
#define CODISTILL_SERVER_PUSH_LEDGER_H_

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "proto/parameter_server.pb.h"

namespace codistill {

// What becomes of the steps an asynchronous group hands out: the leader's books, made up from the
// reports of the shards (proto/parameter_server.proto, AsyncCounters).
//
// A worker sends each shard one ordered stream of pushes, and a shard reports its decisions in
// order. So once a shard has reported a later push of a rank, it will never report an earlier one,
// and when that holds of every shard, what has become of the earlier one is known exactly.
// Not thread-safe.
class AsyncLedger {
 public:
  // Steps of one rank that may be open before no more are handed out to it.
  static constexpr size_t kMaxOpen = 1024;

  AsyncLedger(int num_workers, int num_shards);

  // Step `step` was handed out to this incarnation of `rank`, for the first time.
  void Issued(int32_t rank, uint64_t incarnation, int64_t step);
  // `shard` has decided that push.
  void Decided(int32_t rank, uint64_t incarnation, int64_t step, int shard, PushOutcome outcome);
  // A process of `shard` is gone, and what it had decided and not reported will not be heard of.
  void ShardLost(int shard);
  // Nothing more will be decided of what was handed out up to now: the group begins again.
  void Abandon();

  bool Full(int32_t rank) const { return ranks_[rank].open.size() >= kMaxOpen; }
  int64_t open() const;
  // The counts so far; `shard_reloads`, `lost_updates` and `max_ahead` are not this class's.
  void Fill(AsyncCounters* counters) const;
  // Takes up saved counts. What was open then is lost now.
  void Load(const AsyncCounters& saved);

 private:
  using Key = std::pair<uint64_t, int64_t>;  // incarnation, step
  struct Push {
    std::vector<PushOutcome> outcomes;  // by shard; PUSH_OUTCOME_INVALID = not heard of
  };
  struct Rank {
    std::map<Key, Push> open;
    std::vector<Key> newest;   // by shard: the last decided
    std::vector<Key> written;  // by shard: up to here nothing more will be heard of (ShardLost)
  };
  void Settle(Rank* rank);
  void Count(const Push& push);

  const int num_shards_;
  std::vector<Rank> ranks_;
  AsyncCounters counters_;  // without `open`
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_PUSH_LEDGER_H_
