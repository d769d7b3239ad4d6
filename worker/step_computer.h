#ifndef CODISTILL_WORKER_STEP_COMPUTER_H_
#define CODISTILL_WORKER_STEP_COMPUTER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/client/row_client.h"
#include "common/client/tensor_client.h"
#include "common/model/model.h"
#include "common/tensor/tensor.h"
#include "cuda/loss.h"
#include "proto/job.pb.h"
#include "worker/batch_pipeline.h"
#include "worker/recurrent_state.h"
#include "worker/teacher_source.h"
#include "worker/worker_progress.h"

namespace codistill {

// One step of a worker, from a batch and a place to get the weights from to the decision about its
// push: pull, forward, teachers, loss, backward, each gradient on its way as soon as there is one.
// In SYNC the weights that a push leads to are asked for together with the decision about it, so
// that a step begins one round trip earlier. Used by one thread.
class StepComputer {
 public:
  struct Options {
    JobConfig job;
    int group = 0;
    int rank = 0;
    Model* model = nullptr;              // not owned
    TeacherSource* teachers = nullptr;   // not owned; null = none
    WorkerProgress* progress = nullptr;  // not owned
    // Rows that the next step will want, where they are known; optional.
    std::function<BatchPipeline::NextRows()> next_rows;
    absl::Duration test_delay;  // for tests: the computation takes so much longer
  };
  // INVALID_ARGUMENT: a loss that the kernel does not take.
  static absl::StatusOr<std::unique_ptr<StepComputer>> Create(Options options);
  ~StepComputer();

  // Membership under which steps are computed.
  struct Session {
    std::shared_ptr<TensorClient> tensors;
    std::shared_ptr<RowClient> rows;  // null for models without embedding tables
    uint64_t generation = 0;
    uint64_t incarnation = 0;
  };

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
  Result Run(const Session& session, const BatchPipeline::Step& step, RecurrentStateAfter* state);
  void ForgetPredictions() { predictions_.reset(); }

  // Breaks off the transfer under way, if there is one: Run then ends with a transfer error. Any
  // thread.
  void CancelTransfer();

 private:
  struct Loss {
    LossSums sums;
    bool finite = true;
    bool used_teacher = false;
  };

  // A pull into the model on puller_'s thread.
  struct EarlyPull {
    std::shared_ptr<TensorClient> tensors;
    uint64_t generation = 0;
    int64_t step = 0;
    absl::Notification done;
    absl::Status status;  // once done
  };

  // Rows of one batch, on their way or here.
  struct RowRead {
    std::shared_ptr<RowClient> client;  // outlives what is pending
    uint64_t generation = 0;
    int64_t step = 0;  // of the weights
    BatchPipeline::Rows batches;
    std::vector<Tensor> rows;  // by batch
    std::vector<std::unique_ptr<RowClient::Pending>> pending;
  };

  explicit StepComputer(Options options);
  // The step of the weights that are in the model then.
  absl::StatusOr<Version> Pull(const Session& session, const Assignment& assignment);
  absl::StatusOr<Version> PullNow(TensorClient* tensors, uint64_t generation, int64_t step);
  void StartEarlyPull(const Session& session, int64_t step);
  // Waits for the early pull, if there is one, and forgets it. `cancel`: it is not wanted.
  std::shared_ptr<EarlyPull> EndEarlyPull(bool cancel);
  std::unique_ptr<RowRead> StartRows(const Session& session, int64_t step,
                                     BatchPipeline::Rows batches);
  absl::Status WaitForRows(RowRead* read);
  // Asks for the rows of a step, unless they were asked for while the step before was decided.
  std::unique_ptr<RowRead> TakeRows(const Session& session, const BatchPipeline::Step& step);
  // Waits for the rows; those asked for early, which may have come to nothing, are asked for again.
  absl::Status Rows(const Session& session, const BatchPipeline::Step& step,
                    std::unique_ptr<RowRead>* read);
  void StartEarlyRows(const Session& session, int64_t step);
  void PushRows(const RowRead& read, PushStream* push);
  absl::StatusOr<Model::Logits> Forward(const BatchPipeline::Step& step, const RowRead* rows,
                                        Model::States* states);
  absl::Status TakePredictions(const BatchPipeline::Step& step);
  // Fills gradient_.
  absl::StatusOr<Loss> ComputeLoss(const BatchPipeline::Step& step, const Model::Logits& logits);
  void PushBuffers(PushStream* push);
  absl::Time PushDeadline() const;
  // Says what CancelTransfer is to break off; null = nothing any more.
  void SetTransfer(TensorClient* pull, PushStream* push);

  const Options options_;
  const LossOptions loss_options_;
  const uint64_t group_hash_;
  const bool sync_;
  std::vector<int> buffers_;  // indices in model->tensors()
  int64_t model_bytes_ = 0;
  Tensor gradient_;  // with respect to the logits, reused
  std::optional<TeacherPredictions> predictions_;
  absl::Duration last_step_;  // how long the last one took
  std::shared_ptr<EarlyPull> early_pull_;
  std::unique_ptr<RowRead> early_rows_;
  std::unique_ptr<Executor> puller_;

  Mutex mu_;
  TensorClient* pull_ ABSL_GUARDED_BY(mu_) = nullptr;
  PushStream* push_ ABSL_GUARDED_BY(mu_) = nullptr;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_STEP_COMPUTER_H_
