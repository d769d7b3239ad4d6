#include "worker/output_reader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"
#include "common/tensor/int8_rows.h"
#include "cuda/loss.h"
#include "worker/loss_options.h"

namespace codistill {
namespace {

constexpr char kLogits[] = "logits";
constexpr char kLogitsScale[] = "logits_scale";
constexpr char kTopKIndex[] = "topk_index";
constexpr char kTopKValue[] = "topk_value";
constexpr char kTailMass[] = "tail_mass";

absl::Status Bad(const std::string& name, const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat("output \"", name, "\" ", problem));
}

}  // namespace

int64_t IntParameter(const inference::ModelInferResponse& response, const char* name) {
  const auto found = response.parameters().find(name);
  if (found == response.parameters().end()) return 0;
  const inference::InferParameter& parameter = found->second;
  switch (parameter.parameter_choice_case()) {
    case inference::InferParameter::kInt64Param:
      return parameter.int64_param();
    case inference::InferParameter::kUint64Param:
      return static_cast<int64_t>(parameter.uint64_param());
    case inference::InferParameter::kDoubleParam:
      // What no integer is would be undefined arithmetic.
      return std::abs(parameter.double_param()) < 9e18
                 ? static_cast<int64_t>(parameter.double_param())
                 : 0;
    case inference::InferParameter::kStringParam: {
      int64_t value = 0;
      return absl::SimpleAtoi(parameter.string_param(), &value) ? value : 0;
    }
    default:
      return 0;
  }
}

absl::StatusOr<int> OutputReader::Find(const std::string& name) const {
  std::vector<std::string> names;
  for (int i = 0; i < response_.outputs_size(); ++i) {
    if (response_.outputs(i).name() == name) return i;
    names.push_back(response_.outputs(i).name());
  }
  return absl::InvalidArgumentError(absl::StrCat("the answer has no output \"", name,
                                                 "\"; it has [", absl::StrJoin(names, ", "), "]"));
}

absl::Status OutputReader::CheckShape(int index, const std::vector<int64_t>& shape) const {
  const auto& output = response_.outputs(index);
  const std::vector<int64_t> given(output.shape().begin(), output.shape().end());
  if (given == shape) return absl::OkStatus();
  return Bad(output.name(), absl::StrCat("has the shape ", ShapeString(given), "; ",
                                         ShapeString(shape), " is expected"));
}

absl::Status OutputReader::CheckFlatShape(int index, int64_t rows, int64_t classes) const {
  const auto& output = response_.outputs(index);
  const std::vector<int64_t> given(output.shape().begin(), output.shape().end());
  const bool ends_right = classes == 1 || (!given.empty() && given.back() == classes);
  if (ends_right && ElementCount(given) == rows * classes) return absl::OkStatus();
  return CheckShape(index, {rows, classes});
}

absl::Status OutputReader::CheckContents(int index, DataType wire, int64_t elements) const {
  const auto& output = response_.outputs(index);
  if (output.datatype() != DataTypeName(wire)) {
    return Bad(output.name(),
               absl::StrCat("is ", output.datatype(), "; ", DataTypeName(wire), " is expected"));
  }
  const size_t bytes = static_cast<size_t>(elements) * ElementSize(wire);
  size_t got = 0;
  // The protocol has two forms of contents: raw bytes for all outputs, or typed lists in each. The
  // narrow types have no list.
  if (typed(index) && (wire == DT_FLOAT || wire == DT_INT32)) {
    const auto& contents = output.contents();
    got = ElementSize(wire) * static_cast<size_t>(wire == DT_FLOAT ? contents.fp32_contents_size()
                                                                   : contents.int_contents_size());
  } else if (index < payload_.count()) {
    got = payload_.size(index);
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("the answer declares ", response_.outputs_size(), " outputs and brings ",
                     payload_.count(), " raw contents; \"", output.name(), "\" has none"));
  }
  if (got == bytes) return absl::OkStatus();
  return Bad(output.name(), absl::StrCat("has ", got, " bytes where its shape takes ", bytes));
}

absl::Status OutputReader::ReadFloats(int index, DataType wire, Tensor* to) const {
  CODISTILL_RETURN_IF_ERROR(CheckContents(index, wire, to->elements()));
  float* const values = to->As<float>().data();
  if (wire == DT_FLOAT && typed(index)) {
    std::memcpy(values, response_.outputs(index).contents().fp32_contents().data(), to->bytes());
    return absl::OkStatus();
  }
  if (wire == DT_FLOAT) {
    payload_.CopyTo(index, values);
    return absl::OkStatus();
  }
  // In portions that stay in the first-level cache between copy and conversion.
  constexpr int64_t kPortion = 8192;
  uint16_t narrow[kPortion];
  const auto widen = [wire](const uint16_t* from, size_t n, float* values) {
    wire == DT_HALF ? FromFloat16(from, n, values) : FromBfloat16(from, n, values);
  };
  for (int64_t begin = 0; begin < to->elements(); begin += kPortion) {
    const auto count = static_cast<size_t>(std::min(kPortion, to->elements() - begin));
    payload_.CopyRangeTo(index, static_cast<size_t>(begin) * sizeof(uint16_t),
                         count * sizeof(uint16_t), narrow);
    widen(narrow, count, values + begin);
  }
  return absl::OkStatus();
}

