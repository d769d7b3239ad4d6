#include "predserver/request_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "common/tensor/sum_of_squares.h"

namespace codistill {
namespace {

constexpr int64_t kMostBytes = std::numeric_limits<int64_t>::max();

// Wire shape of a tensor of the job: -1 stands for the batch.
struct Expected {
  std::string name;
  DataType dtype;
  std::vector<int64_t> shape;
};

std::string ExpectedShape(const Expected& expected) {
  return absl::StrCat("[",
                      absl::StrJoin(expected.shape, ", ",
                                    [](std::string* out, int64_t size) {
                                      size == -1 ? absl::StrAppend(out, "B")
                                                 : absl::StrAppend(out, size);
                                    }),
                      "]");
}

size_t TotalBytes(const PredictionRequest::Input& input) {
  size_t total = 0;
  for (const auto& part : input.parts) total += part.size();
  return total;
}

// `batch` is 0 until the first input has set it.
absl::Status CheckInput(const Expected& want, const PredictionRequest::Input& got, int64_t* batch) {
  const auto refuse = [&](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("input ", want.name, ": ", what));
  };
  if (got.datatype != DataTypeName(want.dtype)) {
    return refuse(absl::StrCat("datatype is \"", got.datatype, "\"; it must be \"",
                               DataTypeName(want.dtype), "\""));
  }
  const bool fits = std::equal(
      got.shape.begin(), got.shape.end(), want.shape.begin(), want.shape.end(),
      [](int64_t size, int64_t wanted) { return wanted == -1 ? size >= 1 : size == wanted; });
  if (!fits) {
    return refuse(absl::StrCat("shape is ", ShapeString(got.shape), "; it must be ",
                               ExpectedShape(want), " with B >= 1"));
  }
  const auto place = std::find(want.shape.begin(), want.shape.end(), -1) - want.shape.begin();
  const int64_t rows = got.shape[place];
  if (*batch == 0) {
    *batch = rows;
  } else if (rows != *batch) {
    return refuse(absl::StrCat("has ", rows, " examples where the first input has ", *batch));
  }
  const int64_t elements = ElementCount(got.shape);
  const size_t size = ElementSize(want.dtype);
  const size_t bytes = TotalBytes(got);
  if (elements < 0 || bytes / size != static_cast<size_t>(elements) || bytes % size != 0) {
    return refuse(absl::StrCat("contents are ", bytes, " bytes; shape ", ShapeString(got.shape),
                               " of ", got.datatype, " takes ",
                               elements < 0 || elements > kMostBytes / static_cast<int64_t>(size)
                                   ? std::string("more than there can be")
                                   : absl::StrCat(elements * static_cast<int64_t>(size))));
  }
  return absl::OkStatus();
}

int FindInput(const PredictionRequest& request, absl::string_view name) {
  for (size_t i = 0; i < request.inputs.size(); ++i) {
    if (request.inputs[i].name == name) return static_cast<int>(i);
  }
  return -1;
}

std::string InputNames(const ModelConfig& config) {
  std::vector<std::string> names;
  for (const ModelInput& input : config.inputs()) names.push_back(input.name());
  for (const RecurrentState& state : config.states()) names.push_back(state.name());
  return absl::StrJoin(names, ", ");
}

absl::Status CheckNames(const ModelConfig& config, const PredictionRequest& request) {
  std::set<std::string> known = {kExampleIdInput};
  for (const ModelInput& input : config.inputs()) known.insert(input.name());
  for (const RecurrentState& state : config.states()) known.insert(state.name());
  std::set<std::string> seen;
  for (const auto& input : request.inputs) {
    if (known.count(input.name) == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("input \"", input.name, "\": the model has none of that name; it takes ",
                       InputNames(config)));
    }
    if (!seen.insert(input.name).second) {
      return absl::InvalidArgumentError(absl::StrCat("input ", input.name, ": is given twice"));
    }
  }
  return absl::OkStatus();
}

std::string OutputNames(const ModelConfig& config) {
  std::vector<std::string> names;
  for (const OutputDescription& output : DescribeOutputs(config)) names.push_back(output.name);
  return absl::StrJoin(names, ", ");
}

// What a request without names is given.
void PlanDefaultOutputs(const PredictionRequest& request, RequestPlan* plan) {
  plan->want_logits = request.format.top_k == 0;
  plan->want_top_k_index = plan->want_top_k_value = plan->want_tail_mass = !plan->want_logits;
  plan->want_states.assign(plan->want_states.size(), true);
}

