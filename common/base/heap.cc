#include "common/base/heap.h"

#include <cstdlib>  // defines __GLIBC__ where it is

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace codistill {

void ConfigureHeapForTensors() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_MAX, 0);         // large blocks come from the heap too
  mallopt(M_TRIM_THRESHOLD, -1);  // whose top is never given back
  // Only the main arena keeps what it has: others unmap theirs as soon as they are empty.
  mallopt(M_ARENA_MAX, 1);
#endif
}

}  // namespace codistill
