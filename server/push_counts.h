#ifndef CODISTILL_SERVER_PUSH_COUNTS_H_
#define CODISTILL_SERVER_PUSH_COUNTS_H_

#include <cstdint>
#include <map>
#include <vector>

#include "absl/status/statusor.h"
#include "google/protobuf/repeated_field.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// What became of pushes, by rank (PushCounts in proto/parameter_server.proto), as one shard's
// process counts it. Every push that is begun ends in exactly one of the other calls. Not
// thread-safe.
class PushTally {
 public:
  void Begun(int32_t rank) { Of(rank).set_begun(Of(rank).begun() + 1); }
  void Answered(int32_t rank, const absl::StatusOr<PushReply>& reply);
  void Refused(int32_t rank) { Of(rank).set_refused(Of(rank).refused() + 1); }
  void Lost(int32_t rank) { Of(rank).set_lost(Of(rank).lost() + 1); }

  void Fill(google::protobuf::RepeatedPtrField<RankPushes>* ranks) const;

 private:
  PushCounts& Of(int32_t rank) { return ranks_[rank]; }
  std::map<int32_t, PushCounts> ranks_;
};

// The tallies of a group's shards added up, over restarts of their processes. Not thread-safe.
class PushTotals {
 public:
  explicit PushTotals(int num_shards) : shards_(num_shards) {}

  // What the process `nonce` of a shard has counted so far.
  void Update(int shard, uint64_t nonce,
              const google::protobuf::RepeatedPtrField<RankPushes>& ranks);
  // By rank, over all shards.
  std::map<int32_t, PushCounts> Totals() const;

 private:
  struct Shard {
    uint64_t nonce = 0;
    std::map<int32_t, PushCounts> counts;   // of this process
    std::map<int32_t, PushCounts> earlier;  // of those before; what they had open is lost
  };
  std::vector<Shard> shards_;
};

void AddPushCounts(const PushCounts& more, PushCounts* sum);

}  // namespace codistill

#endif  // CODISTILL_SERVER_PUSH_COUNTS_H_
