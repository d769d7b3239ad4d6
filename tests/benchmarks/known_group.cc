#include "tests/benchmarks/known_group.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/checkpoint/safetensors.h"
#include "common/config/shard_map.h"

namespace codistill {
namespace {

constexpr absl::Duration kPushLimit = absl::Seconds(60);

int64_t ValueOf(int64_t step) { return step + 1; }

}  // namespace

float KnownModel::Answer(int64_t step, int64_t column) {
  const int64_t v = ValueOf(step);
  return static_cast<float>((v * v << (v % 4)) + v * (column % 8));
}

int64_t KnownModel::elements() const {
  return (inputs + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * outputs;
}

std::vector<float> KnownModel::Weights(int64_t step) const {
  const int64_t v = ValueOf(step);
  std::vector<float> weights;
  weights.reserve(elements());
  const auto layer = [&weights](int64_t from, int64_t to, double weight) {
    weights.insert(weights.end(), from * to,
                   static_cast<float>(weight / static_cast<double>(from)));
  };
  layer(inputs, hidden, static_cast<double>(v));
  weights.insert(weights.end(), hidden, 0.0f);
  layer(hidden, hidden, static_cast<double>(v));
  weights.insert(weights.end(), hidden, 0.0f);
  layer(hidden, outputs, static_cast<double>(int64_t{1} << (v % 4)));
  for (int64_t j = 0; j < outputs; ++j) weights.push_back(static_cast<float>(v * (j % 8)));
  return weights;
}

void KnownModel::Describe(ModelConfig* config) const {
  ModelInput* const input = config->add_inputs();
  input->set_name("x");
  input->add_shape(inputs);
  config->set_num_outputs(outputs);
}

absl::Status KnownModel::Export(const std::string& directory, const std::string& name) const {
  const std::string out = JoinPath(directory, name);
  const std::string command =
      absl::StrCat("/usr/bin/python3 -B models/export.py --module mlp --out '", out,
                   "' --option in_features=", inputs, " --option hidden=", hidden, ",", hidden,
                   " --option num_classes=", outputs, " >'", out, ".export.log' 2>&1");
  if (std::system(command.c_str()) != 0) {
    return absl::InternalError(absl::StrCat("failed: ", command));
  }
  CODISTILL_ASSIGN_OR_RETURN(const TensorList list, LoadTensorList(out + ".tensors.textproto"));
  const std::vector<float> weights = Weights(0);
  std::vector<SafetensorsItem> items;
  int64_t at = 0;
  for (const TensorSpec& spec : list.tensors()) {
    SafetensorsItem item;
    item.name = spec.name();
    item.dtype = spec.dtype();
    item.shape.assign(spec.shape().begin(), spec.shape().end());
    int64_t n = 1;
    for (const int64_t d : item.shape) n *= d;
    item.read = [&weights, at, n](char* to) {
      std::memcpy(to, weights.data() + at, n * sizeof(float));
      return absl::OkStatus();
    };
    items.push_back(std::move(item));
    at += n;
  }
  if (at != elements()) {
    return absl::InternalError(absl::StrCat("the archive has ", at, " elements, not ", elements()));
  }
  return WriteSafetensors(out + ".safetensors", items, {});
}

absl::Status KnownModel::Check(int64_t step, const float* logits, int64_t rows) const {
  for (int64_t i = 0; i < rows * outputs; ++i) {
    const float expected = Answer(step, i % outputs);
    if (logits[i] != expected) {
      return absl::DataLossError(absl::StrCat("logit ", i % outputs, " of row ", i / outputs,
                                              " is ", logits[i], "; step ", step, " gives ",
                                              expected));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<KnownGroup>> KnownGroup::Start(Options options) {
  std::unique_ptr<KnownGroup> group(new KnownGroup(std::move(options)));
  const KnownModel& model = group->options_.model;
  const std::string& directory = group->options_.directory;
  CODISTILL_RETURN_IF_ERROR(model.Export(directory, "alpha"));
  ServerGroup::Options servers;
  servers.name = "known";
  servers.directory = directory;
  servers.server_core = group->options_.core;
  servers.client_core = group->options_.core;
  servers.training.set_publish_every_steps(1);
  servers.training.mutable_optimizer()->set_kind(OptimizerConfig::SGD);
  servers.training.mutable_optimizer()->set_learning_rate(1);
  CODISTILL_ASSIGN_OR_RETURN(group->group_, ServerGroup::Start(std::move(servers)));
  CODISTILL_ASSIGN_OR_RETURN(group->worker_, group->group_->Join(0));
  group->weights_ = model.Weights(0);

  JobConfig& job = group->job_;
  job.set_name("known");
  job.set_run_id(group->group_->ref().run_id());
  job.mutable_model()->set_archive_dir(directory);
  model.Describe(job.mutable_model());
  for (const bool train : {true, false}) {
    SyntheticConfig* const data =
        (train ? job.mutable_data()->mutable_train() : job.mutable_data()->mutable_validation())
            ->mutable_synthetic();
    data->set_inputs(model.inputs);
    data->set_classes(model.outputs);
    data->set_stream(train ? 0 : 1);
  }
  GroupConfig* const alpha = job.add_groups();
  alpha->set_name("alpha");
  alpha->add_shards()->set_address(group->group_->address(0));
  job.mutable_training()->set_batch_size(4);
  job.mutable_stop()->set_steps(KnownModel::kMaxStep);
  return group;
}

absl::StatusOr<int64_t> KnownGroup::Publish() {
  if (step_ >= KnownModel::kMaxStep) {
    return absl::OutOfRangeError(absl::StrCat("step ", step_ + 1, " would not be exact"));
  }
  std::vector<float> next = options_.model.Weights(step_ + 1);
  for (size_t i = 0; i < next.size(); ++i) weights_[i] -= next[i];
  TensorClient::PushHeader header;
  header.generation = worker_.registered.generation();
  header.step = step_ + 1;
  header.rank = worker_.rank;
  header.incarnation = worker_.registered.incarnation();
  header.weights_step = step_;
  const std::unique_ptr<PushStream> push =
      worker_.tensors->StartPush(header, absl::Now() + kPushLimit);
  const std::vector<TensorView> gradients =
      ViewsOf(worker_.registered.shard_map(), absl::MakeSpan(weights_));
  for (size_t i = 0; i < gradients.size(); ++i) {
    push->AddGradient(static_cast<int>(i), static_cast<const float*>(gradients[i].data), nullptr);
  }
  PushEnd end;
  end.set_num_examples(4);
  CODISTILL_ASSIGN_OR_RETURN(const PushStream::Result result, push->Finish(std::move(end)));
  if (result.outcome != APPLIED) {
    return absl::InternalError(absl::StrCat("the push of step ", step_ + 1, " was answered ",
                                            PushOutcome_Name(result.outcome)));
  }
  weights_ = std::move(next);
  return ++step_;
}

}  // namespace codistill
