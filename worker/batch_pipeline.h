#ifndef CODISTILL_WORKER_BATCH_PIPELINE_H_
#define CODISTILL_WORKER_BATCH_PIPELINE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/base/mutex.h"
#include "common/client/leader_client.h"
#include "common/model/row_batch.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "worker/batch_source.h"
#include "worker/teacher_source.h"

namespace codistill {

// Gets a worker's next steps ready while it computes: asks the leader for assignments, builds their
// batches and announces these to the teachers, a bounded number of steps ahead and in the order of
// the steps, on a thread of its own.
//
// Everything belongs to a session (generation, incarnation): Restart forgets what an older one had
// built or had under way. Thread-safe.
class BatchPipeline {
 public:
  struct Options {
    LeaderClient* leader = nullptr;     // not owned
    BatchSource* batches = nullptr;     // not owned
    TeacherSource* teachers = nullptr;  // not owned; null = none
    int32_t rank = 0;
    ModelConfig model;  // whose embedding tables are looked for in the batches
    // Steps made ready ahead of the one in hand, at least 1.
    int ahead = 1;
    // Steps whose decisions are waited for while later ones are computed (training.weights_lag).
    int undecided = 0;
    // Whether batches are announced to the teachers as soon as they are built.
    bool announce = true;
    // Told of the inputs of each batch as it is built, on the pipeline's thread; optional.
    std::function<void(absl::Span<const Tensor>)> on_inputs;
  };

  using Rows = std::shared_ptr<const std::vector<RowBatch>>;

  // One step, ready to be computed.
  struct Step {
    uint64_t generation = 0;
    Assignment assignment;
    StudentBatch batch;
    TeacherBatch question;  // the batch as teachers see it
    Rows rows;              // of embedding tables; null for models without
    // The data are at fault; the batch is empty.
    absl::Status data_error;
  };

  explicit BatchPipeline(Options options);
  ~BatchPipeline();
  BatchPipeline(const BatchPipeline&) = delete;
  BatchPipeline& operator=(const BatchPipeline&) = delete;

  // Begins a session, from the leader's next step of this rank. The teachers forget the older one.
  void Restart(uint64_t generation, uint64_t incarnation);
  // Goes on with the session after an error of the leader's; nothing that is ready is lost.
  void Resume();

  // Steps before `step` are not wanted any more. What is ready of later ones stays.
  void SkipTo(int64_t step);
  // ASYNC: the session's steps up to this one are over; the leader is told with the next call.
  void SetCompleted(int64_t step);
  // One past the largest example of any assignment received, in whatever session.
  uint64_t end_example() const;

  // The next step. OUT_OF_RANGE: the group has finished, there are no more. DEADLINE_EXCEEDED: none
  // yet. Anything else is the leader's answer; a Restart or Resume is wanted then.
  absl::StatusOr<std::unique_ptr<Step>> Next(absl::Time deadline);

  // The rows that the step after the one in hand will want, if it is ready: they may be asked for
  // while the one in hand is being decided. Null otherwise.
  struct NextRows {
    uint64_t generation = 0;
    int64_t weights_step = 0;
    Rows rows;
  };
  NextRows PeekRows();

 private:
  void Run();
  // One call or one batch of the current session.
  void Work() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FetchAssignments() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void BuildBatch() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool CanWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return stopping_ || (in_session_ && ready_.size() < static_cast<size_t>(options_.ahead));
  }
  bool HasNews() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return stopping_ || !ready_.empty() || end_.has_value();
  }

  const Options options_;
  mutable Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool in_session_ ABSL_GUARDED_BY(mu_) = false;
  // Tells what was under way when Restart came from what was begun after it.
  uint64_t session_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t generation_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t incarnation_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t next_step_ ABSL_GUARDED_BY(mu_) = 0;    // 0 = whatever the leader says
  int64_t skip_before_ ABSL_GUARDED_BY(mu_) = 0;  // steps before are not wanted
  int64_t completed_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t end_example_ ABSL_GUARDED_BY(mu_) = 0;
  std::deque<Assignment> assignments_ ABSL_GUARDED_BY(mu_);
  std::deque<std::unique_ptr<Step>> ready_ ABSL_GUARDED_BY(mu_);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mu_);  // why no more steps come
  std::thread thread_;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_BATCH_PIPELINE_H_
