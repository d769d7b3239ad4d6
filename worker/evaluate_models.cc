#include "worker/evaluate_models.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/parallel.h"
#include "common/base/status.h"
#include "cuda/loss.h"
#include "worker/dataset_batches.h"
#include "worker/evaluation_metrics.h"
#include "worker/loss_options.h"

namespace codistill {
namespace {

// What is gathered about one model.
class Tally {
 public:
  explicit Tally(const JobConfig& job) : job_(job), loss_options_(LabelLossOptionsOf(job)) {}

  // Takes the logits of a batch. Where `differences`, leaves p - y in their place: between models
  // that saw the same labels y, differences of these are differences of probabilities.
  absl::Status Add(const StudentBatch& batch, bool differences, Tensor* logits) {
    const ModelConfig& model = job_.model();
    AddScores(batch, *logits);
    LossInputs inputs;
    inputs.rows = batch.rows;
    inputs.classes = model.num_outputs();
    inputs.logits = logits->As<float>().data();
    if (!batch.labels.empty()) inputs.labels = batch.labels.As<int64_t>().data();
    if (!batch.targets.empty()) inputs.targets = batch.targets.As<float>().data();
    // The gradient of the mean over rows (and classes, but for the softmax) times their number.
    inputs.gradient_scale = WeightOf(loss_options_, inputs) *
                            (model.label_loss() == SOFTMAX_CROSS_ENTROPY ? 1 : model.num_outputs());
    LossOutputs outputs;
    if (differences) outputs.gradient = logits->As<float>().data();
    const absl::Status status =
        ComputeLossCpu(loss_options_, inputs, &outputs, job_.training().worker_threads());
    // A model that has diverged is evaluated too: to a loss that is not finite.
    if (outputs.finite) CODISTILL_RETURN_IF_ERROR(status);
    loss_.Add(outputs.sums.label_loss_sum);
    correct_ += outputs.sums.correct;
    counted_ = outputs.sums.counted_rows;
    rows_ += counted_;
    examples_ += batch.examples;
    return absl::OkStatus();
  }

  // Rows of the last batch that counted: all but those with the ignored label.
  int64_t counted() const { return counted_; }

  EvaluationResult Result() {
    EvaluationResult result;
    result.set_examples(examples_);
    if (rows_ == 0) return result;
    result.set_loss(loss_.value() / static_cast<double>(rows_));
    if (job_.model().label_loss() != SQUARED_ERROR) {
      result.set_accuracy(static_cast<double>(correct_) / static_cast<double>(rows_));
    }
    if (const auto auc = AreaUnderRoc(std::move(scores_)); auc.has_value()) result.set_auc(*auc);
    return result;
  }

  Model::States states;  // of the model, from batch to batch

 private:
  void AddScores(const StudentBatch& batch, const Tensor& logits) {
    const ModelConfig& model = job_.model();
    const auto values = logits.As<float>();
    if (model.label_loss() == SIGMOID_CROSS_ENTROPY && model.num_outputs() == 1) {
      const auto targets = batch.targets.As<float>();
      for (int64_t i = 0; i < batch.rows; ++i) scores_.push_back({values[i], targets[i] > 0.5f});
    } else if (model.label_loss() == SOFTMAX_CROSS_ENTROPY && model.num_outputs() == 2) {
      const auto labels = batch.labels.As<int64_t>();
      for (int64_t i = 0; i < batch.rows; ++i) {
        if (loss_options_.ignored_label == labels[i]) continue;
        scores_.push_back({values[2 * i + 1] - values[2 * i], labels[i] == 1});
      }
    }
  }

  const JobConfig& job_;
  const LossOptions loss_options_;
  CompensatedSum loss_;
  int64_t correct_ = 0;
  int64_t counted_ = 0;
  int64_t rows_ = 0;
  int64_t examples_ = 0;
  std::vector<ScoredLabel> scores_;
};

// What `model` makes of a batch, into its tally. Leaves in `logits` what Tally::Add does.
absl::Status Measure(const Model& model, const JobConfig& job, const StudentBatch& batch,
                     bool differences, Tally* tally, Tensor* logits) {
  if (batch.starts_epoch) tally->states.clear();
  CODISTILL_ASSIGN_OR_RETURN(
      Model::Logits predicted,
      model.Predict(batch.inputs, job.model().states_size() > 0 ? &tally->states : nullptr));
  if (predicted.rows != batch.rows) {
    return absl::InvalidArgumentError(
        absl::StrCat(predicted.rows, " rows of logits for a batch with ", batch.rows, " labels"));
  }
  *logits = std::move(predicted.values);
  return tally->Add(batch, differences, logits);
}

}  // namespace

absl::StatusOr<Evaluation> EvaluateModels(const EvaluateOptions& options,
                                          absl::Span<const Model* const> models) {
  const JobConfig& job = *options.job;
  const Dataset& data = *options.validation;
  const int64_t batch_size = data.sequential() ? data.lanes() : job.evaluation().batch_size();
  int64_t total = data.size();
  if (options.max_examples > 0 && options.max_examples < total) {
    total = options.max_examples;
    if (data.sequential()) total = (total + batch_size - 1) / batch_size * batch_size;
  }
  std::vector<Tally> tallies(models.size(), Tally(job));
  std::vector<Tensor> logits(models.size());
  std::vector<absl::Status> statuses(models.size());
  CompensatedSum difference;
  int64_t compared = 0;
  const bool compare = models.size() > 1;

  for (int64_t begin = 0; begin < total; begin += batch_size) {
    if (options.stop && options.stop()) return absl::CancelledError("evaluation was stopped");
    const int64_t end = std::min(total, begin + batch_size);
    Batch filled;
    CODISTILL_RETURN_IF_ERROR(data.Fill(EvaluationExamples(data, total, begin, end), &filled));
    CODISTILL_ASSIGN_OR_RETURN(const StudentBatch batch,
                               ToStudentBatch(job.model(), std::move(filled)));
    ParallelFor(options.parallel_models, static_cast<int64_t>(models.size()), 1,
                [&](int64_t first, int64_t last) {
                  for (int64_t m = first; m < last; ++m) {
                    statuses[m] = Measure(*models[m], job, batch, compare, &tallies[m], &logits[m]);
                  }
                });
    for (size_t m = 0; m < models.size(); ++m) {
      CODISTILL_RETURN_IF_ERROR(
          Annotate(statuses[m], absl::StrCat("model ", m, ", examples from ", begin)));
    }
    for (size_t a = 0; a < models.size(); ++a) {
      for (size_t b = a + 1; b < models.size(); ++b) {
        difference.Add(SumOfDifferences(logits[a].As<float>(), logits[b].As<float>()));
        compared += tallies[a].counted() * job.model().num_outputs();
      }
    }
    if (options.on_progress) options.on_progress(end, total);
  }

  Evaluation evaluation;
  for (Tally& tally : tallies) evaluation.results.push_back(tally.Result());
  if (compared > 0) evaluation.disagreement = difference.value() / static_cast<double>(compared);
  return evaluation;
}

}  // namespace codistill
