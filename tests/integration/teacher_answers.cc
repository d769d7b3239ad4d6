#include "tests/integration/teacher_answers.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/base/status.h"
#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"
#include "predserver/inference_codec.h"
#include "predserver/output_format.h"
#include "predserver/request_check.h"
#include "worker/loss_options.h"

namespace codistill {

std::vector<NamedFormat> AllAnswerFormats() {
  return {{"fp32", {DT_FLOAT, 0, 1}},         {"fp16", {DT_HALF, 0, 1}},
          {"bf16", {DT_BFLOAT16, 0, 1}},      {"int8", {DT_INT8, 0, 1}},
          {"topk16", {DT_FLOAT, 16, 1}},      {"topk64", {DT_FLOAT, 64, 1}},
          {"topk64_fp16", {DT_HALF, 64, 1}},  {"topk64_bf16", {DT_BFLOAT16, 64, 1}},
          {"topk256_fp16", {DT_HALF, 256, 1}}};
}

absl::StatusOr<TeacherExchange> AskAndAnswer(const std::shared_ptr<const ModelConfig>& config,
                                             const std::shared_ptr<const TeacherBatch>& batch,
                                             const AnswerFormat& format, const Tensor& logits,
                                             const Model::States& states) {
  InferenceQuestion question;
  auto dialect = std::make_shared<TeacherDialect>();
  dialect->model = "alpha";
  question.dialect = std::move(dialect);
  question.config = config;
  question.batch = batch;
  question.format = format;

  InferenceRequest request;
  CODISTILL_RETURN_IF_ERROR(DecodeInferenceRequest(EncodeQuestion(question), &request));
  CODISTILL_ASSIGN_OR_RETURN(const RequestPlan plan, CheckRequest(*config, request.prediction));
  Prediction prediction;
  CODISTILL_ASSIGN_OR_RETURN(prediction.outputs, FormatOutputs(logits, config->label_loss(), plan,
                                                               request.prediction.format));
  for (size_t i = 0; i < states.size(); ++i) {
    prediction.outputs.push_back({config->states(static_cast<int>(i)).name(), states[i]});
  }
  grpc::ByteBuffer response = EncodeInferenceResponse("alpha", request, prediction, nullptr);
  TeacherExchange exchange;
  exchange.response_bytes = response.Length();
  CODISTILL_ASSIGN_OR_RETURN(exchange.answer, DecodeAnswer(&response, question));
  return exchange;
}

Tensor Widened(const Tensor& logits) {
  if (logits.dtype() == DT_FLOAT) return logits;
  Tensor wide = Tensor::Allocate(DT_FLOAT, logits.shape());
  const auto* const narrow = static_cast<const uint16_t*>(logits.data());
  const auto n = static_cast<size_t>(logits.elements());
  float* const to = wide.As<float>().data();
  logits.dtype() == DT_HALF ? FromFloat16(narrow, n, to) : FromBfloat16(narrow, n, to);
  return wide;
}

absl::StatusOr<std::vector<double>> PsiGradient(const LossOptions& options, LossInputs inputs,
                                                const InferenceAnswer& teacher) {
  const int64_t elements = inputs.rows * inputs.classes;
  std::vector<float> with(elements), without(elements);
  inputs.gradient_scale = static_cast<double>(inputs.rows);
  LossOutputs outputs;
  outputs.gradient = without.data();
  CODISTILL_RETURN_IF_ERROR(ComputeLossCpu(options, inputs, &outputs, 2));
  DenseTeacher dense;
  TopKTeacher top_k;
  if (teacher.top_k.empty()) {
    dense = DenseTeacherOf(teacher.logits);
    inputs.teachers = absl::MakeConstSpan(&dense, 1);
  } else {
    top_k = TopKTeacherOf(teacher.top_k);
    inputs.topk_teachers = absl::MakeConstSpan(&top_k, 1);
  }
  inputs.teacher_weight = 1;
  outputs.gradient = with.data();
  CODISTILL_RETURN_IF_ERROR(ComputeLossCpu(options, inputs, &outputs, 2));
  std::vector<double> gradient(elements);
  for (int64_t i = 0; i < elements; ++i) gradient[i] = static_cast<double>(with[i]) - without[i];
  return gradient;
}

Cosines CosinesOf(const std::vector<double>& a, const std::vector<double>& b, int64_t rows) {
  const int64_t classes = static_cast<int64_t>(a.size()) / rows;
  double ab = 0, aa = 0, bb = 0, of_rows = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double row_ab = 0, row_aa = 0, row_bb = 0;
    for (int64_t i = r * classes; i < (r + 1) * classes; ++i) {
      row_ab += a[i] * b[i];
      row_aa += a[i] * a[i];
      row_bb += b[i] * b[i];
    }
    of_rows += row_ab / std::sqrt(row_aa * row_bb);
    ab += row_ab;
    aa += row_aa;
    bb += row_bb;
  }
  return {ab / std::sqrt(aa * bb), of_rows / static_cast<double>(rows)};
}

double SumOfDivergences(const float* a, const float* b, int64_t rows, int64_t classes) {
  double total = 0;
  for (int64_t r = 0; r < rows; ++r, a += classes, b += classes) {
    const double top = *std::max_element(a, a + classes);
    double a_sum = 0, b_sum = 0, difference = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const double e = std::exp(a[c] - top);
      a_sum += e;
      b_sum += std::exp(b[c] - top);
      difference += e * (static_cast<double>(a[c]) - b[c]);
    }
    total += difference / a_sum - std::log(a_sum) + std::log(b_sum);
  }
  return total;
}

}  // namespace codistill
