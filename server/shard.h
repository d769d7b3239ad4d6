#ifndef CODISTILL_SERVER_SHARD_H_
#define CODISTILL_SERVER_SHARD_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/clock.h"
#include "common/base/executor.h"
#include "common/base/file.h"
#include "common/base/mutex.h"
#include "proto/checkpoint.pb.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "server/embedding_store.h"
#include "server/pull_source.h"
#include "server/push_counts.h"
#include "server/push_outcomes.h"
#include "server/shard_store.h"
#include "server/staged_push.h"

namespace codistill {

// How a shard tells its leader that a push has wholly arrived. Thread-safe; `done` may be called on
// any thread, also before the call returns.
class EndReporter {
 public:
  virtual ~EndReporter() = default;
  // Where the leader is from now on.
  virtual void SetLeader(const std::string& address) = 0;
  virtual void ReportEnd(ReportEndRequest request, std::function<void(absl::Status)> done) = 0;
  // Ends what is under way and waits for it; later reports are answered UNAVAILABLE at once. The
  // reporter itself must outlive the shard.
  virtual void Stop() {}
};

struct ShardCounters {
  int64_t commits = 0;
  int64_t restores = 0;
  int64_t failures = 0;  // restores and checkpoints that failed, pushes refused
  int64_t checkpoints = 0;
  int64_t rejected = 0;   // pushes answered REJECTED
  int64_t too_stale = 0;  // pushes answered TOO_STALE
  // ASYNC, of what was applied: the most by which a worker's own step was behind the one furthest
  // ahead, and the most updates between a push's weights and the update it made.
  int64_t max_staleness = 0;
  int64_t max_update_lag = 0;
  int64_t pulls = 0;        // answered with weights
  uint64_t pull_bytes = 0;  // of those, payload
  int64_t pushes = 0;       // ended, whatever they were answered
  uint64_t push_bytes = 0;  // of those, payload
  uint64_t checkpoint_bytes = 0;
  int64_t staged_pushes = 0;  // now, complete and incomplete
  int64_t parked_calls = 0;   // now
};

// The protocol of one shard (proto/parameter_server.proto): which generation it is in, what is
// staged, which calls wait for what, and when the store takes a step. The service files only
// translate.
//
// SYNC: a push is staged; at END the leader is told, and told again until it has answered; the push
// is answered at the leader's Commit. ASYNC: a push is applied at END, in order of arrival, and
// answered; the leader hears of it afterwards (ReportEndRequest.step is then the shard's own
// count).
//
// Lock order: mu_, then the store's. Callbacks are called without locks. Long work (updates,
// loading, cuts) runs in order on one thread, checkpoint files are written on another. Thread-safe.
class ModelShard {
 public:
  struct Options {
    JobConfig job;
    int group = 0;
    int shard = 0;
    ShardMap map;
    uint64_t map_digest = 0;
    uint64_t process_nonce = 0;
    EndReporter* reporter = nullptr;  // not owned
    FileSystem* file_system = FileSystem::Real();
    Clock* clock = Clock::Real();
    std::function<void(double seconds)> on_commit;  // optional: time an update took
  };
  static absl::StatusOr<std::unique_ptr<ModelShard>> Create(Options options);
  ~ModelShard();

  template <typename T>
  using Done = std::function<void(absl::StatusOr<T>)>;

  // -------------------------------------------------------------------- calls of the leader

  ProbeReply Probe();
  void Restore(RestoreRequest request, Done<RestoreReply> done);
  void Prepare(PrepareRequest request, Done<PrepareReply> done);
  void Commit(CommitRequest request, Done<CommitReply> done);
  void WriteCheckpoint(WriteCheckpointRequest request, Done<WriteCheckpointReply> done);
  // When the leader last called, whatever it called.
  absl::Time last_leader_call() const;

  // -------------------------------------------------------------------- calls of workers

