#ifndef CODISTILL_WORKER_INFERENCE_MESSAGES_H_
#define CODISTILL_WORKER_INFERENCE_MESSAGES_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/tensor/tensor.h"
#include "grpcpp/support/byte_buffer.h"
#include "proto/job.pb.h"
#include "worker/teacher_source.h"

// A teacher's question and answer as messages of the Open Inference Protocol, version 2
// (proto/open_inference.proto): small fields through protobuf, tensors around it.
namespace codistill {

// How the servers of one teacher are spoken to. Default: as our own are.
struct TeacherDialect {
  std::string model;    // its name there: the teacher's group
  std::string version;  // that must answer; empty = the server's choice
  // What the inputs are called there, by index in ModelConfig.inputs; empty = as in the job.
  std::vector<std::string> inputs;
  std::string output = "logits";
  // `output` holds probabilities, which become logits whose softmax they are.
  bool probabilities = false;
  // Whether questions carry example_id and the parameters that our own servers know.
  bool codistill_server = true;

  // Whether answers need worker/external_answer.h.
  bool external() const { return !codistill_server || probabilities || output != "logits"; }
};

// What a teacher of ours is asked to answer with; others answer what they have.
struct AnswerFormat {
  DataType dtype = DT_FLOAT;  // as which logits or top-k values travel; DT_INT8: logits only
  int64_t top_k = 0;          // 0 = all logits
  double temperature = 1;     // of top-k values
};

// What codistillation.teacher_output, top_k and teacher_dtype say.
AnswerFormat AnswerFormatOf(const CodistillationConfig& config);

struct InferenceQuestion {
  std::shared_ptr<const TeacherDialect> dialect;
  std::shared_ptr<const ModelConfig> config;
  std::shared_ptr<const TeacherBatch> batch;
  // By index in config.states; an empty vector stands for zeros. Models without states: empty.
  std::vector<Tensor> states;
  int64_t max_staleness_steps = -1;  // negative: not asked for
  AnswerFormat format;
};

// The request's bytes. The tensors' bytes are not copied; the buffer shares their ownership.
grpc::ByteBuffer EncodeQuestion(const InferenceQuestion& question);

struct InferenceAnswer {
  // [rows, num_outputs], fp32 or, as they came, DT_HALF or DT_BFLOAT16; empty where top_k was asked
  // for.
  Tensor logits;
  TopKPrediction top_k;
  std::vector<Tensor> states;  // by index in config.states
  // Of the weights that answered and of their group; 0 where the server does not say (servers that
  // are not ours: a frozen teacher has no steps).
  uint64_t generation = 0;
  int64_t step = 0;
  int64_t latest_step = 0;

  int64_t staleness_steps() const { return latest_step > step ? latest_step - step : 0; }
};

// Parses an answer to `question`: output "logits" with rows x num_outputs values, or the top-k
// outputs, in the format that was asked for, and every recurrent state by name. Copies each tensor
// once, logits in 16-bit floats as they are, scaled integers and 16-bit top-k values as fp32.
// INVALID_ARGUMENT names the output that is missing or has another type, shape or length than it
// must, or the row of top-k that is no distribution.
absl::StatusOr<InferenceAnswer> DecodeAnswer(grpc::ByteBuffer* buffer,
                                             const InferenceQuestion& question);

}  // namespace codistill

#endif  // CODISTILL_WORKER_INFERENCE_MESSAGES_H_
