#ifndef CODISTILL_WORKER_EXTERNAL_ANSWER_H_
#define CODISTILL_WORKER_EXTERNAL_ANSWER_H_

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/tensor/tensor.h"
#include "grpcpp/support/byte_buffer.h"
#include "proto/job.pb.h"
#include "worker/inference_messages.h"

// Answers of servers of the Open Inference Protocol, version 2, that are not known to be ours.
namespace codistill {

// Parses an answer to `question` in its dialect: the named output with rows x num_outputs values,
// FP32 or FP16, raw or (FP32) typed, and every recurrent state by name, FP32. Probabilities become
// logits (LogitsOfProbabilities). Where the dialect's server is one of ours the answer's version is
// read too; others are never stale. INVALID_ARGUMENT names what is missing or is not what it must
// be, a model or version that was not asked for included.
absl::StatusOr<InferenceAnswer> DecodeExternalAnswer(grpc::ByteBuffer* buffer,
                                                     const InferenceQuestion& question);

// Turns probabilities at temperature 1 into logits, in place: log p, with p at least 1e-10, so that
// softmax(logits / T) is p sharpened or flattened exactly as the teacher's own logits would be
// (they differ from log p by a constant a row). A single output of SIGMOID_CROSS_ENTROPY becomes
// log(p / (1 - p)), with p and 1 - p at least 1e-10. INVALID_ARGUMENT names a value that is no
// probability.
absl::Status LogitsOfProbabilities(LabelLoss label_loss, absl::Span<float> values);

}  // namespace codistill

#endif  // CODISTILL_WORKER_EXTERNAL_ANSWER_H_
