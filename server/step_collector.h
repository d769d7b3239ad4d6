#ifndef CODISTILL_SERVER_STEP_COLLECTOR_H_
#define CODISTILL_SERVER_STEP_COLLECTOR_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "proto/parameter_server.pb.h"

namespace codistill {

// Sums over the pushes that made a step, for the curves.
struct StepStatistics {
  int64_t examples = 0;
  double label_loss_sum = 0;  // over labels
  int64_t labels = 0;
  double teacher_loss_sum = 0;
  int64_t teacher_labels = 0;  // of pushes that used a teacher
  double teacher_weight = 0;   // the largest

  void Add(const PushEnd& end);
};

// The ENDs of one SYNC step, from every (shard, rank), until it is decided. Only a push that is
// whole, there on every shard, can become part of the step: so all shards take the same members'
// pushes, whoever dies between two of them. Not thread-safe.
class StepCollector {
 public:
  // `num_workers`: ranks there may be; `num_shards`: what a push needs to be whole.
  StepCollector(int num_workers, int num_shards) : num_shards_(num_shards), ranks_(num_workers) {}

  // An END; the newest incarnation of a rank replaces what an older one sent, and a repeated END
  // the earlier one.
  void Add(const ReportEndRequest& request);
  // A newer process has the rank: what older ones sent is forgotten.
  void ForgetOlder(int32_t rank, uint64_t incarnation);

  bool Whole(int32_t rank) const {
    return ranks_[rank].ends.size() == static_cast<size_t>(num_shards_);
  }
  // Of `members`, those some shard still waits for.
  std::vector<int32_t> Missing(const std::vector<int32_t>& members) const;

  struct Decision {
    std::vector<Contributor> contributors;  // in rank order
    std::vector<int32_t> rejected;          // not finite on some shard
    std::vector<std::string> not_finite;    // tensors, by rejected rank
    std::vector<int32_t> dropped;           // not whole
    StepStatistics statistics;              // of the contributors
    std::map<int32_t, std::string> worker_states;
  };
  // What becomes of the step if it is decided now. `members` in rank order.
  Decision Decide(const std::vector<int32_t>& members) const;

 private:
  struct Rank {
    uint64_t incarnation = 0;
    std::map<int32_t, PushEnd> ends;  // by shard
    std::string worker_state;
  };
  const int num_shards_;
  std::vector<Rank> ranks_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_STEP_COLLECTOR_H_