  // Checks who pushes and makes room. Abandoned by letting go of the result.
  absl::StatusOr<std::shared_ptr<StagedPush>> BeginPush(const PushBegin& begin);
  // Ends a push; `done` comes with the decision.
  void EndPush(std::shared_ptr<StagedPush> push, PushEnd end, Done<PushReply> done);
  // A push that was begun ends without EndPush: `refused`, or its connection was lost.
  void DropPush(const StagedPush& push, bool refused);

  // Comes when the version asked for is there.
  void Pull(const PullRequest& request, Done<std::unique_ptr<PullSource>> done);

  // Checks a pull of rows; comes with the version that is there when the tables may be read. With
  // kStep the reader makes sure that they still are of that step (EmbeddingTable::Gather).
  void PullRows(const PullRowsRequest& request, Done<Version> done);

  // -------------------------------------------------------------------- calls of followers

  // The embedding tables at a published cut.
  void Follow(FollowRequest request, Done<std::unique_ptr<FollowReader>> done);

  // -------------------------------------------------------------------- life

  // Repeats reports that the leader has not answered. Call a few times a second.
  void Tick();
  // Answers everything that waits with UNAVAILABLE, and everything that comes.
  void Drain();

  struct State {
    uint64_t generation = 0;  // 0 = nothing loaded
    int64_t step = 0;
    int64_t newest_cut = -1;
    bool loading = false;
  };
  State state() const;
  ShardCounters counters() const;
  // What became of pushes so far, by rank.
  std::vector<RankPushes> push_counts() const;
  ShardLoad load() const;
  const ShardStore& store() const { return *store_; }
  EmbeddingStore* embeddings() { return embeddings_.get(); }
  const EmbeddingStore& embeddings() const { return *embeddings_; }

 private:
  // A complete push that waits for its decision (SYNC).
  struct Waiting {
    std::shared_ptr<StagedPush> push;
    PushEnd end;
    Done<PushReply> done;
    bool reported = false;   // the leader has it
    bool reporting = false;  // a report is under way
  };
  struct ParkedPull {
    PullRequest request;
    Done<std::unique_ptr<PullSource>> done;
  };
  struct ParkedRows {
    PullRowsRequest request;  // without its keys
    Done<Version> done;
  };
  struct Decision {
    int64_t step = 0;
    std::set<int32_t> applied, rejected;
  };
  // The last checkpoint file: a leader that lost the answer asks again when the snapshot is gone.
  struct Written {
    uint64_t generation = 0;  // 0 = none
    int64_t step = 0;
    std::string directory;
    WriteCheckpointReply reply;
  };
  using Effects = std::vector<std::function<void()>>;

  explicit ModelShard(Options options);

  bool sync() const { return sync_; }
  std::string Name() const;

  absl::Status CheckGeneration(uint64_t generation) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FailAll(const absl::Status& status, Effects* effects) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  absl::StatusOr<RestoreReply> DoRestore(const RestoreRequest& request);
  absl::Status Load(const RestoreRequest& request);
  // The pushes of a decision, held for as long as the result lives. FAILED_PRECONDITION names one
  // that is not staged.
  absl::StatusOr<std::vector<std::shared_ptr<StagedPush>>> Staged(
      int64_t step, const google::protobuf::RepeatedPtrField<Contributor>& contributors) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<PrepareReply> DoPrepare(const PrepareRequest& request);
  absl::StatusOr<CommitReply> DoCommit(const CommitRequest& request);
  absl::StatusOr<CommitReply> DoCommitSync(const CommitRequest& request);
  absl::StatusOr<CommitReply> DoCommitAsync(const CommitRequest& request);
  void Keep(const CommitRequest& request);
  void Resolve(const CommitRequest& request, Effects* effects) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<WriteCheckpointReply> DoWriteCheckpoint(const WriteCheckpointRequest& request);
  absl::StatusOr<std::vector<CheckpointFile>> WriteTables(const WriteCheckpointRequest& request);

