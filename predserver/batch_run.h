#ifndef CODISTILL_PREDSERVER_BATCH_RUN_H_
#define CODISTILL_PREDSERVER_BATCH_RUN_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/base/clock.h"
#include "common/model/model.h"
#include "common/tensor/tensor.h"
#include "predserver/request_queue.h"
#include "proto/job.pb.h"

namespace codistill {

// What a forward pass gave one request.
struct Computed {
  Tensor logits;         // of its examples, FP32 [rows, num_outputs]; shares the pass's memory
  Model::States states;  // by index in config.states
};

// A forward pass that succeeded.
struct PassTimes {
  int64_t requests = 0;
  int64_t examples = 0;
  absl::Duration input;  // putting the batch together
  absl::Duration infer;
};

// Computes `requests` together, each result as if it had been alone: one whose values are not
// usable gets INVALID_ARGUMENT and the others go on without it; where the pass itself fails with
// INVALID_ARGUMENT (ids out of range, say), halves are tried until the guilty ones are found.
// Results by request. Pure but for the clock.
std::vector<absl::StatusOr<Computed>> ComputeBatch(const ModelConfig& config, const Model& model,
                                                   absl::Span<const WaitingRequest* const> requests,
                                                   Clock* clock, std::vector<PassTimes>* passes);

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_BATCH_RUN_H_
