#ifndef CODISTILL_WORKER_STEP_COMPUTER_H_
#define CODISTILL_WORKER_STEP_COMPUTER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/client/tensor_client.h"
#include "common/model/model.h"
#include "proto/job.pb.h"
#include "worker/batch_pipeline.h"
#include "worker/recurrent_state.h"
#include "worker/teacher_source.h"
#include "worker/training_pass.h"
#include "worker/weight_puller.h"
#include "worker/worker_progress.h"

namespace codistill {

// A step from when it is ready until its push is decided.
struct StepInHand {
  explicit StepInHand(std::unique_ptr<BatchPipeline::Step> ready) : step(std::move(ready)) {}

  const std::unique_ptr<BatchPipeline::Step> step;
  int64_t number() const { return step->assignment.step(); }

  // Taken once, however often the step is computed.
  std::optional<TeacherPredictions> predictions;
  // Of the last computation:
  absl::Time begun;
  TrainingPass::Result loss;
  RecurrentStateAfter after;
  PushEnd end;
  std::unique_ptr<PushStream> push;
};

// One step of a worker, from a batch and a place to get the weights from to the decision about its
// push: weights (WeightPuller), forward, teachers, loss and backward (TrainingPass), each gradient
// on its way as soon as there is one. Between End and Wait the next step may be computed. Used by
// one thread.
class StepComputer {
 public:
  struct Options {
    JobConfig job;
    int group = 0;
    int rank = 0;
    Model* model = nullptr;              // not owned
    std::vector<float> label_prior;      // see TrainingPass
    TeacherSource* teachers = nullptr;   // not owned; null = none
    WorkerProgress* progress = nullptr;  // not owned
    // Rows that the next step will want, where they are known; optional.
    std::function<BatchPipeline::NextRows()> next_rows;
    absl::Duration test_delay;  // for tests: the computation takes so much longer
  };
  // INVALID_ARGUMENT: a loss that the kernel does not take.
  static absl::StatusOr<std::unique_ptr<StepComputer>> Create(Options options);

  struct Result {
    // The step cannot be computed here, now or again: model, loss, or a teacher under FAIL.
    absl::Status local_error;
    // Shards did not give weights. The step may be computed again: it gives the same.
    absl::Status transfer_error;
  };
  // Computes the step, from recurrent state `state`. Its gradients are on their way then, and its
  // push wants an End.
  Result Compute(const GroupSession& session, const RecurrentStateAfter& state, StepInHand* hand);
  // Asks for the decision. Only one push at a time waits for one.
  void End(const GroupSession& session, StepInHand* hand);
  // The decision. After an error the step may be computed again: it gives the same.
  absl::StatusOr<PushStream::Result> Wait(StepInHand* hand);

  // Breaks off the transfers under way, if there are any: Compute or Wait then ends with an error.
  // Any thread.
  void CancelTransfer();

 private:
  explicit StepComputer(Options options);
  // Null: there are none, or none are wanted.
  absl::StatusOr<const TeacherPredictions*> TakePredictions(StepInHand* hand);
  TensorClient::PushHeader HeaderOf(const GroupSession& session, const Assignment& assignment,
                                    const Version& weights) const;
  void PushBuffers(PushStream* push);
  void PushRows(const EmbeddedRows& rows, PushStream* push);
  void Report(const StepInHand& hand, const PushStream::Result& push);
  absl::Time PushDeadline() const;
  // Says what CancelTransfer is to break off; null = nothing any more.
  void SetPush(PushStream* push);

  const Options options_;
  const bool sync_;
  std::vector<int> buffers_;  // indices in model->tensors()
  absl::Duration last_step_;  // how long the last one took
  std::unique_ptr<WeightPuller> weights_;
  std::unique_ptr<TrainingPass> pass_;

  Mutex mu_;
  PushStream* push_ ABSL_GUARDED_BY(mu_) = nullptr;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_STEP_COMPUTER_H_
