#ifndef CODISTILL_PREDSERVER_REQUEST_PARAMETERS_H_
#define CODISTILL_PREDSERVER_REQUEST_PARAMETERS_H_

#include "absl/status/status.h"
#include "predserver/inference_codec.h"
#include "proto/open_inference.pb.h"

namespace codistill {

// Reads the parameters of a request, its inputs and its outputs: those that
// proto/open_inference.proto gives a meaning go into `request`, those that mean nothing here are
// passed over. INVALID_ARGUMENT names the parameter that is unknown, has a value that is none of
// its kind, or asks for what is not offered. Whether a value fits the model is checked elsewhere
// (request_check.h).
absl::Status ReadParameters(const inference::ModelInferRequest& message, InferenceRequest* request);

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_REQUEST_PARAMETERS_H_
