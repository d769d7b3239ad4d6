#ifndef CODISTILL_COMMON_MODEL_ROW_BATCH_H_
#define CODISTILL_COMMON_MODEL_ROW_BATCH_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/tensor/tensor.h"
#include "proto/job.pb.h"

namespace codistill {

// The keys of one batch in one embedding table, each once, in the order in which they first occur:
// what is pulled before the forward pass and pushed after the backward pass.
struct RowBatch {
  int table = 0;  // index in model.embedding_tables
  int64_t dim = 0;
  std::vector<uint64_t> keys;

  // Where an input's values are: one entry a value, an index in `keys`.
  struct Use {
    int input = 0;  // index in model.inputs
    std::vector<uint32_t> index;
  };
  std::vector<Use> uses;

  int64_t floats() const { return static_cast<int64_t>(keys.size()) * dim; }
};

// The key of a value in an input's table: the value itself, or mixed with the field and the column
// (position in one example) it stands in (ModelInput.shared_keys).
uint64_t RowKey(const ModelInput& input, int64_t value, int64_t column);

// The keys of a batch, one RowBatch for every table that an input names, by table. `inputs` are
// those of the job, with INT64 values where there is a table (checked by CheckInputs).
std::vector<RowBatch> FindRows(const ModelConfig& model, absl::Span<const Tensor> inputs);

// The inputs of forward(): those of the job, and for each with a table the rows of its values,
// FLOAT [B, shape..., dim]. `rows[i]` has the rows of batches[i].keys in their order.
std::vector<Tensor> GatherRows(absl::Span<const Tensor> inputs, absl::Span<const RowBatch> batches,
                               absl::Span<const float* const> rows);

// The gradient of the rows of `batch`, FLOAT [keys, dim]: the sum over the places where each
// occurs, in the order of the batch. `of_inputs[use.input]` is the gradient of that input of
// forward().
Tensor ScatterGradients(const RowBatch& batch, absl::Span<const Tensor> of_inputs);

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_ROW_BATCH_H_