absl::Status PlanNamedOutputs(const ModelConfig& config, const PredictionRequest& request,
                              RequestPlan* plan) {
  plan->want_logits = false;
  const std::pair<const char*, bool*> flags[] = {
      {kLogitsOutput, &plan->want_logits},
      {kLogitsScaleOutput, &plan->want_logits_scale},
      {kProbabilitiesOutput, &plan->want_probabilities},
      {kTopKIndexOutput, &plan->want_top_k_index},
      {kTopKValueOutput, &plan->want_top_k_value},
      {kTailMassOutput, &plan->want_tail_mass},
  };
  const std::vector<OutputDescription> given = DescribeOutputs(config);
  for (const std::string& name : request.outputs) {
    const bool known = std::any_of(given.begin(), given.end(),
                                   [&](const auto& output) { return output.name == name; });
    if (!known) {
      return absl::InvalidArgumentError(
          absl::StrCat("output \"", name, "\": the model has none of that name; it gives ",
                       OutputNames(config)));
    }
    for (const auto& [flag_name, flag] : flags) {
      if (name == flag_name) *flag = true;
    }
    for (int i = 0; i < config.states_size(); ++i) {
      if (config.states(i).name() == name) plan->want_states[i] = true;
    }
  }
  return absl::OkStatus();
}

// That the outputs and what the request says of them go together.
absl::Status CheckFormat(const ModelConfig& config, const PredictionRequest& request,
                         const RequestPlan& plan) {
  const OutputFormat& format = request.format;
  const bool int8 = format.dtype == DT_INT8;
  if (!int8 && format.dtype != DT_FLOAT && format.dtype != DT_HALF && format.dtype != DT_BFLOAT16) {
    return absl::InvalidArgumentError(absl::StrCat("parameter format: \"",
                                                   DataTypeName(format.dtype),
                                                   "\"; it must be FP32, FP16, BF16 or INT8"));
  }
  // Beyond these the quotients leave single precision.
  if (!(format.temperature >= 1e-6 && format.temperature <= 1e6)) {
    return absl::InvalidArgumentError(absl::StrCat("parameter temperature: ", format.temperature,
                                                   "; it must be between 1e-6 and 1e6"));
  }
  if (format.top_k < 0 || format.top_k > config.num_outputs()) {
    return absl::InvalidArgumentError(absl::StrCat("parameter top_k: ", format.top_k,
                                                   "; it must be from 1 to the model's ",
                                                   config.num_outputs(), " outputs"));
  }
  if (plan.want_top_k() && format.top_k == 0) {
    return absl::InvalidArgumentError(absl::StrCat("output ", kTopKIndexOutput, ", ",
                                                   kTopKValueOutput, " or ", kTailMassOutput,
                                                   ": needs the parameter top_k"));
  }
  if (format.top_k > 0 && !plan.want_top_k()) {
    return absl::InvalidArgumentError(absl::StrCat("parameter top_k: is given, but none of ",
                                                   kTopKIndexOutput, ", ", kTopKValueOutput,
                                                   " and ", kTailMassOutput, " is asked for"));
  }
  if (format.top_k > 0 && config.label_loss() != SOFTMAX_CROSS_ENTROPY) {
    return absl::InvalidArgumentError("parameter top_k: the model's outputs are no classes");
  }
  if (int8 && (plan.want_probabilities || plan.want_top_k())) {
    return absl::InvalidArgumentError(
        "parameter format: INT8 is for logits only; probabilities and top-k values may be FP32, "
        "FP16 or BF16");
  }
  if (plan.want_logits_scale && !(int8 && plan.want_logits)) {
    return absl::InvalidArgumentError(absl::StrCat("output ", kLogitsScaleOutput, ": comes with ",
                                                   kLogitsOutput, " in the format INT8 only"));
  }
  if (format.temperature != 1 && !plan.want_probabilities && !plan.want_top_k()) {
    return absl::InvalidArgumentError(
        absl::StrCat("parameter temperature: is given, but neither ", kProbabilitiesOutput,
                     " nor top-k values are asked for; logits have none"));
  }
  return absl::OkStatus();
}

absl::Status PlanOutputs(const ModelConfig& config, const PredictionRequest& request,
                         RequestPlan* plan) {
  plan->want_states.assign(config.states_size(), false);
  if (request.outputs.empty()) {
    PlanDefaultOutputs(request, plan);
  } else {
    CODISTILL_RETURN_IF_ERROR(PlanNamedOutputs(config, request, plan));
  }
  CODISTILL_RETURN_IF_ERROR(CheckFormat(config, request, *plan));
  plan->want_logits_scale = plan->want_logits && request.format.dtype == DT_INT8;
  return absl::OkStatus();
}

}  // namespace

std::vector<OutputDescription> DescribeOutputs(const ModelConfig& config) {
  std::vector<OutputDescription> outputs = {
      {kLogitsOutput, DT_FLOAT, {-1, config.num_outputs()}},
      {kLogitsScaleOutput, DT_FLOAT, {-1}},
  };
  if (config.label_loss() != SQUARED_ERROR) {
    outputs.push_back({kProbabilitiesOutput, DT_FLOAT, {-1, config.num_outputs()}});
  }
  if (config.label_loss() == SOFTMAX_CROSS_ENTROPY) {
    outputs.push_back({kTopKIndexOutput, DT_INT32, {-1, -1}});
    outputs.push_back({kTopKValueOutput, DT_FLOAT, {-1, -1}});
    outputs.push_back({kTailMassOutput, DT_FLOAT, {-1}});
  }
  for (const RecurrentState& state : config.states()) {
    outputs.push_back({state.name(), DT_FLOAT, {state.shape().begin(), state.shape().end()}});
  }
  return outputs;
}

