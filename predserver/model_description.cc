#include "predserver/model_description.h"

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/tensor/tensor.h"
#include "predserver/request_check.h"

namespace codistill {
namespace {

// All element types have the protocol's names with TYPE_ before them.
inference::DataType TypeOf(DataType dtype) {
  inference::DataType type = inference::TYPE_INVALID;
  inference::DataType_Parse(absl::StrCat("TYPE_", DataTypeName(dtype)), &type);
  return type;
}

struct InputDescription {
  std::string name;
  DataType dtype;
  std::vector<int64_t> shape;
  bool optional;
};

std::vector<InputDescription> DescribeInputs(const ModelConfig& model) {
  std::vector<InputDescription> inputs;
  for (const auto& input : model.inputs()) {
    inputs.push_back({input.name(), input.dtype(), {-1}, false});
    inputs.back().shape.insert(inputs.back().shape.end(), input.shape().begin(),
                               input.shape().end());
  }
  for (const auto& state : model.states()) {
    inputs.push_back({state.name(), DT_FLOAT, {state.shape().begin(), state.shape().end()}, true});
  }
  return inputs;
}

template <typename Description>
void SetDims(const Description& description, bool batched,
             google::protobuf::RepeatedField<int64_t>* dims) {
  const auto& shape = description.shape;
  dims->Assign(shape.begin() + (batched ? 1 : 0), shape.end());
}

void SetTotal(const ModelStatistics::Total& total, inference::StatisticDuration* duration) {
  duration->set_count(static_cast<uint64_t>(total.count));
  duration->set_ns(static_cast<uint64_t>(absl::ToInt64Nanoseconds(total.time)));
}

}  // namespace

void DescribeModel(const ModelConfig& model, inference::ModelMetadataResponse* response) {
  const auto add = [](const auto& description, auto* metadata) {
    metadata->set_name(description.name);
    metadata->set_datatype(std::string(DataTypeName(description.dtype)));
    SetDims(description, false, metadata->mutable_shape());
  };
  response->set_platform(kModelPlatform);
  for (const InputDescription& input : DescribeInputs(model)) add(input, response->add_inputs());
  for (const OutputDescription& output : DescribeOutputs(model)) {
    add(output, response->add_outputs());
  }
}

void DescribeConfig(const ModelConfig& model, const PredictionConfig& prediction,
                    inference::ModelConfig* config) {
  const bool batched = model.states_size() == 0;
  config->set_platform(kModelPlatform);
  config->set_backend(kModelBackend);
  config->set_max_batch_size(batched ? prediction.max_batch_size() : 0);
  config->mutable_version_policy()->mutable_latest()->set_num_versions(prediction.held_versions());
  for (const InputDescription& input : DescribeInputs(model)) {
    auto* const to = config->add_input();
    to->set_name(input.name);
    to->set_data_type(TypeOf(input.dtype));
    to->set_optional(input.optional);
    SetDims(input, batched, to->mutable_dims());
  }
  for (const OutputDescription& output : DescribeOutputs(model)) {
    auto* const to = config->add_output();
    to->set_name(output.name);
    to->set_data_type(TypeOf(output.dtype));
    SetDims(output, batched, to->mutable_dims());
  }
  auto* const batching = config->mutable_dynamic_batching();
  batching->set_max_queue_delay_microseconds(prediction.max_batch_delay_us());
  batching->mutable_default_queue_policy()->set_max_queue_size(prediction.max_queue());
  config->mutable_response_cache()->set_enable(batched && prediction.cache_bytes() > 0);
}

void DescribeStatistics(const ModelStatistics& statistics,
                        inference::ModelStatistics* description) {
  description->set_last_inference(
      static_cast<uint64_t>(absl::ToUnixMillis(statistics.last_inference)));
  description->set_inference_count(static_cast<uint64_t>(statistics.inference_count));
  description->set_execution_count(static_cast<uint64_t>(statistics.execution_count));
  auto* const inference = description->mutable_inference_stats();
  SetTotal(statistics.success, inference->mutable_success());
  SetTotal(statistics.fail, inference->mutable_fail());
  SetTotal(statistics.queue, inference->mutable_queue());
  SetTotal(statistics.compute_input, inference->mutable_compute_input());
  SetTotal(statistics.compute_infer, inference->mutable_compute_infer());
  SetTotal(statistics.compute_output, inference->mutable_compute_output());
  SetTotal(statistics.cache_hit, inference->mutable_cache_hit());
  SetTotal(statistics.cache_miss, inference->mutable_cache_miss());
  for (const auto& [size, batch] : statistics.batches) {
    auto* const to = description->add_batch_stats();
    to->set_batch_size(static_cast<uint64_t>(size));
    SetTotal(batch.compute_input, to->mutable_compute_input());
    SetTotal(batch.compute_infer, to->mutable_compute_infer());
    SetTotal(batch.compute_output, to->mutable_compute_output());
  }
}

}  // namespace codistill
