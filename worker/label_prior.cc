#include "worker/label_prior.h"

#include <cstdint>

#include "absl/strings/str_cat.h"

namespace codistill {

absl::StatusOr<std::vector<float>> LabelPriorOf(const JobConfig& job, int group,
                                                const Dataset& training) {
  const ModelConfig& model = job.model();
  if (model.label_smoothing_prior() != ModelConfig::UNIGRAM || !(model.label_smoothing() > 0)) {
    return std::vector<float>();
  }
  std::vector<int64_t> counts = TrainingLabelCounts(job, group, training);
  const int64_t classes = static_cast<int64_t>(counts.size());
  if (model.has_ignored_label() && model.ignored_label() >= 0 && model.ignored_label() < classes) {
    counts[model.ignored_label()] = 0;
  }
  double total = 0;
  for (int64_t count : counts) total += static_cast<double>(count);
  if (total == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("model.ignored_label: ", model.ignored_label(),
                     " is every label of data.train; labels to train on would be right (",
                     training.summary(), ")"));
  }
  std::vector<float> prior;
  for (int64_t count : counts) {
    prior.push_back(static_cast<float>(static_cast<double>(count) / total));
  }
  return prior;
}

}  // namespace codistill
