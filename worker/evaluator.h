#ifndef CODISTILL_WORKER_EVALUATOR_H_
#define CODISTILL_WORKER_EVALUATOR_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/client/leader_client.h"
#include "common/metrics/metrics.h"
#include "common/model/followed_model.h"
#include "proto/control.pb.h"
#include "proto/job.pb.h"
#include "worker/data/dataset.h"

namespace codistill {

// The job's evaluator: follows every group, measures the cuts that evaluation.every_steps names on
// the validation set and reports to that group's leader. Cuts it has no time for are left out. When
// all groups have finished, it measures their last cuts side by side on the whole validation set,
// and how much the groups disagree, writes both to a file, and ends.
class Evaluator {
 public:
  // The parts of one group. Not owned.
  struct Group {
    FollowedModel* model = nullptr;
    LeaderClient* leader = nullptr;
  };
  struct Options {
    JobConfig job;
    const Dataset* validation = nullptr;  // not owned
    std::vector<Group> groups;            // by index in the job
    // Where the final results go, as JSON: {"group_disagreement": x, "groups": [{"name",
    // "generation", "step", "loss", "accuracy", "auc", "examples"}]}, without what a task does not
    // have. Written atomically. Empty: nowhere.
    std::string evaluation_file;
    Metrics* metrics = nullptr;  // not owned; optional
    absl::Duration poll = absl::Milliseconds(100);
    // A group whose leader is not heard of for so long is lost. Zero: twice the job's rejoin
    // timeout and a minute.
    absl::Duration patience = absl::ZeroDuration();
  };

  // Cuts an evaluator wants, for FollowedModel::Options::wants.
  static bool Wants(const JobConfig& job, int64_t step);

  explicit Evaluator(Options options);

  // OK when all groups have finished and are measured, or Drain was called. ABORTED names a group
  // that failed, UNAVAILABLE one that is not heard of.
  absl::Status Run();
  // Ends Run after the batch in hand. Any thread.
  void Drain();

  void FillStatus(DaemonStatus* status) const;

 private:
  using SnapshotPtr = std::shared_ptr<const FollowedModel::Snapshot>;

  const std::string& Name(size_t group) const { return options_.job.groups(group).name(); }
  absl::Status CheckAlive(size_t group) const;
  // Whether `held` is what a finished group will be judged by.
  bool IsLast(size_t group, const SnapshotPtr& held) const;
  absl::Status EvaluateCut(size_t group, const FollowedModel::Snapshot& snapshot);
  absl::Status EvaluateLast(const std::vector<SnapshotPtr>& held);
  absl::Status Report(size_t group, const EvaluationResult& result, absl::Duration patience);
  absl::Status WriteFile(double disagreement, const std::vector<EvaluationResult>& results) const;
  void SetState(const std::string& state, const std::string& detail, int64_t step);
  bool stopping() const;

  const Options options_;
  const absl::Duration patience_;
  const absl::Time start_;
  mutable Mutex mu_;
  bool drain_ ABSL_GUARDED_BY(mu_) = false;
  std::string state_ ABSL_GUARDED_BY(mu_) = "starting";
  std::string detail_ ABSL_GUARDED_BY(mu_);
  int64_t step_ ABSL_GUARDED_BY(mu_) = 0;
  double rate_ ABSL_GUARDED_BY(mu_) = 0;  // examples/s of the last evaluation
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_EVALUATOR_H_
