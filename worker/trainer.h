#ifndef CODISTILL_WORKER_TRAINER_H_
#define CODISTILL_WORKER_TRAINER_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/client/leader_client.h"
#include "common/client/tensor_client.h"
#include "common/model/model.h"
#include "proto/job.pb.h"
#include "worker/batch_pipeline.h"
#include "worker/batch_source.h"
#include "worker/recurrent_state.h"
#include "worker/step_computer.h"
#include "worker/teacher_source.h"
#include "worker/worker_progress.h"

namespace codistill {

// A worker's life: joins its group, computes the steps it is given until the group has finished,
// and comes back by itself from whatever happens to the group meanwhile.
//
// What the answers of leader and shards mean:
//   ABORTED              the group was restored, or moved on without us: everything pulled,
//   prepared,
//                        predicted and carried is dropped; we register again and go on from the
//                        leader's next step.
//   UNAVAILABLE, ...     somebody is restarting: register again with back-off; where that shows the
//   same
//                        session, the step in hand is computed again (its push replaces what was
//                        staged; one already committed is answered DUPLICATE). After
//                        rejoin_timeout_s without progress, Run fails with the last error, which
//                        names the address; but a leader that answers that it is restoring is
//                        waited for, however long its checkpoint takes.
//   OUT_OF_RANGE         (weights) the step was decided without us: it is skipped, and the next one
//                        taken.
//   FAILED_PRECONDITION  a newer process has our rank: Run fails at once.
//   anything else        Run fails with it.
//
// In ASYNC a push that fails is lost, counted, and the next step taken: ranges are never issued
// twice.
class Trainer {
 public:
  using Connect =
      std::function<absl::StatusOr<std::unique_ptr<TensorClient>>(TensorClient::Options)>;

  struct Options {
    JobConfig job;
    int group = 0;
    int rank = 0;
    uint64_t process_nonce = 0;  // random per process
    std::string address;         // where this worker's Control service is
    std::string http_address;
    // Not owned; they outlive the trainer.
    LeaderClient* leader = nullptr;
    Model* model = nullptr;
    BatchSource* batches = nullptr;
    TeacherSource* teachers = nullptr;  // null = none
    WorkerProgress* progress = nullptr;
    std::vector<float> label_prior;  // see TrainingPass
    Connect connect;                 // null = TensorClient::Create
    absl::Duration heartbeat_interval = absl::Seconds(1);
    // How long after Drain the step in hand may wait for others; then it is given up.
    absl::Duration drain_grace = absl::Seconds(10);
    absl::Duration test_step_delay;  // added to the computation of every step
  };

  static absl::StatusOr<std::unique_ptr<Trainer>> Create(Options options);
  ~Trainer();

  // Trains, on the calling thread; once. OK: the leader has said that the group is finished or
  // draining, or Drain was called. Tells the leader how it ended, as far as it can be reached.
  absl::Status Run();

  // Ends Run after the step in hand. Any thread.
  void Drain();

 private:
  explicit Trainer(Options options);

  // Joins the group, or finds out where it is now. `aborted`: what we hold belongs to the past.
  absl::Status Join(bool aborted);
  absl::StatusOr<RegisterReply> Register();
  absl::Status Enter(const RegisterReply& reply, bool aborted);
  void RestoreState(const RegisterReply& reply);
  absl::Status Train();
  // What to do after `error` of a leader or shard: OK = joined again, go on.
  absl::Status Recover(const absl::Status& error);
  // What became of a step with which a push was under way.
  enum class Settled {
    kDecided,   // or given up, in ASYNC
    kAgain,     // it is to be computed again: in again_
    kObsolete,  // the session is another, or ends: with it what was computed meanwhile
  };
  // Computes a step, waits for the push of the step before, and asks for the decision about its
  // own. With lag_ 0 waits for that too.
  absl::Status Advance(std::unique_ptr<StepInHand> hand);
  // Waits for the decision about undecided_, if there is one.
  absl::StatusOr<Settled> Settle();
  void Decided(const StepInHand& hand, const PushStream::Result& push);
  // Ends training with an error that the leader is to hear of.
  absl::Status Fatal(const absl::Status& error);
  // To be computed before anything else, but for steps before it.
  void Again(std::unique_ptr<StepInHand> hand);
  // The weights of a step did not come.
  absl::Status WithoutWeights(std::unique_ptr<StepInHand> hand, const absl::Status& error);
  bool SameSession(uint64_t generation, uint64_t incarnation) const {
    return session_.generation == generation && session_.incarnation == incarnation;
  }
  // Recurrent state that `step` starts from, as far as it is known.
  const RecurrentStateAfter& StateBefore(int64_t step) const;
  void Remember(const RecurrentStateAfter& state);
  void Beat();
  void BreakOffWhenDue();
  void Leave(const absl::Status& status);
  const std::string& GroupName() const;
  bool leaving() const;
  absl::Status superseded() const;
  // Whether the leader says that the group is being restored: then it is waited for, however long.
  bool GroupIsRestoring();
  // Waits a little longer with every failure in a row; less when leaving.
  void BackOff();

  const Options options_;
  const bool sync_;
  const int64_t lag_;  // training.weights_lag
  WorkerProgress* const progress_;
  std::unique_ptr<StepComputer> computer_;
  std::unique_ptr<BatchPipeline> pipeline_;

  // Of the training thread:
  GroupSession session_;
  ShardMap shard_map_;
  std::vector<std::string> shard_addresses_;
  // After the newest steps, in order: a step that is computed again starts where it did.
  std::deque<RecurrentStateAfter> states_;
  std::unique_ptr<StepInHand> undecided_;          // its END has been sent
  std::deque<std::unique_ptr<StepInHand>> again_;  // to be computed before others, in order
  int64_t decided_without_us_ = 0;                 // steps up to this one
  int64_t completed_ = 0;  // ASYNC: the session's steps up to this one are over
  bool joined_ = false;
  int failures_in_row_ = 0;
  absl::Time failing_since_;  // with failures_in_row_ > 0
  absl::Status fatal_;        // what the leader is to hear of

  mutable Mutex mu_;
  bool drain_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time drain_since_ ABSL_GUARDED_BY(mu_);
  absl::Status superseded_ ABSL_GUARDED_BY(mu_);   // by a newer process of this rank
  uint64_t incarnation_ ABSL_GUARDED_BY(mu_) = 0;  // for heartbeats; 0 = not joined yet
  std::unique_ptr<PeriodicTask> heartbeat_;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TRAINER_H_
