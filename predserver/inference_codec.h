#ifndef CODISTILL_PREDSERVER_INFERENCE_CODEC_H_
#define CODISTILL_PREDSERVER_INFERENCE_CODEC_H_

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "grpcpp/support/byte_buffer.h"
#include "predserver/prediction.h"

// ModelInferRequest, ModelInferResponse and ModelStreamInferResponse of the Open Inference Protocol
// (proto/open_inference.proto) on the wire: small fields through protobuf, tensors around it.
namespace codistill {

struct InferenceRequest {
  std::string id;  // echoed
  // For how long the client wants an answer, counted from now, besides the call's own deadline.
  absl::Duration timeout = absl::InfiniteDuration();
  // On a stream: the client wants to be told that an answer is the last one to its request.
  bool mark_final = false;
  PredictionRequest prediction;
};

// What a request says of itself before its tensors, without taking it apart: empty where that is
// not found at the beginning of the first slice, where encoders put it.
struct RequestHead {
  std::string model;
  std::string id;
};
RequestHead PeekHead(const grpc::ByteBuffer& buffer);

// Bytes that a request's id may have. It is sent back with every answer.
inline constexpr size_t kMaxIdBytes = 4096;

// Takes a request apart. Contents may be raw or typed; either way `prediction.owner` keeps them.
// Does not look at what the model takes. INVALID_ARGUMENT if the bytes are no ModelInferRequest,
// contents and inputs do not go together, or a parameter is unknown or makes no sense (names the
// field); then only request->id is set, as far as it could be read.
absl::Status DecodeInferenceRequest(grpc::ByteBuffer buffer, InferenceRequest* request);

// A response whose raw contents share the ownership of the prediction's tensors, and of `hold`
// (which may be null), until gRPC lets go of them.
grpc::ByteBuffer EncodeInferenceResponse(const std::string& model, const InferenceRequest& request,
                                         const Prediction& prediction,
                                         const std::shared_ptr<const void>& hold);
// Bytes of the prediction's tensors.
size_t ResponseBytes(const Prediction& prediction);

// The same response as a message of a stream.
grpc::ByteBuffer EncodeStreamResponse(const grpc::ByteBuffer& response);
// A message of a stream that tells why the request `id` failed. Stock clients show the text only,
// so it names the request. A long text is cut off, as that of a status is (ToGrpcStatus).
grpc::ByteBuffer EncodeStreamError(const std::string& id, const absl::Status& status);

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_INFERENCE_CODEC_H_
