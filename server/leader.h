#ifndef CODISTILL_SERVER_LEADER_H_
#define CODISTILL_SERVER_LEADER_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/clock.h"
#include "common/base/executor.h"
#include "common/base/file.h"
#include "common/base/mutex.h"
#include "common/checkpoint/checkpoint_catalog.h"
#include "proto/control.pb.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "server/history.h"
#include "server/member_plan.h"
#include "server/membership.h"
#include "server/push_counts.h"
#include "server/push_ledger.h"
#include "server/shard_link.h"
#include "server/step_collector.h"
#include "server/worker_clocks.h"

namespace codistill {

// Told when a group's state has changed, from the leader's tick: it must not wait.
class GroupObserver {
 public:
  virtual ~GroupObserver() = default;
  virtual void OnGroupChange() = 0;
};

// The leader of one group: its step, membership, data cursor, schedules, history, checkpoints and
// recovery. It knows nothing of what shards store and talks to them through ShardLinks alone, so it
// could run as a process of its own.
//
// Life: the shards are probed until all are there; the newest checkpoint is chosen; a new
// generation begins and all shards load; when all workers have registered, training runs step by
// step; at stop.steps the group is finished and keeps serving its last cut. A shard that comes back
// as another process takes the whole group back to the last checkpoint under a new generation; in
// ASYNC it alone is loaded again, and a leader that was restarted goes on with the other shards.
//
// Everything happens in reaction to a call, to a link's answer, or to Tick, which the owner calls
// some 50 times a second: with a simulated clock and fake links, tests drive it step by step.
// Methods are thread-safe and never wait; callbacks and links are called without the lock. Files
// are written by tasks given to `run_io`.
class GroupLeader {
 public:
  struct Options {
    JobConfig job;
    int group = 0;
    ShardMap map;
    uint64_t map_digest = 0;
    uint64_t nonce = 0;             // of this leader: tells it from others
    std::vector<ShardLink*> links;  // by shard; not owned, outlive the leader's last callback
    Clock* clock = Clock::Real();
    FileSystem* file_system = FileSystem::Real();
    // Optional: told once, without the lock, when a newer leader has claimed the group's checkpoint
    // directory. This one decides nothing any more; its process should end with the error.
    std::function<void(absl::Status)> on_superseded;
    // Runs a task that reads and writes files, tasks one after another. Null: a thread of its own.
    std::function<void(std::function<void()>)> run_io;
  };
  // UNIMPLEMENTED for modes of training this version lacks.
  static absl::StatusOr<std::unique_ptr<GroupLeader>> Create(Options options);
  ~GroupLeader();

  // Where the shards are, as workers and followers are told, and this leader, as shards are told.
  // Once, before the first Tick.
  void SetAddresses(std::string leader_address, std::vector<std::string> shard_addresses);

  // Looks at the time: probes, retries, timeouts, observers.
  void Tick();
  // Ends the file tasks; afterwards nothing is sent to links any more.
  void Stop();

  template <typename T>
  using Done = std::function<void(absl::StatusOr<T>)>;

  // ------------------------------------------------------------- service Leader (see the proto)

  absl::StatusOr<RegisterReply> Register(const RegisterRequest& request);
  // Answers with an empty list at `deadline` if there is nothing to hand out.
  void GetAssignments(const GetAssignmentsRequest& request, absl::Time deadline,
                      Done<GetAssignmentsReply> done);
  absl::StatusOr<HeartbeatReply> Heartbeat(const HeartbeatRequest& request);
  absl::Status ReportEnd(const ReportEndRequest& request);
  absl::Status ReportEvaluation(const ReportEvaluationRequest& request);
  GetHistoryReply GetHistory() const;
  GroupState State(bool with_map) const;
  // The observer is told until it is gone.
  void Observe(std::weak_ptr<GroupObserver> observer);

  // ------------------------------------------------------------- service Control

