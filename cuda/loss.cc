#include "cuda/loss.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/parallel.h"
#include "common/base/status.h"
#include "cuda/loss_kernels.h"

namespace codistill {
namespace {

// A gradient beyond this will not be in the cache when it is used.
constexpr int64_t kCacheBytes = 8 << 20;
// Elements a thread should have, to be worth starting.
constexpr int64_t kElementsPerThread = 128 << 10;
// Elements of a block of the element-wise losses.
constexpr int64_t kBlockElements = 4096;

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

// How far from 1 probabilities may add up to: 16-bit floats have been rounded.
constexpr double kMassTolerance = 1e-2;

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
  if (std::abs(mass - 1) > kMassTolerance) {
    return absl::StrCat("has values and tail that add up to ", mass, "; want 1");
  }
  return "";
}

// Whether a row is in the sums.
bool Counts(const LossOptions& options, const LossInputs& inputs, int64_t row) {
  if (inputs.row_weights != nullptr && !(inputs.row_weights[row] > 0)) return false;
  return !options.ignored_label.has_value() || inputs.labels[row] != *options.ignored_label;
}

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

double WeightOf(const LossOptions& options, const LossInputs& inputs) {
  double sum = 0;
  for (int64_t row = 0; row < inputs.rows; ++row) {
    if (!Counts(options, inputs, row)) continue;
    sum += inputs.row_weights == nullptr ? 1 : inputs.row_weights[row];
  }
  return sum;
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

namespace {

absl::Status Supported(const LossOptions& options, const LossInputs& inputs) {
  bool plain = inputs.logits_format == NumberFormat::kFloat32 && inputs.row_weights == nullptr &&
               inputs.label_prior == nullptr && !options.ignored_label.has_value();
  for (const DenseTeacher& teacher : inputs.teachers) {
    plain =
        plain && teacher.format == NumberFormat::kFloat32 && teacher.kind == DenseTeacher::kLogits;
  }
  if (plain) return absl::OkStatus();
  return absl::UnimplementedError(
      "loss: only float32 logits, of students and teachers, every row counting alike");
}

}  // namespace

absl::Status ComputeLossCpu(const LossOptions& options, const LossInputs& inputs,
                            LossOutputs* outputs, int threads) {
  CODISTILL_RETURN_IF_ERROR(ValidateLoss(options, inputs));
  const bool softmax = options.label_loss == LossOptions::kSoftmaxCrossEntropy;
  if (softmax) CODISTILL_RETURN_IF_ERROR(ValidateLabels(options, inputs));
  if (inputs.row_weights != nullptr) CODISTILL_RETURN_IF_ERROR(ValidateWeights(inputs));
  if (inputs.label_prior != nullptr) CODISTILL_RETURN_IF_ERROR(ValidatePrior(inputs));
  CODISTILL_RETURN_IF_ERROR(Supported(options, inputs));
  for (size_t t = 0; inputs.teacher_weight > 0 && t < inputs.topk_teachers.size(); ++t) {
    CODISTILL_RETURN_IF_ERROR(
        Annotate(CheckTopKTeacher(inputs.topk_teachers[t], inputs.rows, inputs.classes, threads),
                 absl::StrCat("loss: topk_teachers ", t)));
  }

  const int64_t block_rows = softmax ? 1 : std::max<int64_t>(1, kBlockElements / inputs.classes);
  const int64_t blocks = (inputs.rows + block_rows - 1) / block_rows;
  std::vector<double> label_loss(blocks), teacher_loss(blocks);
  std::vector<int64_t> correct(blocks);

  internal::LossWork work;
  work.options = &options;
  work.inputs = &inputs;
  work.teach = inputs.teacher_weight > 0;
  std::vector<const float*> teachers;
  for (const DenseTeacher& teacher : inputs.teachers) {
    teachers.push_back(static_cast<const float*>(teacher.values));
  }
  work.logits = static_cast<const float*>(inputs.logits);
  work.teachers = teachers;
  work.row_scale = inputs.gradient_scale / static_cast<double>(inputs.rows);
  work.gradient = static_cast<float*>(outputs->gradient);
  work.bypass_cache =
      inputs.rows * inputs.classes >= kCacheBytes / static_cast<int64_t>(sizeof(float));
  work.block_rows = block_rows;
  work.label_loss = label_loss.data();
  work.teacher_loss = teacher_loss.data();
  work.correct = correct.data();

  const int64_t grain = 1 + kElementsPerThread / (block_rows * inputs.classes);
  ParallelFor(threads, blocks, grain, [&work, softmax](int64_t begin, int64_t end) {
    if (softmax) {
      internal::SoftmaxLoss(work, begin, end);
    } else {
      internal::ElementwiseLoss(work, begin, end);
    }
  });

  // In order of rows, whichever thread computed them.
  outputs->sums = LossSums();
  for (int64_t i = 0; i < blocks; ++i) {
    outputs->sums.label_loss_sum += label_loss[i];
    outputs->sums.teacher_loss_sum += teacher_loss[i];
    outputs->sums.correct += correct[i];
  }
  outputs->sums.counted_rows = inputs.rows;
  outputs->sums.weight_sum = WeightOf(options, inputs);
  outputs->finite =
      std::isfinite(outputs->sums.label_loss_sum) && std::isfinite(outputs->sums.teacher_loss_sum);
  for (int64_t i = 0; !outputs->finite && i < blocks; ++i) {
    if (std::isfinite(label_loss[i]) && std::isfinite(teacher_loss[i])) continue;
    return Invalid(std::isfinite(label_loss[i]) ? "teachers" : "logits",
                   absl::StrCat("make a loss that is not finite in row ", i * block_rows,
                                block_rows > 1 ? " or one of those behind it" : ""));
  }
  return absl::OkStatus();
}

}  // namespace codistill
