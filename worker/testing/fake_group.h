#ifndef CODISTILL_WORKER_TESTING_FAKE_GROUP_H_
#define CODISTILL_WORKER_TESTING_FAKE_GROUP_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/base/mutex.h"
#include "common/client/leader_client.h"
#include "common/client/tensor_client.h"
#include "common/tensor/tensor.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// A group with one worker, in memory: leader and shards in one, plain SGD with the job's learning
// rate. Keeps the weights after every step, so that it can go back to any. Thread-safe.
class FakeGroup {
 public:
  enum Call { kRegister, kAssign, kHeartbeat, kPull, kPush, kCalls };

  struct Pushed {
    int64_t step = 0;
    PushEnd end;
    PushOutcome outcome = PUSH_OUTCOME_INVALID;
    std::string worker_state;
  };

  // `job`: seed, batch_size, learning rate, codistillation, stop.steps, update_mode. Group 0 is
  // meant.
  FakeGroup(JobConfig job, TensorList tensors);
  ~FakeGroup();

  std::unique_ptr<LeaderClient> leader();
  std::function<absl::StatusOr<std::unique_ptr<TensorClient>>(TensorClient::Options)> connect();

  // Makes the next calls of a kind fail, in order, without effect. OK: that call goes through.
  void FailNext(Call call, std::vector<absl::Status> errors);
  void FailAlways(Call call, absl::Status error);
  // The next pushes are applied, but the answer is lost.
  void LoseNextAnswers(int count, absl::Status error);
  // What the next pushes are answered instead of APPLIED; they change nothing.
  void AnswerNext(std::vector<PushOutcome> outcomes);
  // Called, without locks, when the push of `step` has been decided.
  void AfterStep(int64_t step, std::function<void()> f);
  // A new generation, from the weights after `step` and the worker state given then.
  void Restore(int64_t step);
  void Drain();
  // What the leader tells of the group's state.
  void set_phase(GroupState::Phase phase) { phase_.store(phase); }
  // Pulls of `step` wait until they are cancelled, as if another worker were missing.
  void ParkPullsOf(int64_t step);
  // The answer to the push of `step` waits likewise.
  void ParkPushOf(int64_t step);
  int64_t parked() const;
  // Has the assignment of `step` ask for worker state.
  void WantWorkerState(int64_t step);

  int64_t step() const;
  uint64_t generation() const;
  // Values of all tensors after `step`, as bytes in tensor order.
  std::string weights(int64_t step) const;
  std::vector<float> parameter(int64_t step, int index) const;
  std::vector<Pushed> pushes() const;
  std::vector<HeartbeatRequest> heartbeats() const;
  int64_t calls(Call call) const;

 private:
  class Leader;
  class Tensors;
  class Push;
  struct Cut {
    std::vector<Tensor> tensors;
  };

  // Waits until `step` is committed (pulls) or to be cancelled.
  absl::Status AwaitStep(uint64_t generation, int64_t step) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Version that a SYNC step is computed on.
  int64_t WeightsOf(int64_t step) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status ParkPush() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CancelPull();
  void CancelPush();
  absl::Status Scripted(Call call) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckGeneration(uint64_t generation) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<PushStream::Result> Decide(const TensorClient::PushHeader& header,
                                            std::map<int, Tensor> gradients,
                                            std::map<int, Tensor> buffers, std::string worker_state,
                                            PushEnd end, bool* parked);

  const JobConfig job_;
  const TensorList tensors_;
  const bool sync_;
  const int64_t lag_;
  std::atomic<GroupState::Phase> phase_{GroupState::PHASE_INVALID};
  mutable Mutex mu_;
  uint64_t generation_ ABSL_GUARDED_BY(mu_) = 1;
  int64_t step_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t restored_at_ ABSL_GUARDED_BY(mu_) = 0;  // step that the generation began with
  int64_t assigned_ ABSL_GUARDED_BY(mu_) = 0;     // ASYNC: ranges handed out
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  std::map<int64_t, Cut> cuts_ ABSL_GUARDED_BY(mu_);
  std::map<int64_t, std::string> worker_states_ ABSL_GUARDED_BY(mu_);
  std::map<int64_t, bool> want_state_ ABSL_GUARDED_BY(mu_);
  std::string restored_state_ ABSL_GUARDED_BY(mu_);
  std::deque<absl::Status> errors_[kCalls] ABSL_GUARDED_BY(mu_);
  absl::Status always_[kCalls] ABSL_GUARDED_BY(mu_);
  int64_t counts_[kCalls] ABSL_GUARDED_BY(mu_) = {};
  std::deque<absl::Status> lost_answers_ ABSL_GUARDED_BY(mu_);
  std::deque<PushOutcome> outcomes_ ABSL_GUARDED_BY(mu_);
  std::map<int64_t, std::function<void()>> after_ ABSL_GUARDED_BY(mu_);
  int64_t park_pull_ ABSL_GUARDED_BY(mu_) = -1;
  int64_t park_push_ ABSL_GUARDED_BY(mu_) = -1;
  // Waiting for what does not come by itself.
  bool pull_parked_ ABSL_GUARDED_BY(mu_) = false;
  bool push_parked_ ABSL_GUARDED_BY(mu_) = false;
  bool pull_waits_ ABSL_GUARDED_BY(mu_) = false;
  bool pull_cancelled_ ABSL_GUARDED_BY(mu_) = false;
  bool push_cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<Pushed> pushes_ ABSL_GUARDED_BY(mu_);
  std::vector<HeartbeatRequest> heartbeats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TESTING_FAKE_GROUP_H_