  absl::Status Pause();
  absl::Status Resume();
  // A checkpoint of the next committed step, or of the present one where none is on its way.
  void Checkpoint(Done<CheckpointReply> done);
  // Ends the work in hand; `done` gets OK, or what the group failed with.
  void Drain(std::function<void(absl::Status)> done);
  void FillStatus(DaemonStatus* status) const;

  struct Counters {
    int64_t restores = 0;
    int64_t checkpoints = 0;
    int64_t failures = 0;
    int64_t rejected = 0;  // pushes
    int64_t dropped = 0;   // members' pushes that steps were decided without
    int64_t members = 0;   // now
  };
  Counters counters() const;
  AsyncCounters async_counters() const;  // zeros in SYNC
  // What the shards have answered, by rank.
  std::map<int32_t, PushCounts> push_counts() const;

 private:
  enum class Stage {
    kGathering,  // waiting for the shards
    kOpening,    // choosing what to load
    kRestoring,  // shards are loading
    kReady,
  };
  struct ShardState {
    uint64_t nonce = 0;  // of the process that loaded this generation; before that, as probed
    uint64_t generation = 0;
    bool seen = false;
    bool loaded = false;  // this generation
    bool restore_in_flight = false;
    bool probe_in_flight = false;
    bool reachable = true;
    absl::Time last_probe = absl::InfinitePast();
    absl::Time last_answer = absl::InfinitePast();
    absl::Time retry_restore = absl::InfinitePast();
    int64_t step = 0;          // ASYNC: its own count
    uint64_t incarnation = 0;  // RestoreRequest.shard_incarnation
    bool keep = false;         // ASYNC: it has outlived the leader before
    ShardLoad load;            // as it last told
  };
  struct ParkedAssignments {
    GetAssignmentsRequest request;
    absl::Time deadline;
    Done<GetAssignmentsReply> done;
  };
  // One decision on its way to the shards.
  struct CommitInFlight {
    CommitRequest request;
    bool again = false;  // of a step already committed, to keep a snapshot of it
    StepCollector::Decision decision;
    std::vector<bool> acknowledged;
    std::vector<bool> sent;
    std::vector<int64_t> shard_steps;
    absl::Time retry = absl::InfinitePast();
    bool preparing = false;  // the shards are asked for norms first
    std::vector<PrepareReply> prepared;
  };
  struct CheckpointInFlight {
    int64_t number = 0;  // answers to an earlier one, which failed on another shard, are ignored
    CheckpointManifest manifest;  // files are filled in as they are written
    std::vector<uint32_t> attempt;
    std::vector<bool> written;
    std::vector<bool> sent;
    absl::Time retry = absl::InfinitePast();
    absl::Time begin;
    bool scheduled = true;  // false: only people asked for it, and its failure is theirs alone
  };
  struct AsyncRank {
    int64_t next_step = 1;
    std::deque<Assignment> issued;  // the newest few, to be given again if an answer was lost
  };
  struct AsyncCut {
    int64_t step = 0;
    bool publish = false;
    bool checkpoint = false;
  };
  // What a generation begins from.
  struct Opening {
    absl::Status status;
    uint64_t generation = 0;
    uint64_t last_generation = 0;  // of an earlier leader; 0 = none, or not known
    std::unique_ptr<CheckpointManifest> manifest;
    std::vector<absl::Status> refused;
    uint64_t claim = 0;
    bool adopted = false;  // ASYNC: the generation of shards that are kept
  };

  // Restores in a row without one committed step in between.
  static constexpr int kMaxFruitlessRestores = 20;

  explicit GroupLeader(Options options);
  template <typename Body>
  void Enter(Body body);

  std::string GroupName() const { return job_.groups(options_.group).name(); }
  GroupRef Ref() const;
  bool HasDirectory() const { return !directory_path_.empty(); }

