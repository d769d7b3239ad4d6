#include "worker/data/dataset.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "glog/logging.h"
#include "worker/data/sources.h"

namespace codistill {
namespace {

// What the job says about the data, held against what the files hold.
absl::Status CheckAgainstJob(const DatasetOptions& options, const Dataset& dataset) {
  const JobConfig& job = *options.job;
  const ModelConfig& model = job.model();
  const std::string field = internal::FieldOf(options);
  const int64_t wanted = model.label_loss() == SOFTMAX_CROSS_ENTROPY   ? model.num_outputs()
                         : model.label_loss() == SIGMOID_CROSS_ENTROPY ? 2
                                                                       : 0;
  if (dataset.num_classes() != wanted) {
    return absl::InvalidArgumentError(
        absl::StrCat("model.num_outputs: ", model.num_outputs(), " with label_loss ",
                     LabelLoss_Name(model.label_loss()), " needs ", wanted, " classes, but ", field,
                     " has ", dataset.num_classes(), " (", dataset.summary(), ")"));
  }
  const int64_t needed =
      options.training && job.data().partition() == DISJOINT && !dataset.sequential()
          ? job.groups_size()
          : 1;
  if (dataset.size() < needed) {
    return absl::InvalidArgumentError(absl::StrCat(field, ": only ", dataset.size(),
                                                   " examples; at least ", needed,
                                                   " would be right (", dataset.summary(), ")"));
  }
  return absl::OkStatus();
}

}  // namespace

const Tensor* Batch::field(const std::string& name) const {
  for (const NamedTensor& field : fields) {
    if (field.name == name) return &field.tensor;
  }
  return nullptr;
}

Dataset::Dataset(const DatasetConfig& config, LabelLoss loss, Shape shape)
    : fields_(BatchFields(config)), loss_(loss), shape_(std::move(shape)) {}

void Dataset::Allocate(int64_t examples, Batch* batch) const {
  batch->fields.clear();
  for (const BatchField& field : fields_) {
    std::vector<int64_t> shape = {examples};
    shape.insert(shape.end(), field.shape.begin(), field.shape.end());
    batch->fields.push_back({field.name, Tensor::Allocate(field.dtype, std::move(shape))});
  }
  std::vector<int64_t> labels = {examples};
  if (sequential()) labels.push_back(labels_per_example());
  batch->labels =
      Tensor::Allocate(loss_ == SOFTMAX_CROSS_ENTROPY ? DT_INT64 : DT_FLOAT, std::move(labels));
  batch->examples = examples;
  batch->rows = examples * labels_per_example();
  batch->example_ids = Tensor::Allocate(DT_INT64, {examples});
  batch->reset_state = false;
}

void Dataset::SetClass(int64_t row, int64_t label, Batch* batch) const {
  if (loss_ == SOFTMAX_CROSS_ENTROPY) {
    batch->labels.As<int64_t>()[row] = label;
  } else {
    batch->labels.As<float>()[row] = static_cast<float>(label);
  }
}

absl::StatusOr<std::unique_ptr<Dataset>> CreateDataset(const DatasetOptions& options) {
  CHECK(options.job != nullptr);
  absl::StatusOr<std::unique_ptr<Dataset>> dataset;
  switch (internal::ConfigOf(options).source_case()) {
    case DatasetConfig::kSynthetic:
      dataset = internal::CreateSynthetic(options);
      break;
    case DatasetConfig::kCsv:
      dataset = internal::CreateCsv(options);
      break;
    case DatasetConfig::kText:
      dataset = internal::CreateText(options);
      break;
    case DatasetConfig::kImage:
      dataset = internal::CreateImages(options);
      break;
    case DatasetConfig::SOURCE_NOT_SET:
      return absl::InvalidArgumentError(
          absl::StrCat(internal::FieldOf(options), ": no source; the job has no such data set"));
  }
  CODISTILL_RETURN_IF_ERROR(dataset);
  CODISTILL_RETURN_IF_ERROR(CheckAgainstJob(options, **dataset));
  return dataset;
}

ExampleOrder TrainingOrder(const JobConfig& job, int group, const Dataset& dataset) {
  ExampleOrder::Options options;
  options.seed = job.seed();
  options.group = group;
  options.num_groups = job.groups_size();
  options.partition = job.data().partition();
  options.size = dataset.size();
  options.sequential = dataset.sequential();
  return ExampleOrder(options);
}

std::vector<int64_t> TrainingLabelCounts(const JobConfig& job, int group, const Dataset& dataset) {
  const ExampleOrder order = TrainingOrder(job, group, dataset);
  std::vector<int64_t> counts(dataset.num_classes());
  constexpr int64_t kPortion = 4096;
  for (int64_t begin = 0; begin < order.epoch_size(); begin += kPortion) {
    const int64_t count = std::min(kPortion, order.epoch_size() - begin);
    dataset.CountLabels(order.Range(begin, count), absl::MakeSpan(counts));
  }
  return counts;
}

std::vector<ExampleRef> EvaluationExamples(const Dataset& dataset, int64_t total, int64_t begin,
                                           int64_t end) {
  std::vector<ExampleRef> refs;
  refs.reserve(end - begin);
  if (dataset.sequential() || total >= dataset.size()) {
    for (int64_t i = begin; i < end; ++i) refs.push_back({i, 0});
    return refs;
  }
  const Permutation sample(HashString("evaluation"), dataset.size());
  for (int64_t i = begin; i < end; ++i) refs.push_back({static_cast<int64_t>(sample(i)), 0});
  return refs;
}

namespace internal {

const DatasetConfig& ConfigOf(const DatasetOptions& options) {
  return options.training ? options.job->data().train() : options.job->data().validation();
}

std::string FieldOf(const DatasetOptions& options) {
  return options.training ? "data.train" : "data.validation";
}

absl::StatusOr<std::vector<std::string>> ResolveFiles(
    const std::string& field, const google::protobuf::RepeatedPtrField<std::string>& files,
    const std::string& data_dir) {
  std::vector<std::string> paths;
  for (int i = 0; i < files.size(); ++i) {
    paths.push_back(JoinPath(data_dir, files[i]));
    if (!FileSystem::Real()->Exists(paths.back())) {
      return absl::NotFoundError(absl::StrCat(field, "[", i, "]: no file ", paths.back(), " (",
                                              files[i], ", relative to --data_dir ",
                                              data_dir.empty() ? "." : data_dir, ")"));
    }
  }
  return paths;
}

uint64_t IdSalt(const DatasetOptions& options) { return HashString(FieldOf(options)); }

}  // namespace internal
}  // namespace codistill
