#ifndef CODISTILL_COMMON_BASE_THREAD_PRIORITY_H_
#define CODISTILL_COMMON_BASE_THREAD_PRIORITY_H_

namespace codistill {

// Puts the calling thread, and threads that it starts from now on, behind the process's others
// where they compete for a core: it gets about a tenth of what they take, rather than nothing,
// because what it loads must be ready some time even on a machine that never rests. For good: the
// way back needs privileges. False where the system has no such thing or does not allow it; nothing
// has changed then.
bool LowerThreadPriority();

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_THREAD_PRIORITY_H_