  // --- leader.cc
  // The last step is committed, published and, where there is a directory, on disk.
  bool Finished() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  GroupState::Phase PhaseNow() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void NotePhase() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Looks whether the checkpoint directory is still this leader's.
  void TickClaim(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnClaimChecked(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Fail(const std::string& message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckServing(uint64_t generation) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FillState(bool with_map, GroupState* state) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FillHistory(GetHistoryReply* reply) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FillAsync(AsyncCounters* counters) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  double TrainingSeconds(absl::Time now) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TickMissing(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TickDrain(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TickRate(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TickObservers(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndDrain(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- leader_members.cc
  void MaybeStart(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TickLeases(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // A worker itself has called.
  void Heard(int32_t rank, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // ELASTIC: somebody came or went. Takes effect after what has been handed out.
  void PlanMembers() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // ELASTIC, asynchronous: whoever has no lease holds nobody up.
  void CountClocks() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Whom a generation begins with.
  std::vector<MemberPlan::Member> FirstMembers() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // ELASTIC: fewer members than training may go on with.
  bool TooFew() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Ranks of a step's members; of those, the ones whose push may still come.
  std::vector<int32_t> MembersAt(int64_t step, bool awaited) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool ReadyToDecide(int64_t step, const StepCollector& collector) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // ELASTIC: nobody is left of those who were given the next step: it is planned anew.
  void ReplanIfDeserted() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FillPushes(GetHistoryReply* reply) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::string WaitingForWorkers() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- leader_assign.cc
  bool TryAssign(const GetAssignmentsRequest& request, GetAssignmentsReply* reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AssignSync(const GetAssignmentsRequest& request, GetAssignmentsReply* reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AssignAsync(const GetAssignmentsRequest& request, GetAssignmentsReply* reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // ASYNC: a worker has registered.
  void NoteRegistrant(const RegisterRequest& request, bool another)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // ASYNC: a rank's steps up to `step` are over, its worker says.
  void NoteOver(int32_t rank, int64_t step) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WakeAssignments() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FailAssignments(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ExpireAssignments(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- leader_steps.cc
  void OnEndSync(const ReportEndRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnEndAsync(const ReportEndRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TryDecide() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TryDecideSync() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TryDecideAsync() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StartCommit(std::unique_ptr<CommitInFlight> commit) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // A push is refused for the named tensor: counted, logged, and told in the status.
  void NoteRejected(int64_t step, int32_t rank, const std::string& tensor)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool NeedsPrepare(const CommitInFlight& commit) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SendPrepare() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnPrepareReply(uint64_t epoch, int shard, const absl::StatusOr<PrepareReply>& reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SendCommit() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnCommitReply(uint64_t epoch, int shard, const absl::StatusOr<CommitReply>& reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnCommitted() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CountStep(int64_t step, const StepStatistics& statistics) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint64_t NextExample() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- leader_checkpoint.cc
  bool SnapshotDue(int64_t step) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Workers of a recurrent model bring their state with every step: a worker that alone is
  // restarted goes on from it, and which step a drain or people's checkpoint will be of is not
  // known ahead.
  bool StateWithEveryStep() const { return job_.model().states_size() > 0; }
  void StartCheckpoint(const CommitInFlight& commit) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SendCheckpoint() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnCheckpointReply(uint64_t epoch, int64_t number, int shard,
                         const absl::StatusOr<WriteCheckpointReply>& reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnManifestWritten(uint64_t epoch, const absl::Status& status)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndCheckpoint(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AnswerCheckpointWaiters(const absl::StatusOr<CheckpointReply>& reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- leader_restore.cc
  void TickProbes(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnProbeReply(uint64_t epoch, int shard, bool was_loaded,
                    const absl::StatusOr<ProbeReply>& reply) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void BeginRestore(const std::string& reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Open() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Runs on the file thread, without the lock.
  Opening ReadOpening(uint64_t at_least, uint64_t adopt, const std::vector<Version>& except);
  absl::Status CheckManifest(const CheckpointManifest& manifest) const;
  void OnOpened(uint64_t epoch, Opening opening) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint64_t NextIncarnation(uint64_t before) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TickRestore(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnRestoreReply(uint64_t epoch, int shard, const absl::StatusOr<RestoreReply>& reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnRestored() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- leader_reload.cc
  // A shard's process has taken what it held with it: in ASYNC it is loaded alone, where others are
  // left; else the whole group is restored.
  void LoseShard(int shard, const std::string& reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Reloading() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnReloadOpened(uint64_t epoch, Opening opening) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // A shard that had made `from` updates goes on from what `manifest` has.
  void CountLostUpdates(int shard, int64_t from, const CheckpointManifest* manifest)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnReloaded() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  Options options_;  // not changed after Create
  const JobConfig& job_;
  const bool sync_;
  const bool elastic_;
  const int num_shards_;
  const int num_workers_;  // that the group begins with
  const int max_workers_;  // ranks there may be
  const int min_workers_;
  const int backup_workers_;
  const absl::Duration lease_;
  const int64_t stop_steps_;
  const int64_t max_staleness_;  // BOUNDED_STALENESS; negative: no bound
  const absl::Duration rejoin_timeout_;
  const std::string directory_path_;  // empty: no checkpoints

  // Used by file tasks only, which run one after another.
  std::unique_ptr<CheckpointCatalog> directory_;

  std::string address_;  // of the leader
  std::vector<std::string> shard_addresses_;

  mutable Mutex mu_;
  // What to do once the lock is released, in order.
  std::vector<std::function<void()>> effects_ ABSL_GUARDED_BY(mu_);
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;

  Stage stage_ ABSL_GUARDED_BY(mu_) = Stage::kGathering;
  // Answers to what was asked before the last change of course carry an older epoch and are
  // ignored.
  uint64_t epoch_ ABSL_GUARDED_BY(mu_) = 1;
  int64_t checkpoint_number_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t generation_ ABSL_GUARDED_BY(mu_) = 0;
  bool opened_before_ ABSL_GUARDED_BY(mu_) = false;
  bool started_ ABSL_GUARDED_BY(mu_) = false;  // all workers it begins with have registered
  bool paused_ ABSL_GUARDED_BY(mu_) = false;
  bool failed_ ABSL_GUARDED_BY(mu_) = false;
  std::string error_ ABSL_GUARDED_BY(mu_);
  bool superseded_ ABSL_GUARDED_BY(mu_) = false;  // failed_ too, but others go on without us
  uint64_t claim_ ABSL_GUARDED_BY(mu_) = 0;       // number of our claim; 0 = no directory
  bool claim_in_flight_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time last_claim_check_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  std::string manifest_ ABSL_GUARDED_BY(mu_);  // what this generation began from; empty: initial
  std::unique_ptr<CheckpointManifest> origin_ ABSL_GUARDED_BY(mu_);  // the same; null: initial
  bool taken_up_ ABSL_GUARDED_BY(mu_) = false;  // an earlier leader had this group
  std::vector<Version> unloadable_ ABSL_GUARDED_BY(mu_);
  bool adopting_ ABSL_GUARDED_BY(mu_) = false;      // ASYNC: kept shards are being taken over
  int64_t furthest_step_ ABSL_GUARDED_BY(mu_) = 0;  // any rank's own step on them
  bool reload_known_ ABSL_GUARDED_BY(mu_) = false;  // what lost shards are loaded from: reload_
  std::unique_ptr<CheckpointManifest> reload_ ABSL_GUARDED_BY(mu_);  // null: initial weights
  int fruitless_restores_ ABSL_GUARDED_BY(mu_) = 0;  // since the last committed step
  std::vector<ShardState> shards_ ABSL_GUARDED_BY(mu_);
  absl::Time ready_since_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Time last_waiting_log_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();

  Membership membership_ ABSL_GUARDED_BY(mu_);
  MemberPlan plan_ ABSL_GUARDED_BY(mu_);  // SYNC
  PushTotals pushes_ ABSL_GUARDED_BY(mu_);
  absl::Time last_tick_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  absl::Time leases_from_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  History history_ ABSL_GUARDED_BY(mu_);
  std::vector<ParkedAssignments> parked_ ABSL_GUARDED_BY(mu_);

  int64_t step_ ABSL_GUARDED_BY(mu_) = 0;        // newest committed
  int64_t newest_cut_ ABSL_GUARDED_BY(mu_) = 0;  // valid once ready
  std::vector<int64_t> cut_shard_steps_ ABSL_GUARDED_BY(mu_);
  int64_t handed_out_ ABSL_GUARDED_BY(mu_) = 0;  // SYNC: largest step assigned
  uint64_t async_cursor_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<int32_t, AsyncRank> async_ranks_ ABSL_GUARDED_BY(mu_);
  WorkerClocks clocks_ ABSL_GUARDED_BY(mu_);
  AsyncLedger ledger_ ABSL_GUARDED_BY(mu_);
  AsyncCounters async_totals_ ABSL_GUARDED_BY(mu_);  // what the ledger does not count
  // By rank. SYNC: those of step_, where it was asked for them; ASYNC: the newest of each rank.
  std::map<int32_t, std::string> worker_states_ ABSL_GUARDED_BY(mu_);
  std::deque<AsyncCut> async_cuts_ ABSL_GUARDED_BY(mu_);
  absl::Time async_last_step_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  bool async_final_ ABSL_GUARDED_BY(mu_) = false;
  int64_t examples_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<int64_t, StepCollector> collectors_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<CommitInFlight> commit_ ABSL_GUARDED_BY(mu_);
  std::string last_rejected_ ABSL_GUARDED_BY(mu_);  // for people; empty if none was

  std::unique_ptr<CheckpointInFlight> checkpoint_ ABSL_GUARDED_BY(mu_);
  int64_t checkpointed_step_ ABSL_GUARDED_BY(mu_) = -1;
  CheckpointReply last_checkpoint_ ABSL_GUARDED_BY(mu_);
  int64_t requested_step_ ABSL_GUARDED_BY(mu_) = -1;  // a checkpoint people asked for
  bool snapshot_now_ ABSL_GUARDED_BY(mu_) = false;    // a checkpoint of the present step
  std::vector<Done<CheckpointReply>> checkpoint_waiters_ ABSL_GUARDED_BY(mu_);

  absl::Time training_begin_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  absl::Time last_commit_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  double base_seconds_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t restores_ ABSL_GUARDED_BY(mu_) = 0;
  Counters counters_ ABSL_GUARDED_BY(mu_);

  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  bool drain_frozen_ ABSL_GUARDED_BY(mu_) = false;  // the last step is behind us
  absl::Time drain_begin_ ABSL_GUARDED_BY(mu_);
  std::vector<std::function<void(absl::Status)>> drain_done_ ABSL_GUARDED_BY(mu_);

  GroupState::Phase noted_phase_ ABSL_GUARDED_BY(mu_) = GroupState::PHASE_INVALID;
  bool changed_ ABSL_GUARDED_BY(mu_) = true;  // since observers were told
  absl::Time last_told_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  std::vector<std::weak_ptr<GroupObserver>> observers_ ABSL_GUARDED_BY(mu_);
  std::deque<std::pair<absl::Time, int64_t>> rate_ ABSL_GUARDED_BY(mu_);

  std::unique_ptr<Executor> io_executor_;
};

// Runs `body` under the lock, then what it has left to be done, without it.
template <typename Body>
void GroupLeader::Enter(Body body) {
  std::vector<std::function<void()>> effects;
  {
    MutexLock lock(&mu_);
    body();
    NotePhase();
    effects.swap(effects_);
  }
  for (const std::function<void()>& effect : effects) effect();
}

}  // namespace codistill

#endif  // CODISTILL_SERVER_LEADER_H_
