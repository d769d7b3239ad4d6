// What is wrong with options and inputs of the loss, as far as that can be said before the pass.

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/parallel.h"
#include "common/base/status.h"
#include "cuda/loss.h"
#include "cuda/loss_kernels.h"

namespace codistill {
namespace {

// Values of a top-k teacher that a thread should check, to be worth starting.
constexpr int64_t kElementsPerThread = 128 << 10;

absl::Status Invalid(absl::string_view field, const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat("loss: ", field, " ", problem));
}

// What can be said of top-k teachers without their arrays.
absl::Status ValidateTopK(const LossOptions& options, const LossInputs& inputs) {
  if (inputs.topk_teachers.empty()) return absl::OkStatus();
  if (options.label_loss != LossOptions::kSoftmaxCrossEntropy) {
    return Invalid("topk_teachers", "name classes; want the softmax cross-entropy as label loss");
  }
  if (options.teacher_loss != LossOptions::kSoftCrossEntropy &&
      options.teacher_loss != LossOptions::kKlTeacherStudent) {
    return Invalid("teacher_loss",
                   "needs what teachers say of every class, and some name a few only "
                   "(topk_teachers); want the soft cross-entropy or KL(teacher || student)");
  }
  if (options.teacher_average != LossOptions::kProbabilities) {
    return Invalid("teacher_average",
                   "is of logits, which topk_teachers do not give; want probabilities");
  }
  for (size_t t = 0; t < inputs.topk_teachers.size(); ++t) {
    const TopKTeacher& teacher = inputs.topk_teachers[t];
    if (teacher.k < 1 || teacher.k > inputs.classes) {
      return Invalid("topk_teachers",
                     absl::StrCat(t, ": k is ", teacher.k, "; want 1 to ", inputs.classes));
    }
    const bool complete = teacher.index != nullptr && teacher.value != nullptr &&
                          (teacher.tail != nullptr || teacher.k == inputs.classes);
    if (!complete) {
      return Invalid("topk_teachers", absl::StrCat(t, ": index, value or tail is null"));
    }
  }
  return absl::OkStatus();
}

// What is wrong with a row of a teacher; empty if nothing. `seen` has a place for each class, none
// of which holds `stamp` yet.
std::string WrongInRow(const TopKTeacher& teacher, int64_t row, int64_t classes, int32_t stamp,
                       std::vector<int32_t>* seen) {
  double mass = 0;
  for (int64_t i = row * teacher.k; i < (row + 1) * teacher.k; ++i) {
    const int32_t c = teacher.index[i];
    if (c < 0 || c >= classes) {
      return absl::StrCat("has the index ", c, "; want 0 to ", classes - 1);
    }
    if ((*seen)[c] == stamp) return absl::StrCat("names class ", c, " twice");
    (*seen)[c] = stamp;
    if (!(teacher.value[i] >= 0 && std::isfinite(teacher.value[i]))) {
      return absl::StrCat("has the value ", teacher.value[i], "; want a probability");
    }
    mass += teacher.value[i];
  }
  if (teacher.k < classes) {
    const float tail = teacher.tail[row];
    if (!(tail >= 0 && std::isfinite(tail))) {
      return absl::StrCat("has the tail mass ", tail, "; want a probability");
    }
    mass += tail;
  }
  if (std::abs(mass - 1) > internal::kMassTolerance) {
    return absl::StrCat("has values and tail that add up to ", mass, "; want 1");
  }
  return "";
}

absl::Status ValidateTeachers(const LossOptions& options, const LossInputs& inputs) {
  for (size_t k = 0; k < inputs.teachers.size(); ++k) {
    const DenseTeacher& teacher = inputs.teachers[k];
    if (teacher.values == nullptr) return Invalid("teachers", absl::StrCat(k, " is null"));
    if (teacher.format == NumberFormat::kInt8 && teacher.scale == nullptr) {
      return Invalid("teachers", absl::StrCat(k, ": scale is null; int8 needs one a row"));
    }
    if (teacher.kind != DenseTeacher::kProbabilities) continue;
    if (teacher.format == NumberFormat::kInt8) {
      return Invalid("teachers", absl::StrCat(k, ": int8 is for logits, not for probabilities"));
    }
    if (options.teacher_loss == LossOptions::kSquaredErrorLogits) {
      return Invalid("teacher_loss", absl::StrCat("needs logits, and teacher ", k,
                                                  " gives probabilities; want another one"));
    }
    if (options.teacher_average == LossOptions::kLogits) {
      return Invalid("teacher_average", absl::StrCat("is of logits, and teacher ", k,
                                                     " gives probabilities; want probabilities"));
    }
  }
  return ValidateTopK(options, inputs);
}

}  // namespace

absl::Status ValidateLossOptions(const LossOptions& options, int64_t classes, bool teach) {
  if (!(options.label_smoothing >= 0 && options.label_smoothing < 1)) {
    return Invalid("label_smoothing", absl::StrCat("is ", options.label_smoothing,
                                                   "; want at least 0 and less than 1"));
  }
  if (options.label_smoothing > 0 && options.label_loss == LossOptions::kSquaredError) {
    return Invalid("label_smoothing", "has no meaning for the squared error; want 0");
  }
  if (!(options.temperature > 0 && std::isfinite(options.temperature))) {
    return Invalid("temperature", absl::StrCat("is ", options.temperature, "; want more than 0"));
  }
  if (options.ignored_label.has_value() &&
      options.label_loss != LossOptions::kSoftmaxCrossEntropy) {
    return Invalid("ignored_label",
                   "needs a label a row; want the softmax cross-entropy as label loss");
  }
  if (classes < 1) return Invalid("classes", absl::StrCat("is ", classes, "; want at least 1"));
  if (teach && options.label_loss == LossOptions::kSquaredError &&
      options.teacher_loss != LossOptions::kSquaredErrorLogits) {
    return Invalid("teacher_loss",
                   "needs probabilities, which the squared error as label loss does not have; "
                   "want the squared error of logits");
  }
  return absl::OkStatus();
}

