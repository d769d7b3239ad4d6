#ifndef CODISTILL_COMMON_MODEL_INPUTS_H_
#define CODISTILL_COMMON_MODEL_INPUTS_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/tensor/tensor.h"
#include "proto/job.pb.h"

// What a job says about the arguments of a model's forward(). Pure functions.
namespace codistill {

// Number of examples in a batch, given the model's inputs in the job's order. INVALID_ARGUMENT
// names the input whose dtype or shape is not the job's, or whose batch dimension differs from the
// first input's.
absl::StatusOr<int64_t> CheckInputs(const ModelConfig& config, absl::Span<const Tensor> inputs);

// Shape of a recurrent state for a batch: the declared one with `batch` in place of -1.
std::vector<int64_t> StateShape(const RecurrentState& state, int64_t batch);

// INVALID_ARGUMENT unless `states` is empty or has one tensor (FP32, of the state's shape; or
// empty) for each state of the job.
absl::Status CheckStates(const ModelConfig& config, absl::Span<const Tensor> states, int64_t batch);

// What a validated job cannot lack: an input, distinct names, one -1 in each state's shape.
absl::Status CheckModelConfig(const ModelConfig& config);

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_INPUTS_H_
