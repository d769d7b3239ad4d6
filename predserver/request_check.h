#ifndef CODISTILL_PREDSERVER_REQUEST_CHECK_H_
#define CODISTILL_PREDSERVER_REQUEST_CHECK_H_

#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/tensor/tensor.h"
#include "predserver/prediction.h"
#include "proto/job.pb.h"

namespace codistill {

// Where in a request everything is that a forward pass needs: indices in request.inputs, by index
// in config.inputs and config.states (-1: the state is absent and starts from zeros).
struct RequestPlan {
  int64_t batch = 0;
  std::vector<int> inputs;
  std::vector<int> states;
  bool want_logits = true;
  std::vector<bool> want_states;
};

// Checks names, datatypes, shapes, lengths and the batch dimension. INVALID_ARGUMENT names the
// field, what came and what would be right. Pure.
absl::StatusOr<RequestPlan> CheckRequest(const ModelConfig& config,
                                         const PredictionRequest& request);

// A checked input as a tensor of its own (one copy). INVALID_ARGUMENT if a floating-point input has
// a NaN or an infinity: the prediction would be one too.
absl::StatusOr<Tensor> ReadInput(const PredictionRequest::Input& input);

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_REQUEST_CHECK_H_