absl::Status ValidateLoss(const LossOptions& options, const LossInputs& inputs) {
  const bool softmax = options.label_loss == LossOptions::kSoftmaxCrossEntropy;
  const bool teach = inputs.teacher_weight > 0;
  CODISTILL_RETURN_IF_ERROR(ValidateLossOptions(options, inputs.classes, teach));
  if (inputs.rows < 1) {
    return Invalid("rows", absl::StrCat("is ", inputs.rows, "; want at least 1"));
  }
  if (!(inputs.teacher_weight >= 0 && std::isfinite(inputs.teacher_weight))) {
    return Invalid("teacher_weight",
                   absl::StrCat("is ", inputs.teacher_weight, "; want 0 or more"));
  }
  if (!std::isfinite(inputs.gradient_scale)) return Invalid("gradient_scale", "is not finite");
  if (inputs.logits_format != NumberFormat::kFloat32 &&
      inputs.logits_format != NumberFormat::kBfloat16) {
    return Invalid("logits_format",
                   absl::StrCat("is ", NameOf(inputs.logits_format), "; want float32 or bfloat16"));
  }
  if (inputs.logits == nullptr) return Invalid("logits", "is null");
  if (softmax && inputs.labels == nullptr) return Invalid("labels", "is null");
  if (!softmax && inputs.targets == nullptr) return Invalid("targets", "is null");
  if (!softmax && inputs.label_prior != nullptr) {
    return Invalid("label_prior", "is of classes; want the softmax cross-entropy as label loss");
  }
  if (!teach) return absl::OkStatus();
  if (inputs.teachers.empty() && inputs.topk_teachers.empty()) {
    return Invalid("teacher_weight", absl::StrCat("is ", inputs.teacher_weight,
                                                  " but there are no teachers; want 0"));
  }
  return ValidateTeachers(options, inputs);
}

absl::Status CheckTopKTeacher(const TopKTeacher& teacher, int64_t rows, int64_t classes,
                              int threads) {
  std::vector<std::string> wrong(rows);
  const int64_t grain = 1 + kElementsPerThread / std::max<int64_t>(1, teacher.k);
  ParallelFor(threads, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> seen(classes, -1);
    for (int64_t row = begin; row < end; ++row) {
      wrong[row] = WrongInRow(teacher, row, classes, static_cast<int32_t>(row - begin), &seen);
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    if (!wrong[row].empty()) {
      return absl::InvalidArgumentError(absl::StrCat("row ", row, " ", wrong[row]));
    }
  }
  return absl::OkStatus();
}

namespace internal {
namespace {

absl::Status ValidateLabels(const LossOptions& options, const LossInputs& inputs) {
  for (int64_t row = 0; row < inputs.rows; ++row) {
    const int64_t label = inputs.labels[row];
    if (options.ignored_label.has_value() && label == *options.ignored_label) continue;
    if (label < 0 || label >= inputs.classes) {
      return Invalid("labels", absl::StrCat("holds ", label, " in row ", row, "; want 0 to ",
                                            inputs.classes - 1));
    }
  }
  return absl::OkStatus();
}

// How far from 1 a prior may add up to.
constexpr double kPriorTolerance = 1e-3;

absl::Status ValidatePrior(const LossInputs& inputs) {
  double sum = 0;
  for (int64_t c = 0; c < inputs.classes; ++c) {
    const float value = inputs.label_prior[c];
    if (!(value >= 0 && std::isfinite(value))) {
      return Invalid("label_prior",
                     absl::StrCat("holds ", value, " for class ", c, "; want a probability"));
    }
    sum += value;
  }
  if (std::abs(sum - 1) > kPriorTolerance) {
    return Invalid("label_prior", absl::StrCat("adds up to ", sum, "; want 1"));
  }
  return absl::OkStatus();
}

absl::Status ValidateWeights(const LossInputs& inputs) {
  for (int64_t row = 0; row < inputs.rows; ++row) {
    const float weight = inputs.row_weights[row];
    if (!(weight >= 0 && std::isfinite(weight))) {
      return Invalid("row_weights", absl::StrCat("holds ", weight, " in row ", row,
                                                 "; want a finite number, 0 or more"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateArrays(const LossOptions& options, const LossInputs& inputs, int threads) {
  if (options.label_loss == LossOptions::kSoftmaxCrossEntropy) {
    CODISTILL_RETURN_IF_ERROR(ValidateLabels(options, inputs));
  }
  if (inputs.row_weights != nullptr) CODISTILL_RETURN_IF_ERROR(ValidateWeights(inputs));
  if (inputs.label_prior != nullptr) CODISTILL_RETURN_IF_ERROR(ValidatePrior(inputs));
  if (!(inputs.teacher_weight > 0)) return absl::OkStatus();
  for (size_t t = 0; t < inputs.topk_teachers.size(); ++t) {
    CODISTILL_RETURN_IF_ERROR(
        Annotate(CheckTopKTeacher(inputs.topk_teachers[t], inputs.rows, inputs.classes, threads),
                 absl::StrCat("loss: topk_teachers ", t)));
  }
  return absl::OkStatus();
}

}  // namespace internal
}  // namespace codistill
