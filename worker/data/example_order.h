#ifndef CODISTILL_WORKER_DATA_EXAMPLE_ORDER_H_
#define CODISTILL_WORKER_DATA_EXAMPLE_ORDER_H_

#include <cstdint>
#include <vector>

#include "proto/job.pb.h"

namespace codistill {

// One appearance of an example in training.
struct ExampleRef {
  int64_t index = 0;  // in the data set, [0, size)
  int64_t epoch = 0;  // how often the group has been through its examples before
};

inline bool operator==(const ExampleRef& a, const ExampleRef& b) {
  return a.index == b.index && a.epoch == b.epoch;
}

// The endless stream of examples that a group trains on: position -> example, without any state, so
// that every worker computes its part of a step from the numbers in its Assignment, whatever was
// lost or replayed before. Every epoch visits each example of the group's partition exactly once.
//
// DISJOINT gives group g the examples i with i mod num_groups == g, SAME gives it all; either way
// in an order of its own each epoch. A sequential data set (text) is visited in its own order, and
// is cut for the groups when it is read. Immutable, thread-safe.
class ExampleOrder {
 public:
  struct Options {
    uint64_t seed = 1;  // of the job
    int group = 0;
    int num_groups = 1;
    Partition partition = DISJOINT;
    int64_t size = 0;  // examples of the data set; each group must get at least one
    bool sequential = false;
  };
  explicit ExampleOrder(const Options& options);

  // `position` counts from 0.
  ExampleRef At(uint64_t position) const;
  // Positions [first, first + count).
  std::vector<ExampleRef> Range(uint64_t first, int64_t count) const;

  // Examples the group visits in one epoch.
  int64_t epoch_size() const { return epoch_size_; }

 private:
  const Options options_;
  const int64_t epoch_size_;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_DATA_EXAMPLE_ORDER_H_
