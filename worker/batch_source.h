#ifndef CODISTILL_WORKER_BATCH_SOURCE_H_
#define CODISTILL_WORKER_BATCH_SOURCE_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "common/tensor/tensor.h"

namespace codistill {

// What a model and the loss kernel take for one step.
struct StudentBatch {
  std::vector<Tensor> inputs;  // in the order of the job's model.inputs
  // Class labels, INT64 [rows]; or targets, FLOAT [rows, num_outputs], where the label loss is not
  // a softmax. The other one is empty.
  Tensor labels;
  Tensor targets;
  Tensor example_ids;  // INT64 [examples]
  int64_t examples = 0;
  int64_t rows = 0;           // examples x labels an example
  bool starts_epoch = false;  // recurrent state starts from zeros
};

// Builds the batches of one group. Used by one thread.
class BatchSource {
 public:
  virtual ~BatchSource() = default;
  // Examples [first, first + count) of the group's endless stream: a pure function of its
  // arguments. Errors name the record at fault.
  virtual absl::StatusOr<StudentBatch> Build(uint64_t first, int64_t count) = 0;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_BATCH_SOURCE_H_
