#ifndef CODISTILL_WORKER_WEIGHT_PULLER_H_
#define CODISTILL_WORKER_WEIGHT_PULLER_H_

#include <cstdint>
#include <functional>
#include <memory>
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
#include "proto/job.pb.h"
#include "worker/batch_pipeline.h"
#include "worker/worker_progress.h"

namespace codistill {

// Membership under which a worker computes steps, and the way to its shards.
struct GroupSession {
  std::shared_ptr<TensorClient> tensors;
  std::shared_ptr<RowClient> rows;  // null for models without embedding tables
  uint64_t generation = 0;
  uint64_t incarnation = 0;
};

// The rows of one batch in the embedding tables, at the step of the weights.
struct EmbeddedRows {
  BatchPipeline::Rows batches;
  std::vector<Tensor> rows;  // by batch: FLOAT [keys, dim]
};

// Gets the weights of a worker's steps into its model, and the rows of their batches. In SYNC the
// weights that a push leads to can be asked for together with the decision about it, so that a step
// begins one round trip earlier.
//
// With training.weights_lag the model has two sets of weights: while a step is computed with one,
// what the next step wants comes into the other. SYNC: the weights of the step before, as soon as
// it is decided. Otherwise the newest there are when the backward pass begins.
//
// Used by one thread, but for Cancel.
class WeightPuller {
 public:
  struct Options {
    JobConfig job;
    Model* model = nullptr;              // not owned
    WorkerProgress* progress = nullptr;  // not owned
    // Rows that the next step will want, where they are known; optional.
    std::function<BatchPipeline::NextRows()> next_rows;
  };
  static absl::StatusOr<std::unique_ptr<WeightPuller>> Create(Options options);
  ~WeightPuller();

  struct Weights {
    Version version;
    int set = 0;  // of the model's, that they are in; not in use yet (Model::UseWeights)
    // Null for models without embedding tables.
    std::unique_ptr<EmbeddedRows> rows;
  };
  // Waits for the weights that `step` is to be computed on, and for its rows; for these until
  // `deadline`. Passes of the step before have ended.
  absl::StatusOr<Weights> Get(const GroupSession& session, const BatchPipeline::Step& step,
                              absl::Time deadline);

  // Asks for what the push of `step` will lead to, while that is being decided. The model's weights
  // may change from now on. Does nothing where that cannot be known (ASYNC) or is not wanted any
  // more. Rows wait for the decision until `deadline`.
  void StartEarly(const GroupSession& session, int64_t step, absl::Time deadline);
  // ASYNC with weights_lag: asks for the newest weights, and the rows of the next step, while this
  // one is computed. Does nothing otherwise.
  void StartNewest(const GroupSession& session, const Assignment& assignment, absl::Time deadline);
  // Takes back what was asked for early: the push has come to nothing.
  void ForgetEarly();

  // Breaks off what is under way, if anything is: it ends with an error. Any thread.
  void Cancel();

  // A transfer of the whole model may take so long before it counts as lost.
  absl::Duration LongestTransfer() const;

 private:
  // A pull into the model on puller_'s thread.
  struct EarlyPull {
    std::shared_ptr<TensorClient> tensors;
    uint64_t generation = 0;
    int64_t step = 0;
    int set = 0;
    absl::Notification done;
    absl::StatusOr<Version> version;  // once done
  };

  // Rows of one batch, on their way or here.
  struct RowRead {
    std::shared_ptr<RowClient> client;  // outlives what is pending
    uint64_t generation = 0;
    int64_t step = 0;  // of the weights
    std::unique_ptr<EmbeddedRows> rows;
    std::vector<std::unique_ptr<RowClient::Pending>> pending;
  };

  explicit WeightPuller(Options options);
  // Into set_.
  absl::StatusOr<Version> Pull(const GroupSession& session, int64_t weights_step);
  absl::StatusOr<Version> PullNow(TensorClient* tensors, uint64_t generation, int64_t step,
                                  int set);
  void StartPull(const GroupSession& session, int64_t step, int set);
  void StartNextRows(const GroupSession& session, int64_t weights_step, absl::Time deadline);
  int OtherSet() const { return lag_ > 0 ? 1 - set_ : 0; }
  // Waits for the early pull, if there is one, and forgets it. `cancel`: it is not wanted.
  std::shared_ptr<EarlyPull> EndEarlyPull(bool cancel);
  std::unique_ptr<RowRead> StartRows(const GroupSession& session, int64_t step,
                                     BatchPipeline::Rows batches, absl::Time deadline);
  absl::Status WaitForRows(RowRead* read);
  // Asks for the rows of a step, unless they were asked for while the step before was decided.
  std::unique_ptr<RowRead> TakeRows(const GroupSession& session, const BatchPipeline::Step& step,
                                    absl::Time deadline);
  // Says what Cancel is to break off; null = nothing any more.
  void SetUnderWay(std::shared_ptr<TensorClient> tensors);

  const Options options_;
  const bool sync_;
  const int64_t lag_;
  int64_t model_bytes_ = 0;
  int set_ = 0;  // what Get gave last
  std::shared_ptr<EarlyPull> early_pull_;
  std::unique_ptr<RowRead> early_rows_;
  std::unique_ptr<Executor> puller_;

  Mutex mu_;
  std::shared_ptr<TensorClient> under_way_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_WEIGHT_PULLER_H_
