#ifndef CODISTILL_TESTS_INTEGRATION_TEACHER_ANSWERS_H_
#define CODISTILL_TESTS_INTEGRATION_TEACHER_ANSWERS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/model/model.h"
#include "common/tensor/tensor.h"
#include "cuda/loss.h"
#include "proto/job.pb.h"
#include "worker/inference_messages.h"
#include "worker/teacher_source.h"

// What a teacher's answer loses by travelling in fewer bytes: questions and answers as on the wire,
// and how far what was decoded, and the gradient it gives, are from what was computed.
namespace codistill {

struct NamedFormat {
  std::string name;
  AnswerFormat format;
};

// "fp32" first, then narrower logits ("fp16", "bf16", "int8") and top-k ("topk64", ...).
std::vector<NamedFormat> AllAnswerFormats();

struct TeacherExchange {
  size_t response_bytes = 0;  // of the encoded message
  InferenceAnswer answer;
};

// A worker's question about `batch` in `format`, encoded, taken apart and checked as a prediction
// server of `config` does, answered with `logits` ([rows, num_outputs]) and `states` as what the
// model computed, encoded and decoded again.
absl::StatusOr<TeacherExchange> AskAndAnswer(const std::shared_ptr<const ModelConfig>& config,
                                             const std::shared_ptr<const TeacherBatch>& batch,
                                             const AnswerFormat& format, const Tensor& logits,
                                             const Model::States& states);

// A teacher's logits as fp32, in whatever they came.
Tensor Widened(const Tensor& logits);

// The gradient of psi alone by the student's logits, a row at weight 1: that of phi + psi less that
// of phi. `inputs` has logits and labels.
absl::StatusOr<std::vector<double>> PsiGradient(const LossOptions& options, LossInputs inputs,
                                                const InferenceAnswer& teacher);

struct Cosines {
  double whole = 0;     // of two gradients as one vector each
  double row_mean = 0;  // mean over rows of the rows' own
};
Cosines CosinesOf(const std::vector<double>& a, const std::vector<double>& b, int64_t rows);

// Sum over rows of KL(softmax(a) || softmax(b)).
double SumOfDivergences(const float* a, const float* b, int64_t rows, int64_t classes);

}  // namespace codistill

#endif  // CODISTILL_TESTS_INTEGRATION_TEACHER_ANSWERS_H_
