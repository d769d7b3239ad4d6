// Data-parallel loops.

#ifndef CODISTILL_COMMON_BASE_PARALLEL_H_
#define CODISTILL_COMMON_BASE_PARALLEL_H_

#include <cstdint>

#include "absl/functional/function_ref.h"

namespace codistill {

// Calls body(begin, end) for consecutive ranges that cover [0, n), on at most `threads` threads,
// the caller's included, and returns when all are done. No range but the last is shorter than
// `grain`, so small loops stay on the caller's thread; a thread costs some 20 microseconds to
// start. Which ranges there are depends on `threads`: a body whose result must not, reduces per
// element, not per range. The body must not throw.
void ParallelFor(int threads, int64_t n, int64_t grain,
                 absl::FunctionRef<void(int64_t begin, int64_t end)> body);

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_PARALLEL_H_
