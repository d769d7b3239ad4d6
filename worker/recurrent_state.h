#ifndef CODISTILL_WORKER_RECURRENT_STATE_H_
#define CODISTILL_WORKER_RECURRENT_STATE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/tensor/tensor.h"
#include "proto/job.pb.h"

namespace codistill {

// Recurrent state of a student after one of its steps. It continues a text only with the step that
// follows; anything else starts from zeros.
struct RecurrentStateAfter {
  int64_t step = -1;           // -1 = after none
  std::vector<Tensor> states;  // by index in model.states; empty = zeros

  // What the batch of `next_step` starts from.
  std::vector<Tensor> For(int64_t next_step, bool starts_epoch) const {
    return !starts_epoch && step + 1 == next_step ? states : std::vector<Tensor>();
  }
};

// The state as a worker leaves it with a checkpoint (message SavedWorkerState), and back. Decoding
// INVALID_ARGUMENT: not such a blob, or of a model with other states (names the state).
std::string EncodeWorkerState(const ModelConfig& config, const RecurrentStateAfter& state);
absl::StatusOr<RecurrentStateAfter> DecodeWorkerState(const ModelConfig& config,
                                                      const std::string& blob);

}  // namespace codistill

#endif  // CODISTILL_WORKER_RECURRENT_STATE_H_