absl::StatusOr<Tensor> OutputReader::Floats(const std::string& name,
                                            const std::vector<int64_t>& shape,
                                            DataType wire) const {
  CODISTILL_ASSIGN_OR_RETURN(const int index, Find(name));
  CODISTILL_RETURN_IF_ERROR(CheckShape(index, shape));
  Tensor tensor = Tensor::Allocate(DT_FLOAT, shape);
  CODISTILL_RETURN_IF_ERROR(ReadFloats(index, wire, &tensor));
  return tensor;
}

absl::StatusOr<Tensor> OutputReader::ReadAsGiven(int index, std::vector<int64_t> shape) const {
  const auto& output = response_.outputs(index);
  const DataType wire = DataTypeFromName(output.datatype());
  if (wire != DT_FLOAT && wire != DT_HALF) {
    return Bad(output.name(), absl::StrCat("is ", output.datatype(), "; FP32 or FP16 is expected"));
  }
  Tensor tensor = Tensor::Allocate(DT_FLOAT, std::move(shape));
  CODISTILL_RETURN_IF_ERROR(ReadFloats(index, wire, &tensor));
  return tensor;
}

absl::StatusOr<Tensor> OutputReader::FloatsAsGiven(const std::string& name,
                                                   const std::vector<int64_t>& shape) const {
  CODISTILL_ASSIGN_OR_RETURN(const int index, Find(name));
  CODISTILL_RETURN_IF_ERROR(CheckShape(index, shape));
  return ReadAsGiven(index, shape);
}

absl::StatusOr<Tensor> OutputReader::PredictionsAsGiven(const std::string& name, int64_t rows,
                                                        int64_t classes) const {
  CODISTILL_ASSIGN_OR_RETURN(const int index, Find(name));
  CODISTILL_RETURN_IF_ERROR(CheckFlatShape(index, rows, classes));
  return ReadAsGiven(index, {rows, classes});
}

absl::StatusOr<Tensor> OutputReader::Logits(int64_t rows, int64_t classes, DataType wire) const {
  CODISTILL_ASSIGN_OR_RETURN(const int index, Find(kLogits));
  CODISTILL_RETURN_IF_ERROR(CheckFlatShape(index, rows, classes));
  if (wire == DT_HALF || wire == DT_BFLOAT16) {
    CODISTILL_RETURN_IF_ERROR(CheckContents(index, wire, rows * classes));
    Tensor narrow = Tensor::Allocate(wire, {rows, classes});
    payload_.CopyTo(index, narrow.data());
    return narrow;
  }
  Tensor tensor = Tensor::Allocate(DT_FLOAT, {rows, classes});
  if (wire != DT_INT8) {
    CODISTILL_RETURN_IF_ERROR(ReadFloats(index, wire, &tensor));
    return tensor;
  }
  CODISTILL_RETURN_IF_ERROR(CheckContents(index, wire, tensor.elements()));
  CODISTILL_ASSIGN_OR_RETURN(const Tensor scales, Floats(kLogitsScale, {rows}));
  const absl::Span<const float> scale = scales.As<float>();
  std::vector<int8_t> row(classes);
  for (int64_t r = 0; r < rows; ++r) {
    if (!(scale[r] >= 0 && std::isfinite(scale[r]))) {
      return Bad(kLogitsScale, absl::StrCat("is ", scale[r], " in row ", r, ", which is no scale"));
    }
    payload_.CopyRangeTo(index, static_cast<size_t>(r * classes), row.size(), row.data());
    DequantizeInt8Rows(row.data(), &scale[r], 1, classes, tensor.As<float>().data() + r * classes);
  }
  return tensor;
}

absl::StatusOr<TopKPrediction> OutputReader::TopK(int64_t rows, int64_t classes, int64_t k,
                                                  DataType wire) const {
  TopKPrediction top_k;
  CODISTILL_ASSIGN_OR_RETURN(const int index, Find(kTopKIndex));
  CODISTILL_RETURN_IF_ERROR(CheckShape(index, {rows, k}));
  CODISTILL_RETURN_IF_ERROR(CheckContents(index, DT_INT32, rows * k));
  top_k.index = Tensor::Allocate(DT_INT32, {rows, k});
  if (typed(index)) {
    std::memcpy(top_k.index.data(), response_.outputs(index).contents().int_contents().data(),
                top_k.index.bytes());
  } else {
    payload_.CopyTo(index, top_k.index.data());
  }
  CODISTILL_ASSIGN_OR_RETURN(top_k.value, Floats(kTopKValue, {rows, k}, wire));
  CODISTILL_ASSIGN_OR_RETURN(top_k.tail, Floats(kTailMass, {rows}));
  CODISTILL_RETURN_IF_ERROR(Annotate(CheckTopKTeacher(TopKTeacherOf(top_k), rows, classes),
                                     "topk_index, topk_value, tail_mass"));
  return top_k;
}

}  // namespace codistill
