#ifndef CODISTILL_PREDSERVER_INFERENCE_CODEC_H_
#define CODISTILL_PREDSERVER_INFERENCE_CODEC_H_

#include <string>

#include "absl/status/statusor.h"
#include "grpcpp/support/byte_buffer.h"
#include "predserver/prediction.h"

// ModelInferRequest and ModelInferResponse of the Open Inference Protocol
// (proto/open_inference.proto) on the wire: small fields through protobuf, tensors around it.
namespace codistill {

struct InferenceRequest {
  std::string id;  // echoed
  PredictionRequest prediction;
};

// Takes a request apart. Contents may be raw or typed; either way `prediction.owner` keeps them.
// Does not look at what is asked. INVALID_ARGUMENT if the bytes are no ModelInferRequest, or
// contents and inputs do not go together (names the field).
absl::StatusOr<InferenceRequest> DecodeInferenceRequest(grpc::ByteBuffer buffer);

// A response whose raw contents share the ownership of the prediction's tensors.
grpc::ByteBuffer EncodeInferenceResponse(const std::string& model, const std::string& id,
                                         const Prediction& prediction);

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_INFERENCE_CODEC_H_
