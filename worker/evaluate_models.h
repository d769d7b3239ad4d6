#ifndef CODISTILL_WORKER_EVALUATE_MODELS_H_
#define CODISTILL_WORKER_EVALUATE_MODELS_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/model/model.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "worker/data/dataset.h"

namespace codistill {

struct EvaluateOptions {
  const JobConfig* job = nullptr;
  const Dataset* validation = nullptr;
  // At most so many examples, always the same (EvaluationExamples); 0 = all. Text: the first,
  // rounded up to whole segments of all lanes.
  int64_t max_examples = 0;
  // Models that compute at the same time. Results do not depend on it.
  int parallel_models = 1;
  // Optional: asked between batches; true ends it with CANCELLED.
  std::function<bool()> stop;
  // Optional: told after each batch.
  std::function<void(int64_t done, int64_t total)> on_progress;
};

struct Evaluation {
  // By index of the models: examples, loss (label loss without smoothing, nats a label), accuracy
  // where there are classes, auc where there are two. Version and `final` are the caller's to fill
  // in.
  std::vector<EvaluationResult> results;
  // Mean of |p_a - p_b| over labels, classes and pairs of models, p being probabilities (with
  // SQUARED_ERROR: predictions). 0 for one model.
  double disagreement = 0;
};

// Evaluates models side by side, batch by batch, so that what they say of one batch is all that is
// in memory at a time. Recurrent state is carried along the lanes of a text, each model its own. An
// error names the index of the model or the record at fault.
absl::StatusOr<Evaluation> EvaluateModels(const EvaluateOptions& options,
                                          absl::Span<const Model* const> models);

}  // namespace codistill

#endif  // CODISTILL_WORKER_EVALUATE_MODELS_H_
