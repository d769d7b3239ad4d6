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
    if (inputs.rows > 0 && !complete) {
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

absl::Status ValidateLabels(const LossInputs& inputs) {
  for (int64_t row = 0; row < inputs.rows; ++row) {
    const int64_t label = inputs.labels[row];
    if (label < 0 || label >= inputs.classes) {
      return Invalid("labels", absl::StrCat("holds ", label, " in row ", row, "; want 0 to ",
                                            inputs.classes - 1));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateLoss(const LossOptions& options, const LossInputs& inputs) {
  const bool softmax = options.label_loss == LossOptions::kSoftmaxCrossEntropy;
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
  if (inputs.rows < 0) return Invalid("rows", absl::StrCat("is ", inputs.rows));
  if (inputs.classes < 1) {
    return Invalid("classes", absl::StrCat("is ", inputs.classes, "; want at least 1"));
  }
  if (!(inputs.teacher_weight >= 0 && std::isfinite(inputs.teacher_weight))) {
    return Invalid("teacher_weight",
                   absl::StrCat("is ", inputs.teacher_weight, "; want 0 or more"));
  }
  if (!std::isfinite(inputs.gradient_scale)) return Invalid("gradient_scale", "is not finite");
  if (inputs.teacher_weight > 0) {
    if (inputs.teachers.empty() && inputs.topk_teachers.empty()) {
      return Invalid("teacher_weight", absl::StrCat("is ", inputs.teacher_weight,
                                                    " but there are no teachers; want 0"));
    }
    if (options.label_loss == LossOptions::kSquaredError &&
        options.teacher_loss != LossOptions::kSquaredErrorLogits) {
      return Invalid("teacher_loss",
                     "needs probabilities, which the squared error as label loss does not have; "
                     "want the squared error of logits");
    }
    CODISTILL_RETURN_IF_ERROR(ValidateTopK(options, inputs));
  }
  if (inputs.rows == 0) return absl::OkStatus();
  if (inputs.logits == nullptr) return Invalid("logits", "is null");
  if (softmax && inputs.labels == nullptr) return Invalid("labels", "is null");
  if (!softmax && inputs.targets == nullptr) return Invalid("targets", "is null");
  for (size_t k = 0; k < inputs.teachers.size(); ++k) {
    if (inputs.teachers[k] == nullptr) return Invalid("teachers", absl::StrCat(k, " is null"));
  }
  return absl::OkStatus();
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

absl::Status ComputeLossCpu(const LossOptions& options, const LossInputs& inputs,
                            LossOutputs* outputs, int threads) {
  CODISTILL_RETURN_IF_ERROR(ValidateLoss(options, inputs));
  const bool softmax = options.label_loss == LossOptions::kSoftmaxCrossEntropy;
  if (softmax) CODISTILL_RETURN_IF_ERROR(ValidateLabels(inputs));
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
  work.row_scale = inputs.rows > 0 ? inputs.gradient_scale / static_cast<double>(inputs.rows) : 0;
  work.gradient = outputs->gradient;
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
  outputs->finite =
      std::isfinite(outputs->sums.label_loss_sum) && std::isfinite(outputs->sums.teacher_loss_sum);
  return absl::OkStatus();
}

}  // namespace codistill
