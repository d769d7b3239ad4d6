#ifndef CODISTILL_PREDSERVER_BATCH_INPUTS_H_
#define CODISTILL_PREDSERVER_BATCH_INPUTS_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/model/model.h"
#include "common/tensor/tensor.h"
#include "predserver/request_queue.h"
#include "proto/job.pb.h"

// What goes into a forward pass over several requests, and what comes out for each. Pure functions.
namespace codistill {

struct BatchInputs {
  std::vector<Tensor> inputs;  // by index in config.inputs
  Model::States states;        // by index in config.states
  int64_t examples = 0;
};

// The inputs of `requests`, one after the other, each byte copied once, from where it came into its
// place; what needs no copy (one request, contiguous and aligned) shares the request's memory.
// States that a request leaves out are zeros; those that all leave out are empty.
//
// `statuses` gets one for each request: INVALID_ARGUMENT names the input that has a NaN or an
// infinity: the prediction would be one too. If there is any, the result is of no use.
BatchInputs AssembleBatch(const ModelConfig& config,
                          absl::Span<const WaitingRequest* const> requests,
                          std::vector<absl::Status>* statuses);

// Rows [begin, begin + count) of dimension 0, sharing the tensor's memory.
Tensor RowRange(const Tensor& tensor, int64_t begin, int64_t count);

// Examples [begin, begin + count) of a state whose batch dimension is `dimension`: shares memory
// where they are contiguous, else a copy.
Tensor StateRange(const Tensor& state, int dimension, int64_t begin, int64_t count);

// The dimension that is -1.
int BatchDimension(const RecurrentState& state);

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_BATCH_INPUTS_H_
