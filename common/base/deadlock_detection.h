#ifndef CODISTILL_COMMON_BASE_DEADLOCK_DETECTION_H_
#define CODISTILL_COMMON_BASE_DEADLOCK_DETECTION_H_

#include "absl/synchronization/mutex.h"

namespace codistill {

// Stops Abseil from looking for cycles in the order in which mutexes are taken. Debian builds
// Abseil with that on, for gRPC's mutexes as for ours: every Lock and Unlock then waits its turn at
// one lock of the whole process, and costs three times as much even alone. First thing in the
// main() of whatever must be fast; tests leave it on, and so find such cycles.
inline void DisableDeadlockDetection() {
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
}

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_DEADLOCK_DETECTION_H_
