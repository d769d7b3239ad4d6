#ifndef CODISTILL_WORKER_TEACHER_BATCH_FIXTURE_H_
#define CODISTILL_WORKER_TEACHER_BATCH_FIXTURE_H_

#include <cstdint>

#include "common/tensor/tensor.h"
#include "worker/teacher_source.h"

// Batches for tests of teacher predictions: two rows of one input, FLOAT [1], whose model has three
// outputs.
namespace codistill {

inline constexpr int64_t kRows = 2;
inline constexpr int64_t kOutputs = 3;

inline TeacherBatch Batch(int64_t step, float input = 0, uint64_t generation = 1) {
  TeacherBatch batch;
  batch.generation = generation;
  batch.step = step;
  batch.example_hash = 1000 + step;
  Tensor x = Tensor::Allocate(DT_FLOAT, {kRows, 1});
  for (float& value : x.As<float>()) value = input;
  batch.inputs.push_back(x);
  batch.example_ids = Tensor::Zeros(DT_INT64, {kRows});
  batch.examples = kRows;
  batch.rows = kRows;
  return batch;
}

}  // namespace codistill

#endif  // CODISTILL_WORKER_TEACHER_BATCH_FIXTURE_H_
