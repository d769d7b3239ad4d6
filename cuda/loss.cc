#include "cuda/loss.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/parallel.h"
#include "common/base/status.h"
#include "cuda/float_rows.h"
#include "cuda/loss_kernels.h"

namespace codistill {
namespace {

// A gradient beyond this will not be in the cache when it is used.
constexpr int64_t kCacheBytes = 8 << 20;
// Elements a thread should have, to be worth starting.
constexpr int64_t kElementsPerThread = 128 << 10;
// Elements of a block of the element-wise losses.
constexpr int64_t kBlockElements = 4096;

// The first class of a row with a number that is not finite; -1 if there is none.
int64_t FirstNotFinite(const void* data, NumberFormat format, int64_t row, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    if (!std::isfinite(internal::ReadNumber(data, format, row * n + c))) return c;
  }
  return -1;
}

std::string NotFinite(const std::string& tensor, const void* data, NumberFormat format, int64_t row,
                      int64_t name, int64_t n) {
  const int64_t c = FirstNotFinite(data, format, row, n);
  if (c < 0) return "";
  return absl::StrCat(tensor, " holds ", internal::ReadNumber(data, format, row * n + c),
                      " in row ", name, " for class ", c, "; want a finite number");
}

std::string WrongProbabilities(const std::string& tensor, const LossOptions& options,
                               const DenseTeacher& teacher, int64_t row, int64_t name, int64_t n) {
  const bool binary = options.label_loss == LossOptions::kSigmoidCrossEntropy;
  double sum = 0;
  for (int64_t c = 0; c < n; ++c) {
    const float q = internal::ReadNumber(teacher.values, teacher.format, row * n + c);
    if (q < 0 || (binary && q > 1)) {
      return absl::StrCat(tensor, " holds ", q, " in row ", name, " for class ", c,
                          "; want a probability");
    }
    sum += q;
  }
  if (binary || std::abs(sum - 1) <= internal::kMassTolerance) return "";
  return absl::StrCat(tensor, " has probabilities in row ", name, " that add up to ", sum,
                      "; want 1");
}

}  // namespace

namespace internal {

std::string FindFault(const LossOptions& options, const LossInputs& inputs, int64_t row,
                      int64_t name, bool finite) {
  const int64_t n = inputs.classes;
  const bool teach = inputs.teacher_weight > 0;
  std::string what;
  if (!finite) what = NotFinite("logits", inputs.logits, inputs.logits_format, row, name, n);
  if (!finite && what.empty() && options.label_loss != LossOptions::kSoftmaxCrossEntropy) {
    what = NotFinite("targets", inputs.targets, NumberFormat::kFloat32, row, name, n);
  }
  for (size_t k = 0; what.empty() && teach && k < inputs.teachers.size(); ++k) {
    const DenseTeacher& teacher = inputs.teachers[k];
    const std::string tensor = absl::StrCat("teachers ", k);
    if (!finite) what = NotFinite(tensor, teacher.values, teacher.format, row, name, n);
    if (!finite && what.empty() && teacher.format == NumberFormat::kInt8 &&
        !std::isfinite(teacher.scale[row])) {
      what = absl::StrCat(tensor, " has the scale ", teacher.scale[row], " in row ", name,
                          "; want a finite number");
    }
    if (what.empty() && teacher.kind == DenseTeacher::kProbabilities) {
      what = WrongProbabilities(tensor, options, teacher, row, name, n);
    }
  }
  if (!finite && what.empty()) {
    what = absl::StrCat("logits give a loss that is not finite in row ", name);
  }
  return what;
}

}  // namespace internal

double WeightOf(const LossOptions& options, const LossInputs& inputs) {
  double sum = 0;
  for (int64_t row = 0; row < inputs.rows; ++row) {
    sum += internal::RowWeight(options, inputs, row);
  }
  return sum;
}

absl::Status ComputeLossCpu(const LossOptions& options, const LossInputs& inputs,
                            LossOutputs* outputs, int threads) {
  CODISTILL_RETURN_IF_ERROR(ValidateLoss(options, inputs));
  CODISTILL_RETURN_IF_ERROR(internal::ValidateArrays(options, inputs, threads));
  const bool softmax = options.label_loss == LossOptions::kSoftmaxCrossEntropy;
  const int64_t block_rows = softmax ? 1 : std::max<int64_t>(1, kBlockElements / inputs.classes);
  const int64_t blocks = (inputs.rows + block_rows - 1) / block_rows;
  std::vector<double> label_loss(blocks), teacher_loss(blocks);
  std::vector<int64_t> correct(blocks);
  LossSums sums;
  for (int64_t row = 0; row < inputs.rows; ++row) {
    const double weight = internal::RowWeight(options, inputs, row);
    sums.weight_sum += weight;
    sums.counted_rows += weight > 0;
  }

  internal::FaultLog faults;
  internal::LossWork work;
  work.options = &options;
  work.inputs = &inputs;
  work.teach = inputs.teacher_weight > 0;
  work.row_scale = sums.weight_sum > 0 ? inputs.gradient_scale / sums.weight_sum : 0;
  work.prior_scale = 0;
  if (inputs.label_prior != nullptr) {
    double prior = 0;
    for (int64_t c = 0; c < inputs.classes; ++c) prior += inputs.label_prior[c];
    work.prior_scale = 1 / prior;
  }
  work.gradient = outputs->gradient;
  work.bypass_cache =
      inputs.rows * inputs.classes * static_cast<int64_t>(BytesOf(inputs.logits_format)) >=
      kCacheBytes;
  work.block_rows = block_rows;
  work.label_loss = label_loss.data();
  work.teacher_loss = teacher_loss.data();
  work.correct = correct.data();
  work.faults = &faults;

  const int64_t grain = 1 + kElementsPerThread / (block_rows * inputs.classes);
  ParallelFor(threads, blocks, grain, [&work, softmax](int64_t begin, int64_t end) {
    if (softmax) {
      internal::SoftmaxLoss(work, begin, end);
    } else {
      internal::ElementwiseLoss(work, begin, end);
    }
  });

  // In order of rows, whichever thread computed them.
  for (int64_t i = 0; i < blocks; ++i) {
    sums.label_loss_sum += label_loss[i];
    sums.teacher_loss_sum += teacher_loss[i];
    sums.correct += correct[i];
  }
  outputs->sums = sums;
  outputs->finite = std::isfinite(sums.label_loss_sum) && std::isfinite(sums.teacher_loss_sum);
  const std::string fault = faults.what();
  return fault.empty() ? absl::OkStatus()
                       : absl::InvalidArgumentError(absl::StrCat("loss: ", fault));
}

}  // namespace codistill
