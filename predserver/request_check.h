#ifndef CODISTILL_PREDSERVER_REQUEST_CHECK_H_
#define CODISTILL_PREDSERVER_REQUEST_CHECK_H_

#include <string>
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
  int example_id = -1;  // index in request.inputs; -1: not given
  // Which outputs to give. A request that names none is given logits (its top-k instead where it
  // has a top_k) and all states.
  bool want_logits = true;
  bool want_logits_scale = false;  // exactly where logits are wanted as DT_INT8
  bool want_probabilities = false;
  bool want_top_k_index = false;
  bool want_top_k_value = false;
  bool want_tail_mass = false;
  std::vector<bool> want_states;

  bool want_top_k() const { return want_top_k_index || want_top_k_value || want_tail_mass; }
};

// Checks names, datatypes, shapes, lengths, the batch dimension, and that the outputs, their format
// and the model go together. INVALID_ARGUMENT names the field, what came and what would be right.
// Pure.
absl::StatusOr<RequestPlan> CheckRequest(const ModelConfig& config,
                                         const PredictionRequest& request);

// What the answer to a request takes and may take.
struct OutputLimits {
  // Of the tensors of a response. A message of 64 MiB has that much room beside all else.
  int64_t response_bytes = (int64_t{64} << 20) - (64 << 10);
  // Of the logits that a pass computes, whatever of them is asked for.
  int64_t logits_bytes = int64_t{512} << 20;
};

// INVALID_ARGUMENT, naming the input and how many examples there may be, if a checked request has
// more than fit the limits where each has so many rows of logits.
absl::Status CheckOutputBytes(const ModelConfig& config, const PredictionRequest& request,
                              const RequestPlan& plan, int64_t rows_per_example,
                              const OutputLimits& limits);

// An output that a model can give, as metadata tell it.
struct OutputDescription {
  std::string name;
  DataType dtype = DT_FLOAT;   // unless the request's format says otherwise
  std::vector<int64_t> shape;  // -1: depends on the request
};

// All outputs that requests may name: what depends on the kind of model, then its states.
std::vector<OutputDescription> DescribeOutputs(const ModelConfig& config);

// INVALID_ARGUMENT, naming the input, if a floating-point input has a NaN or an infinity, as the
// prediction would be one too, or a BOOL is neither 0 nor 1. `bytes` is whole elements.
absl::Status CheckValues(const std::string& input, DataType dtype, const void* data, size_t bytes);

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_REQUEST_CHECK_H_
