#ifndef CODISTILL_COMMON_MODEL_STEP_ESTIMATE_H_
#define CODISTILL_COMMON_MODEL_STEP_ESTIMATE_H_

#include <cstdint>
#include <deque>
#include <utility>

#include "absl/time/time.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// Which step a group has come to, as far as a follower can know. A leader speaks at least once a
// second; while it does, that is what it said last. Once it has been silent for longer the group
// may have gone on unheard, and staleness measured against the last word would look better than it
// is: the step is then taken to have grown at the rate it had, up to the group's last one.
// Not thread-safe.
class StepEstimate {
 public:
  // Silence up to this is no silence.
  static constexpr absl::Duration kPatience = absl::Milliseconds(1500);

  void Told(const GroupState& state, absl::Time now);
  int64_t At(absl::Time now) const;

 private:
  std::deque<std::pair<absl::Time, int64_t>> steps_;  // told over the last few seconds
  uint64_t generation_ = 0;
  int64_t stop_steps_ = 0;
  bool moving_ = false;  // it was training
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_STEP_ESTIMATE_H_
