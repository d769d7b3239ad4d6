// How this process's heap treats large blocks.

#ifndef CODISTILL_COMMON_BASE_HEAP_H_
#define CODISTILL_COMMON_BASE_HEAP_H_

namespace codistill {

// Makes malloc keep what it is given back instead of returning it to the system. A training step
// allocates the same large tensors over and over; with malloc's defaults each becomes a fresh
// mapping whose pages fault in one by one, which costs 5-10 times the arithmetic on them. Call
// once, first thing in the main() of a daemon that computes or holds tensors. Does nothing without
// glibc.
void ConfigureHeapForTensors();

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_HEAP_H_
