#ifndef CODISTILL_WORKER_BATCH_PART_H_
#define CODISTILL_WORKER_BATCH_PART_H_

#include <cstdint>
#include <vector>

#include "common/model/model.h"
#include "common/tensor/tensor.h"
#include "proto/job.pb.h"
#include "worker/batch_source.h"
#include "worker/teacher_source.h"

// A batch in parts that are computed one after another (training.micro_batches). What has its
// examples first is cut without copying.
namespace codistill {

// Consecutive examples of a batch, and what belongs to them in its logits.
struct BatchPart {
  int64_t first = 0;  // example
  int64_t examples = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
};

// `parts` parts, or one an example where that is fewer, of sizes that differ by one at most. `rows`
// is a multiple of `examples`; both at least 1.
std::vector<BatchPart> SplitBatch(int64_t examples, int64_t rows, int64_t parts);

// Of `total` examples or rows, as many as `tensor` holds in row-major order whatever its dimensions
// (labels of a text are [lanes, unroll]), those from `first` on: [count, ...] over the same bytes.
// An empty tensor stays one.
Tensor Slice(const Tensor& tensor, int64_t total, int64_t first, int64_t count);
TopKPrediction Slice(const TopKPrediction& prediction, int64_t total, int64_t first, int64_t count);

// Recurrent states of the part's examples: copies, because the batch need not be the first
// dimension, unless the part is the whole batch. No states stay none.
Model::States CutStates(const ModelConfig& config, const Model::States& states,
                        const BatchPart& part);

// Puts the states of a part into those of a batch of `examples`, which are made at the first part;
// where that is the whole batch they are taken as they are.
void PutStates(const ModelConfig& config, const BatchPart& part, const Model::States& states,
               int64_t examples, Model::States* whole);

// The same for a tensor whose first dimension are the examples; an empty part leaves `whole` empty.
void PutExamples(const BatchPart& part, const Tensor& tensor, int64_t examples, Tensor* whole);

}  // namespace codistill

#endif  // CODISTILL_WORKER_BATCH_PART_H_
