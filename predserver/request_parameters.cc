#include "predserver/request_parameters.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "common/base/status.h"

namespace codistill {
namespace {

using inference::InferParameter;
using inference::ModelInferRequest;

// Asked of a server with dynamic batching and of its HTTP side, whose meaning is not ours; all
// answers are computed in the order of arrival and travel as raw contents.
constexpr absl::string_view kIgnored[] = {"priority", "binary_data_output", "headers",
                                          "content_type"};
constexpr absl::string_view kTritonsOwn = "triton_";

absl::Status Refuse(absl::string_view name, const InferParameter& parameter,
                    absl::string_view right) {
  return absl::InvalidArgumentError(
      absl::StrCat("parameter ", name, ": ", parameter.ShortDebugString(), "; it must be ", right));
}

absl::optional<int64_t> Integer(const InferParameter& parameter) {
  switch (parameter.parameter_choice_case()) {
    case InferParameter::kInt64Param:
      return parameter.int64_param();
    case InferParameter::kUint64Param:
      if (parameter.uint64_param() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return absl::nullopt;
      }
      return static_cast<int64_t>(parameter.uint64_param());
    case InferParameter::kStringParam: {
      int64_t value = 0;
      if (!absl::SimpleAtoi(parameter.string_param(), &value)) return absl::nullopt;
      return value;
    }
    default:
      return absl::nullopt;
  }
}

absl::optional<double> Number(const InferParameter& parameter) {
  switch (parameter.parameter_choice_case()) {
    case InferParameter::kDoubleParam:
      return parameter.double_param();
    case InferParameter::kStringParam: {
      double value = 0;
      if (!absl::SimpleAtod(parameter.string_param(), &value)) return absl::nullopt;
      return value;
    }
    default: {
      const absl::optional<int64_t> integer = Integer(parameter);
      if (!integer.has_value()) return absl::nullopt;
      return static_cast<double>(*integer);
    }
  }
}

// DT_INVALID where outputs cannot have it.
DataType Format(const std::string& name) {
  if (name == "FP32") return DT_FLOAT;
  if (name == "FP16") return DT_HALF;
  if (name == "BF16") return DT_BFLOAT16;
  if (name == "INT8") return DT_INT8;
  return DT_INVALID;
}

absl::Status ReadParameter(const std::string& name, const InferParameter& parameter,
                           InferenceRequest* request) {
  PredictionRequest& prediction = request->prediction;
  if (name == "max_staleness_steps") {
    const absl::optional<int64_t> value = Integer(parameter);
    if (!value.has_value() || *value < 0) return Refuse(name, parameter, "an integer >= 0");
    prediction.max_staleness_steps = *value;
  } else if (name == "temperature") {
    const absl::optional<double> value = Number(parameter);
    if (!value.has_value() || !std::isfinite(*value) || *value <= 0) {
      return Refuse(name, parameter, "a finite number above 0");
    }
    prediction.format.temperature = *value;
  } else if (name == "top_k") {
    const absl::optional<int64_t> value = Integer(parameter);
    if (!value.has_value() || *value < 1) return Refuse(name, parameter, "an integer >= 1");
    prediction.format.top_k = *value;
  } else if (name == "format") {
    prediction.format.dtype = Format(parameter.string_param());
    if (prediction.format.dtype == DT_INVALID) {
      return Refuse(name, parameter, "the string FP32, FP16, BF16 or INT8");
    }
  } else if (name == "timeout") {
    const absl::optional<int64_t> value = Integer(parameter);
    if (!value.has_value() || *value < 0) return Refuse(name, parameter, "microseconds >= 0");
    if (*value > 0) request->timeout = absl::Microseconds(*value);  // 0: the server's own
  } else if (name == "sequence_id") {
    prediction.sequence =
        parameter.has_string_param() ? !parameter.string_param().empty() : Integer(parameter) != 0;
  } else if (name == "triton_enable_empty_final_response") {
    request->mark_final = parameter.bool_param();
  } else if (name != "sequence_start" && name != "sequence_end" &&
             !absl::StartsWith(name, kTritonsOwn)) {
    for (absl::string_view ignored : kIgnored) {
      if (name == ignored) return absl::OkStatus();
    }
    return absl::InvalidArgumentError(
        absl::StrCat("parameter \"", name,
                     "\": unknown; a request may have max_staleness_steps, temperature, top_k, "
                     "format and timeout"));
  }
  return absl::OkStatus();
}

// Parameters of an input or output; `what` names it.
template <typename Parameters>
absl::Status CheckTensorParameters(absl::string_view what, const std::string& tensor,
                                   const Parameters& parameters) {
  for (const auto& [name, parameter] : parameters) {
    if (absl::StartsWith(name, "shared_memory")) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, " ", tensor, ": parameter ", name,
                       ": there is no shared memory here; contents travel in the message"));
    }
    if (name == "classification" && Integer(parameter) != 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          what, " ", tensor, ": parameter classification: labels are not known here; ask for ",
          kTopKIndexOutput, " and ", kTopKValueOutput, " with the parameter top_k"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ReadParameters(const ModelInferRequest& message, InferenceRequest* request) {
  for (const auto& [name, parameter] : message.parameters()) {
    CODISTILL_RETURN_IF_ERROR(ReadParameter(name, parameter, request));
  }
  for (const auto& input : message.inputs()) {
    CODISTILL_RETURN_IF_ERROR(CheckTensorParameters("input", input.name(), input.parameters()));
  }
  for (const auto& output : message.outputs()) {
    CODISTILL_RETURN_IF_ERROR(CheckTensorParameters("output", output.name(), output.parameters()));
  }
  return absl::OkStatus();
}

}  // namespace codistill
