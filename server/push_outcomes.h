#ifndef CODISTILL_SERVER_PUSH_OUTCOMES_H_
#define CODISTILL_SERVER_PUSH_OUTCOMES_H_

#include <cstdint>
#include <deque>
#include <map>
#include <optional>

#include "proto/parameter_server.pb.h"

namespace codistill {

// What an asynchronous shard has answered to the pushes of each rank, so that a push which comes
// again because its answer was lost is answered, not applied, and that the stream of a rank stays
// in order. At most the newest few pushes of a rank's newest process are remembered.
// Not thread-safe.
class PushOutcomes {
 public:
  // Answers remembered of one rank.
  static constexpr size_t kRemembered = 64;

  // The answer, if this push must not be decided (any more): the one it had before, with DUPLICATE
  // in place of APPLIED; DROPPED_LATE for one whose successors were decided already.
  std::optional<PushReply> Find(const PushBegin& begin) const;
  // The push was answered so.
  void Note(const PushBegin& begin, const PushReply& reply);

  // The largest step, by their own counts, of the pushes applied here: that of the worker furthest
  // ahead. BOUNDED_STALENESS measures a push's staleness against it.
  int64_t furthest_step() const { return furthest_step_; }
  // One past the largest example of the pushes seen here.
  uint64_t end_example() const { return end_example_; }
  // A push has begun.
  void Begun(const PushBegin& begin);

  void Clear() { *this = PushOutcomes(); }

 private:
  struct Decided {
    int64_t step = 0;
    PushReply reply;
  };
  struct Rank {
    uint64_t incarnation = 0;
    std::deque<Decided> decided;  // in order of their steps
  };
  std::map<int32_t, Rank> ranks_;
  int64_t furthest_step_ = 0;
  uint64_t end_example_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_PUSH_OUTCOMES_H_
