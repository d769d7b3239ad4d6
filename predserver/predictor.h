#ifndef CODISTILL_PREDSERVER_PREDICTOR_H_
#define CODISTILL_PREDSERVER_PREDICTOR_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/clock.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/metrics/metrics.h"
#include "common/model/followed_model.h"
#include "predserver/prediction.h"
#include "predserver/prediction_metrics.h"
#include "predserver/request_check.h"
#include "proto/control.pb.h"
#include "proto/job.pb.h"

namespace codistill {

// Answers prediction requests with a followed model: checks each, queues it, and runs one forward
// pass per request on a thread of its own. Knows nothing of gRPC. Thread-safe; nothing blocks but
// Drain.
class Predictor {
 public:
  struct Options {
    std::string model;  // name that requests give: the group
    ModelConfig config;
    const FollowedModel* followed = nullptr;  // not owned, outlives the predictor
    int max_queue = 32;                       // requests that wait for the one that is computed
    Metrics* metrics = nullptr;               // not owned, outlives the predictor; may be null
    Clock* clock = Clock::Real();
  };
  static absl::StatusOr<std::unique_ptr<Predictor>> Create(Options options);
  // Drain().
  ~Predictor();

  // Calls `done` exactly once: at once where the request is refused, else from the compute thread.
  // Codes as in proto/open_inference.proto; CANCELLED where the caller was gone before compute.
  void Predict(PredictionRequest request, std::function<void(absl::StatusOr<Prediction>)> done);

  // OK if the model is this one, a version is held, and it is `version` (empty: any). Else
  // NOT_FOUND or UNAVAILABLE (also while draining).
  absl::Status Ready(const std::string& model, const std::string& version) const;
  // The version held, "generation.step"; empty if none.
  std::string held_version() const;
  const ModelConfig& config() const { return options_.config; }
  const std::string& model() const { return options_.model; }

  // State, detail, step, generation, rate and the served model's own part.
  void FillStatus(DaemonStatus* status) const;

  // Refuses new requests with UNAVAILABLE and returns when all accepted ones are answered.
  // Idempotent.
  void Drain();

 private:
  struct Job {
    PredictionRequest request;
    RequestPlan plan;
    absl::Time arrived;
    std::function<void(absl::StatusOr<Prediction>)> done;
  };

  Predictor(Options options, std::unique_ptr<Executor> executor);
  absl::StatusOr<RequestPlan> Accept(const PredictionRequest& request) const;
  void Compute(Job* job);
  absl::StatusOr<Prediction> Answer(const Job& job);
  absl::Status CheckModel(const std::string& model) const;
  absl::Status CheckVersion(const std::string& wanted, const Version& held) const;
  // Newest step that the group has committed, as last told; never less than the held one (after a
  // restore the group may be behind what it published before).
  int64_t LatestStep(const Version& held) const;
  void Finish(const Job& job, absl::StatusOr<Prediction> result);

  const Options options_;
  PredictionMetrics metrics_;
  mutable Mutex mu_;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  const std::unique_ptr<Executor> executor_;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_PREDICTOR_H_
