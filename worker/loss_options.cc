#include "worker/loss_options.h"

namespace codistill {

LossOptions LabelLossOptionsOf(const JobConfig& job) {
  LossOptions options;
  switch (job.model().label_loss()) {
    case SOFTMAX_CROSS_ENTROPY:
      options.label_loss = LossOptions::kSoftmaxCrossEntropy;
      break;
    case SIGMOID_CROSS_ENTROPY:
      options.label_loss = LossOptions::kSigmoidCrossEntropy;
      break;
    case SQUARED_ERROR:
      options.label_loss = LossOptions::kSquaredError;
      break;
  }
  if (job.model().has_ignored_label()) options.ignored_label = job.model().ignored_label();
  return options;
}

LossOptions LossOptionsOf(const JobConfig& job) {
  LossOptions options = LabelLossOptionsOf(job);
  options.label_smoothing = job.model().label_smoothing();
  const CodistillationConfig& codistillation = job.codistillation();
  switch (codistillation.teacher_loss()) {
    case CodistillationConfig::SOFT_CROSS_ENTROPY:
      options.teacher_loss = LossOptions::kSoftCrossEntropy;
      break;
    case CodistillationConfig::KL_TEACHER_STUDENT:
      options.teacher_loss = LossOptions::kKlTeacherStudent;
      break;
    case CodistillationConfig::KL_STUDENT_TEACHER:
      options.teacher_loss = LossOptions::kKlStudentTeacher;
      break;
    case CodistillationConfig::SQUARED_ERROR_LOGITS:
      options.teacher_loss = LossOptions::kSquaredErrorLogits;
      break;
  }
  options.temperature = codistillation.temperature();
  options.teacher_average = codistillation.average() == CodistillationConfig::LOGITS
                                ? LossOptions::kLogits
                                : LossOptions::kProbabilities;
  return options;
}

DenseTeacher DenseTeacherOf(const Tensor& logits) {
  DenseTeacher teacher;
  teacher.values = logits.data();
  teacher.format = logits.dtype() == DT_HALF       ? NumberFormat::kFloat16
                   : logits.dtype() == DT_BFLOAT16 ? NumberFormat::kBfloat16
                                                   : NumberFormat::kFloat32;
  return teacher;
}

TopKTeacher TopKTeacherOf(const TopKPrediction& prediction) {
  TopKTeacher teacher;
  teacher.index = prediction.index.As<int32_t>().data();
  teacher.value = prediction.value.As<float>().data();
  teacher.tail = prediction.tail.As<float>().data();
  teacher.k = prediction.index.shape()[1];
  return teacher;
}

}  // namespace codistill
