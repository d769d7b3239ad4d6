#ifndef CODISTILL_COMMON_BASE_FAULT_H_
#define CODISTILL_COMMON_BASE_FAULT_H_

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"

// Faults on demand, for tests of what happens when processes die and messages get lost. Compiled
// into every daemon and inert unless it was started with --allow_fault_injection: then rules set by
// rpc InjectFaults (proto/fault_injection.proto) or --fault_plan say what goes wrong where.
//
// A *point* is a name in the code: "shard.commit.applied" for a place in a process,
// "rpc:/codistill.Leader/Register" for a call on its way out,
// "stream:/codistill.TensorTransfer/Push" for a stream of frames on its way out. All of them are
// listed in tests/chaos/README.md.
namespace codistill {

enum class FaultKind {
  kDrop,       // the call never arrives, the stream breaks in its middle: UNAVAILABLE
  kDropReply,  // the other side does its work, but its answer is lost: UNAVAILABLE
  kDelay,      // it takes `delay` longer
  kDuplicate,  // it arrives twice; the second answer is ignored
  kReorder,    // calls: the next one overtakes it, or `delay` passes; streams: frames change places
  kKill,       // SIGKILL to this process
};

struct FaultRule {
  std::string point;  // of one point, or with a '*' at the end of all that begin so
  FaultKind kind = FaultKind::kDelay;
  double probability = 1;  // of each hit, drawn from (seed, rule, number of the hit)
  int64_t after = 0;       // hits of this rule passed over first
  int64_t times = 0;       // how often at most; 0 = without bound
  absl::Duration delay = absl::Milliseconds(20);
};

// What is to happen at one hit of a point.
struct FaultVerdict {
  bool drop = false;
  bool drop_reply = false;
  bool duplicate = false;
  bool reorder = false;
  bool kill = false;
  absl::Duration delay = absl::ZeroDuration();
  absl::Duration hold = absl::ZeroDuration();  // with reorder: how long at most
  uint64_t random = 0;  // for choices within the fault (which frame), from the same draw

  bool any() const {
    return drop || drop_reply || duplicate || reorder || kill || delay > absl::ZeroDuration();
  }
};

// Thread-safe. What is drawn depends on the seed, the rule's place in the list and how often it was
// hit: the same for every run in which the hits are.
class FaultInjector {
 public:
  static FaultInjector& Global();

  // Until this is called no point costs more than reading a flag, and SetRules is refused.
  void Enable() { enabled_.store(true, std::memory_order_relaxed); }
  bool enabled() const { return enabled_.load(std::memory_order_relaxed); }

  // Replaces all rules. FAILED_PRECONDITION where faults are not enabled; INVALID_ARGUMENT names
  // the rule and its field.
  absl::Status SetRules(uint64_t seed, std::vector<FaultRule> rules);

  FaultVerdict Hit(absl::string_view point);

  struct Count {
    FaultRule rule;
    int64_t hits = 0;
    int64_t faults = 0;
  };
  std::vector<Count> counts() const;

 private:
  std::atomic<bool> enabled_{false};
  mutable Mutex mu_;
  uint64_t seed_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<Count> rules_ ABSL_GUARDED_BY(mu_);
};

namespace internal {
void HitFaultPoint(absl::string_view point);
}  // namespace internal

// A place at which this process may be killed, or held up for a while: not under a lock that others
// need to go on.
inline void FaultPoint(absl::string_view point) {
  if (FaultInjector::Global().enabled()) internal::HitFaultPoint(point);
}

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_FAULT_H_
