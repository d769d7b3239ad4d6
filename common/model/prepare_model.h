#ifndef CODISTILL_COMMON_MODEL_PREPARE_MODEL_H_
#define CODISTILL_COMMON_MODEL_PREPARE_MODEL_H_

#include "absl/status/status.h"
#include "common/model/model.h"
#include "proto/job.pb.h"

// What stands between weights that have been read into a spare copy of a model and their first
// answer: verify, round, warm up. In place, without allocating anything of the weights' size. For
// the thread that loads.
namespace codistill {

// DATA_LOSS, naming the tensor and the place, if a parameter is not finite or a buffer has a NaN.
// Infinities in buffers are let be: masks are made of them.
absl::Status CheckWeights(const Model& model);

// Whether `weights` is a precision that RoundWeights knows: DT_FLOAT, DT_BFLOAT16 or DT_INT8;
// otherwise INVALID_ARGUMENT, naming the job's field.
absl::Status CheckPrecision(DataType weights);

// Rounds parameters of two or more dimensions; those of fewer (biases, norms) and buffers keep
// their precision, and so do embedding tables. DT_INT8: symmetric, one scale for each index of
// dimension 0, which is the output channel in torch's layers.
void RoundWeights(DataType weights, Model* model);

// The less precise of what weights are rounded to and what passes compute in, as answers name it:
// DT_INT8 weights in bfloat16 passes are DT_INT8.
DataType AnswerPrecision(DataType weights, Precision passes);

// One forward pass over an example of zeros, so that the first request does not pay for what a
// first pass does: faulting in and caching the weights. What libtorch prepares for a batch size it
// keeps for the process, not for the weights, so one size will do. DATA_LOSS if the logits are not
// finite, and are not either for ones where the model takes floats: weights that pass CheckWeights
// may still be so large that nothing can be computed with them. `config`: as forward() sees it.
absl::Status WarmUp(const ModelConfig& config, const Model& model);

// All three, before the last of which the weights are brought to the model's device.
absl::Status PrepareModel(const ModelConfig& config, DataType weights, Model* model);

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_PREPARE_MODEL_H_