  void EndPushAsync(std::shared_ptr<StagedPush> push, PushEnd end, Done<PushReply> done);
  absl::StatusOr<PushReply> DecideAsync(const StagedPush& push, const PushEnd& end);
  void NoteAsync(const StagedPush& push, const PushEnd& end, const PushReply& reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // `done`, counting the answer.
  Done<PushReply> Counted(int32_t rank, Done<PushReply> done);
  // What a push of a decided step is answered.
  PushReply DecidedAlready(const PushBegin& begin) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::pair<int32_t, int64_t> Place(const PushBegin& begin) const {
    return {begin.rank(), begin.step() % (weights_lag_ + 1)};
  }
  void Report(int32_t rank, uint64_t incarnation, Waiting* waiting, Effects* effects)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnReported(uint64_t generation, int64_t step, int32_t rank, uint64_t incarnation,
                  const absl::Status& status);
  void SendAsyncReports();

  absl::StatusOr<std::unique_ptr<FollowReader>> DoFollow(const FollowRequest& request);

  // Empty when the pull must wait.
  absl::StatusOr<std::unique_ptr<PullSource>> TryPull(const PullRequest& request)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Generation 0 when the pull must wait.
  absl::StatusOr<Version> TryPullRows(const PullRowsRequest& request)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WakeRows(Effects* effects) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ApplyRows(int64_t step, double learning_rate,
                 absl::Span<const ShardStore::Contribution> contributions);
  void WakePulls(Effects* effects) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  const bool sync_;
  const std::string group_name_;
  const int max_workers_;        // ranks there may be
  const int64_t max_staleness_;  // BOUNDED_STALENESS; negative: no bound
  const int64_t weights_lag_;    // steps that a push may be ahead of the next to be decided
  std::shared_ptr<ShardStore> store_;
  std::unique_ptr<EmbeddingStore> embeddings_;

  mutable Mutex mu_;
  uint64_t generation_ ABSL_GUARDED_BY(mu_) = 0;  // 0 while nothing is loaded
  uint64_t newest_generation_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t incarnation_ ABSL_GUARDED_BY(mu_) = 0;  // RestoreRequest.shard_incarnation
  uint64_t leader_nonce_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t leader_claim_ ABSL_GUARDED_BY(mu_) = 0;  // the largest seen
  int64_t step_ ABSL_GUARDED_BY(mu_) = 0;           // as workers see it
  bool loading_ ABSL_GUARDED_BY(mu_) = false;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time last_leader_call_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();

  std::map<int32_t, uint64_t> newest_incarnation_ ABSL_GUARDED_BY(mu_);
  // The newest of each rank; with weights_lag the newest two, of which one may be begun before the
  // other is decided: by (rank, step modulo their number).
  std::map<std::pair<int32_t, int64_t>, std::weak_ptr<StagedPush>> open_ ABSL_GUARDED_BY(mu_);
  // By (rank, incarnation): at most the two newest incarnations of a rank.
  std::map<std::pair<int32_t, uint64_t>, Waiting> waiting_ ABSL_GUARDED_BY(mu_);
  std::deque<Decision> decisions_ ABSL_GUARDED_BY(mu_);
  std::vector<ParkedPull> parked_pulls_ ABSL_GUARDED_BY(mu_);
  // SYNC with weights_lag: the weights before the newest step, on which the next may still be
  // computed. Null before the first.
  std::shared_ptr<const Cut> previous_ ABSL_GUARDED_BY(mu_);
  std::vector<ParkedRows> parked_rows_ ABSL_GUARDED_BY(mu_);

  // ASYNC: what pushes were answered, and the reports of it that are to be sent.
  PushOutcomes outcomes_ ABSL_GUARDED_BY(mu_);
  std::deque<ReportEndRequest> async_reports_ ABSL_GUARDED_BY(mu_);
  bool async_reporting_ ABSL_GUARDED_BY(mu_) = false;

  Written written_ ABSL_GUARDED_BY(mu_);
  ShardCounters counters_ ABSL_GUARDED_BY(mu_);
  PushTally pushes_ ABSL_GUARDED_BY(mu_);

  // Last, so that they end before what their tasks use.
  std::unique_ptr<Executor> executor_;     // the store's one writer
  std::unique_ptr<Executor> io_executor_;  // checkpoint files
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_SHARD_H_
