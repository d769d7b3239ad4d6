#ifndef CODISTILL_SERVER_DRAIN_TIMES_H_
#define CODISTILL_SERVER_DRAIN_TIMES_H_

#include "absl/time/time.h"

namespace codistill {

// How long a draining group takes at most, in the order in which things end: workers have left, the
// leader has its last checkpoint, a shard whose leader still calls gives up waiting for it. All
// within a daemon's --drain_timeout_s, which is 20 s unless told.
inline constexpr absl::Duration kDrainWorkers = absl::Seconds(5);
inline constexpr absl::Duration kDrainLeader = absl::Seconds(16);
inline constexpr absl::Duration kDrainShard = absl::Seconds(18);

}  // namespace codistill

#endif  // CODISTILL_SERVER_DRAIN_TIMES_H_
