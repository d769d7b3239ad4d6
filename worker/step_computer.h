#ifndef CODISTILL_WORKER_STEP_COMPUTER_H_
#define CODISTILL_WORKER_STEP_COMPUTER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
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

// One step of a worker, from a batch and a place to get the weights from to the decision about its
// push: weights (WeightPuller), forward, teachers, loss and backward (TrainingPass), each gradient
// on its way as soon as there is one. Used by one thread.
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
    // Shards did not give weights or take the push. The step may be computed again: it gives the
    // same.
    absl::Status transfer_error;
    bool pushing = false;  // the transfer error came after gradients had begun to leave
    PushStream::Result push;
  };

  // Computes `step`, after which the recurrent state is `*state` unless there was an error. Teacher
  // predictions are taken once and stay with the step until ForgetPredictions.
  Result Run(const GroupSession& session, const BatchPipeline::Step& step,
             RecurrentStateAfter* state);
  void ForgetPredictions() { predictions_.reset(); }

  // Breaks off the transfer under way, if there is one: Run then ends with a transfer error. Any
  // thread.
  void CancelTransfer();

 private:
  explicit StepComputer(Options options);
  // Null: there are none, or none are wanted.
  absl::StatusOr<const TeacherPredictions*> TakePredictions(const BatchPipeline::Step& step);
  TensorClient::PushHeader HeaderOf(const GroupSession& session, const Assignment& assignment,
                                    const Version& weights) const;
  void PushBuffers(PushStream* push);
  void PushRows(const EmbeddedRows& rows, PushStream* push);
  void Report(const BatchPipeline::Step& step, const TrainingPass::Result& loss,
              const PushStream::Result& push);
  absl::Time PushDeadline() const;
  // Says what CancelTransfer is to break off; null = nothing any more.
  void SetPush(PushStream* push);

  const Options options_;
  const bool sync_;
  std::vector<int> buffers_;  // indices in model->tensors()
  std::optional<TeacherPredictions> predictions_;
  absl::Duration last_step_;  // how long the last one took
  std::unique_ptr<WeightPuller> weights_;
  std::unique_ptr<TrainingPass> pass_;

  Mutex mu_;
  PushStream* push_ ABSL_GUARDED_BY(mu_) = nullptr;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_STEP_COMPUTER_H_
