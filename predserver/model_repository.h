#ifndef CODISTILL_PREDSERVER_MODEL_REPOSITORY_H_
#define CODISTILL_PREDSERVER_MODEL_REPOSITORY_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/clock.h"
#include "common/metrics/metrics.h"
#include "predserver/compute_pool.h"
#include "predserver/prediction.h"
#include "predserver/predictor.h"
#include "proto/control.pb.h"

namespace codistill {

// The models of one prediction server, by name, over one pool of compute threads. Models are added
// before it serves; from then on it is thread-safe. Nothing blocks but Drain.
class ModelRepository {
 public:
  struct Options {
    int compute_threads = 1;     // passes at once
    absl::Duration spin;         // as ComputePool::Options
    Metrics* metrics = nullptr;  // not owned, outlives the repository; may be null
    Clock* clock = Clock::Real();
  };
  static absl::StatusOr<std::unique_ptr<ModelRepository>> Create(Options options);
  // Drain().
  ~ModelRepository();

  // `model.pool`, `.metrics` and `.clock` are the repository's. INVALID_ARGUMENT if there is one of
  // that name, or the options are wrong.
  absl::Status Add(Predictor::Options model);

  // NOT_FOUND lists the names there are.
  absl::StatusOr<Predictor*> Find(const std::string& model) const;
  // In the order in which they were added.
  const std::vector<Predictor*>& models() const { return in_order_; }

  // As Predictor::Predict, by request.model.
  void Predict(PredictionRequest request, Predictor::Done done);

  // OK if every model has a version.
  absl::Status Ready() const;
  // State, detail, step, generation, rate and a part for each model. Step and generation are those
  // of the first one.
  void FillStatus(DaemonStatus* status) const;

  // Refuses new requests with UNAVAILABLE and returns when all accepted ones are answered.
  // Idempotent.
  void Drain();

 private:
  ModelRepository(Options options, std::unique_ptr<ComputePool> pool);

  const Options options_;
  const std::unique_ptr<ComputePool> pool_;
  std::map<std::string, std::unique_ptr<Predictor>> models_;
  std::vector<Predictor*> in_order_;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_MODEL_REPOSITORY_H_
