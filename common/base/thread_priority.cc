#include "common/base/thread_priority.h"

#ifdef __linux__
#include <errno.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace codistill {

bool LowerThreadPriority() {
#ifdef __linux__
  // Linux gives every thread a nice value of its own, whatever POSIX says of the process.
  constexpr int kBelowOthers = 10;
  constexpr int kLowest = 19;
  const auto thread = static_cast<id_t>(syscall(SYS_gettid));
  errno = 0;
  const int now = getpriority(PRIO_PROCESS, thread);
  if (now == -1 && errno != 0) return false;
  const int lower = now + kBelowOthers < kLowest ? now + kBelowOthers : kLowest;
  return setpriority(PRIO_PROCESS, thread, lower) == 0;
#else
  return false;
#endif
}

}  // namespace codistill
