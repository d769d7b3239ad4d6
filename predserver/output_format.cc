#include "predserver/output_format.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"
#include "common/tensor/int8_rows.h"
#include "cuda/row_topk.h"
#include "predserver/row_outputs.h"

namespace codistill {
namespace {

NumberFormat FormatOf(DataType dtype) {
  return dtype == DT_HALF       ? NumberFormat::kFloat16
         : dtype == DT_BFLOAT16 ? NumberFormat::kBfloat16
                                : NumberFormat::kFloat32;
}

NumberTarget TargetOf(Tensor* tensor) { return {tensor->data(), FormatOf(tensor->dtype())}; }

class Formatter {
 public:
  Formatter(const Tensor& logits, LabelLoss loss, const RequestPlan& plan,
            const OutputFormat& format)
      : logits_(logits),
        loss_(loss),
        plan_(plan),
        format_(format),
        rows_(logits.shape()[0]),
        columns_(logits.shape()[1]),
        from_(logits.As<float>().data()) {}

  absl::StatusOr<std::vector<NamedTensor>> Make() {
    if (plan_.want_logits && format_.dtype == DT_INT8) {
      CODISTILL_RETURN_IF_ERROR(AddQuantized());
    } else if (plan_.want_logits && format_.dtype == DT_FLOAT) {
      CODISTILL_RETURN_IF_ERROR(CheckMagnitudes(0, rows_ * columns_));
      outputs_.push_back({kLogitsOutput, logits_});
    } else if (plan_.want_logits) {
      CODISTILL_RETURN_IF_ERROR(AddNarrowed());
    }
    if (plan_.want_probabilities) CODISTILL_RETURN_IF_ERROR(AddProbabilities());
    if (plan_.want_top_k()) CODISTILL_RETURN_IF_ERROR(AddTopK());
    return std::move(outputs_);
  }

 private:
  static absl::Status NotFinite(int64_t row) {
    if (row < 0) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat("row ", row,
                     " has a logit that is not finite: the model has diverged, or "
                     "its inputs are out of all bounds"));
  }

  Tensor* Add(const char* name, DataType dtype, std::vector<int64_t> shape) {
    outputs_.push_back({name, Tensor::Allocate(dtype, std::move(shape))});
    return &outputs_.back().tensor;
  }

  // That logits [begin, end) are finite and stay so in the type asked for.
  absl::Status CheckMagnitudes(int64_t begin, int64_t end) const {
    // What is larger rounds to infinity.
    const float most = format_.dtype == DT_HALF       ? 0x1.ffdffep15f
                       : format_.dtype == DT_BFLOAT16 ? 0x1.fefffep127f
                                                      : 0x1.fffffep127f;
    if (LargestMagnitude(from_ + begin, end - begin) <= most) return absl::OkStatus();
    int64_t i = begin;
    while (std::abs(from_[i]) <= most) ++i;
    if (!std::isfinite(from_[i])) return NotFinite(i / columns_);
    return absl::FailedPreconditionError(
        absl::StrCat("row ", i / columns_, " has the logit ", from_[i], ", more than ",
                     DataTypeName(format_.dtype), " holds; ask for another format"));
  }

  absl::Status AddNarrowed() {
    uint16_t* to = Add(kLogitsOutput, format_.dtype, {rows_, columns_})->As<uint16_t>().data();
    // Looked at and converted while it is in the first-level cache.
    constexpr int64_t kChunk = 4096;
    for (int64_t begin = 0; begin < rows_ * columns_; begin += kChunk) {
      const int64_t count = std::min(kChunk, rows_ * columns_ - begin);
      CODISTILL_RETURN_IF_ERROR(CheckMagnitudes(begin, begin + count));
      if (format_.dtype == DT_HALF) {
        ToFloat16(from_ + begin, count, to + begin);
      } else {
        ToBfloat16(from_ + begin, count, to + begin);
      }
    }
    return absl::OkStatus();
  }

  absl::Status AddQuantized() {
    int8_t* to = Add(kLogitsOutput, DT_INT8, {rows_, columns_})->As<int8_t>().data();
    float* scales = Add(kLogitsScaleOutput, DT_FLOAT, {rows_})->As<float>().data();
    return NotFinite(QuantizeInt8Rows(from_, rows_, columns_, to, scales));
  }

  absl::Status AddProbabilities() {
    const auto compute =
        loss_ == SOFTMAX_CROSS_ENTROPY ? internal::SoftmaxRows : internal::SigmoidRows;
    Tensor* to = Add(kProbabilitiesOutput, format_.dtype, {rows_, columns_});
    return NotFinite(compute(from_, rows_, columns_, format_.temperature, TargetOf(to)));
  }

  absl::Status AddTopK() {
    RowTopKInputs inputs;
    inputs.logits = from_;
    inputs.rows = rows_;
    inputs.classes = columns_;
    inputs.temperature = format_.temperature;
    inputs.k = format_.top_k;
    RowTopKOutputs to;
    if (plan_.want_top_k_index) {
      to.index = Add(kTopKIndexOutput, DT_INT32, {rows_, inputs.k})->As<int32_t>().data();
    }
    if (plan_.want_top_k_value) {
      to.value = Add(kTopKValueOutput, format_.dtype, {rows_, inputs.k})->data();
      to.value_format = FormatOf(format_.dtype);
    }
    if (plan_.want_tail_mass) {
      to.tail = Add(kTailMassOutput, DT_FLOAT, {rows_})->As<float>().data();
    }
    int64_t not_finite_row = -1;
    const absl::Status status = RowTopKCpu(inputs, to, 1, &not_finite_row);
    return not_finite_row < 0 ? status : NotFinite(not_finite_row);
  }

  const Tensor& logits_;
  const LabelLoss loss_;
  const RequestPlan& plan_;
  const OutputFormat& format_;
  const int64_t rows_, columns_;
  const float* const from_;
  std::vector<NamedTensor> outputs_;
};

}  // namespace

absl::StatusOr<std::vector<NamedTensor>> FormatOutputs(const Tensor& logits, LabelLoss loss,
                                                       const RequestPlan& plan,
                                                       const OutputFormat& format) {
  if (logits.dtype() != DT_FLOAT || logits.shape().size() != 2) {
    return absl::InternalError(absl::StrCat("logits are ", DataTypeName(logits.dtype()), " ",
                                            ShapeString(logits.shape()),
                                            "; FP32 [rows, classes] was expected"));
  }
  return Formatter(logits, loss, plan, format).Make();
}

}  // namespace codistill