absl::StatusOr<RequestPlan> CheckRequest(const ModelConfig& config,
                                         const PredictionRequest& request) {
  CODISTILL_RETURN_IF_ERROR(CheckNames(config, request));
  RequestPlan plan;
  for (const ModelInput& input : config.inputs()) {
    const int index = FindInput(request, input.name());
    if (index < 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "input ", input.name(), ": is missing; the model takes ", InputNames(config)));
    }
    Expected want{input.name(), input.dtype(), {-1}};
    want.shape.insert(want.shape.end(), input.shape().begin(), input.shape().end());
    CODISTILL_RETURN_IF_ERROR(CheckInput(want, request.inputs[index], &plan.batch));
    plan.inputs.push_back(index);
  }
  for (const RecurrentState& state : config.states()) {
    const int index = FindInput(request, state.name());
    plan.states.push_back(index);
    if (index < 0) continue;
    CODISTILL_RETURN_IF_ERROR(
        CheckInput({state.name(), DT_FLOAT, {state.shape().begin(), state.shape().end()}},
                   request.inputs[index], &plan.batch));
  }
  plan.example_id = FindInput(request, kExampleIdInput);
  if (plan.example_id >= 0) {
    CODISTILL_RETURN_IF_ERROR(CheckInput({kExampleIdInput, DT_INT64, {-1}},
                                         request.inputs[plan.example_id], &plan.batch));
  }
  if (request.sequence && config.states_size() > 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "parameter sequence_id: no state is kept here between requests; send each answer's ",
        config.states(0).name(), " along with the next request"));
  }
  CODISTILL_RETURN_IF_ERROR(PlanOutputs(config, request, &plan));
  return plan;
}

absl::Status CheckOutputBytes(const ModelConfig& config, const PredictionRequest& request,
                              const RequestPlan& plan, int64_t rows_per_example,
                              const OutputLimits& limits) {
  const int64_t outputs = config.num_outputs();
  const auto element = static_cast<int64_t>(ElementSize(request.format.dtype));
  int64_t row = 0;
  if (plan.want_logits) row += outputs * element;
  if (plan.want_logits_scale) row += sizeof(float);
  if (plan.want_probabilities) row += outputs * element;
  if (plan.want_top_k_index) row += request.format.top_k * static_cast<int64_t>(sizeof(int32_t));
  if (plan.want_top_k_value) row += request.format.top_k * element;
  if (plan.want_tail_mass) row += sizeof(float);
  int64_t example = rows_per_example * row;
  for (int i = 0; i < config.states_size(); ++i) {
    if (!plan.want_states[i]) continue;
    int64_t elements = 1;
    for (const int64_t size : config.states(i).shape()) elements *= size == -1 ? 1 : size;
    example += elements * static_cast<int64_t>(sizeof(float));
  }
  const int64_t logits = rows_per_example * outputs * static_cast<int64_t>(sizeof(float));
  const auto refuse = [&](int64_t each, int64_t limit, absl::string_view what) -> absl::Status {
    if (each == 0 || plan.batch <= limit / each) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(
        "input ", config.inputs(0).name(), ": has ", plan.batch, " examples, with ", each,
        " bytes of outputs each; ", what, " has room for ", limit / each, " (", limit, " bytes)"));
  };
  CODISTILL_RETURN_IF_ERROR(refuse(example, limits.response_bytes,
                                   "send fewer, or ask for top-k or a smaller format: a response"));
  return refuse(logits, limits.logits_bytes, "send fewer: a forward pass");
}

absl::Status CheckValues(const std::string& input, DataType dtype, const void* data, size_t bytes) {
  bool finite = true;
  if (dtype == DT_FLOAT) {
    finite = std::isfinite(
        SumOfSquares(static_cast<const float*>(data), static_cast<int64_t>(bytes / sizeof(float))));
  } else if (dtype == DT_DOUBLE) {
    const auto* const values = static_cast<const double*>(data);
    finite = std::all_of(values, values + bytes / sizeof(double),
                         [](double x) { return std::isfinite(x); });
  } else if (dtype == DT_HALF || dtype == DT_BFLOAT16) {
    // All bits of the exponent are set.
    const uint16_t mask = dtype == DT_HALF ? 0x7c00 : 0x7f80;
    const auto* const values = static_cast<const uint16_t*>(data);
    finite = std::none_of(values, values + bytes / sizeof(uint16_t),
                          [mask](uint16_t x) { return (x & mask) == mask; });
  }
  if (!finite) {
    return absl::InvalidArgumentError(
        absl::StrCat("input ", input, ": has a NaN or an infinity; values must be finite"));
  }
  const auto* const flags = static_cast<const uint8_t*>(data);
  if (dtype == DT_BOOL &&
      std::any_of(flags, flags + bytes, [](uint8_t byte) { return byte > 1; })) {
    return absl::InvalidArgumentError(
        absl::StrCat("input ", input, ": has a BOOL that is neither 0 nor 1"));
  }
  return absl::OkStatus();
}

}  // namespace codistill
