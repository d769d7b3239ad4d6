#ifndef CODISTILL_SERVER_MEMBERSHIP_H_
#define CODISTILL_SERVER_MEMBERSHIP_H_

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/checkpoint.pb.h"
#include "proto/control.pb.h"
#include "proto/parameter_server.pb.h"
#include "server/member_plan.h"

namespace codistill {

// The workers of a group: who holds each rank, when it was last heard of, what it has counted. The
// newest process of a rank wins. A rank has a lease from its registration on, or from any later
// sign of life of its process; it ends when the process says that it leaves and, with ELASTIC
// membership, when it falls silent. Not thread-safe: part of the leader's state.
class Membership {
 public:
  // `num_workers`: ranks there may be.
  Membership(std::string group, int num_workers);

  int size() const { return static_cast<int>(members_.size()); }

  // INVALID_ARGUMENT unless 0 <= rank < size().
  absl::Status CheckRank(int32_t rank) const;

  // A process takes a rank; returns its incarnation, which is the same when it asks again.
  // Incarnations start from the clock, so that they grow across restarts of the leader too.
  // FAILED_PRECONDITION: this process was replaced by a newer one already.
  absl::StatusOr<uint64_t> Register(const RegisterRequest& request, absl::Time now);

  // FAILED_PRECONDITION if a newer process has the rank. ABORTED, to be answered by registering
  // again: this process (`nonce`, where it is known) has got a newer incarnation meanwhile, or
  // (`known_only`) it is not registered.
  absl::Status Check(int32_t rank, uint64_t incarnation, bool known_only, uint64_t nonce = 0) const;
  bool registered(int32_t rank) const { return members_[rank].incarnation != 0; }
  // Whether this process has the rank.
  bool Is(int32_t rank, uint64_t process_nonce) const {
    return registered(rank) && members_[rank].nonce == process_nonce;
  }
  uint64_t incarnation(int32_t rank) const { return members_[rank].incarnation; }

  // Something came from this rank's present process: its lease runs from now.
  void Heard(int32_t rank, absl::Time now);
  // The same with what a heartbeat brings. Only for the rank's present incarnation.
  void Heartbeat(const HeartbeatRequest& request, absl::Time now);
  // A shard brought something that the rank had sent, perhaps long ago: no sign of life for a
  // lease.
  void HeardThroughShard(int32_t rank, absl::Time now);

  // Whether the rank's lease runs.
  bool live(int32_t rank) const { return members_[rank].live; }
  // Those whose leases run, in order of rank.
  std::vector<MemberPlan::Member> Live() const;
  // Ends the leases of all not heard from for longer than `lease`, counted from `since` at the
  // earliest; says whose.
  std::vector<int32_t> EndLeases(absl::Time now, absl::Duration lease, absl::Time since);
  // Comings and goings so far.
  MembershipCounts counts() const;
  absl::Time last_heard(int32_t rank) const { return members_[rank].last_heard; }

  bool AllRegistered() const;
  // All that ever registered have said that they leave.
  bool AllLeft() const;
  std::vector<int32_t> Unregistered() const;

  // Sums over ranks and incarnations, with what a checkpoint brought.
  WorkerCounters Totals() const;

  // Puts what the ranks have counted into `manifest`.
  void Save(CheckpointManifest* manifest) const;
  // Takes up what Save wrote, before anybody has registered. A process that was counted there goes
  // on from its own counters; another adds to them. `totals` stands in for a manifest without
  // members.
  void Load(const CheckpointManifest& manifest, const WorkerCounters& totals);

  // Ranks from `expected` on are shown once they have registered.
  void FillStatus(absl::Time now, int expected, DaemonStatus* status) const;

 private:
  struct Member {
    uint64_t incarnation = 0;  // 0 = nobody yet
    uint64_t nonce = 0;        // before anybody has registered: of the process in the checkpoint
    std::deque<uint64_t> replaced;  // nonces of the processes before; the newest few
    std::string address, http_address, state;
    absl::Time last_heard = absl::InfinitePast();
    absl::Time last_sign = absl::InfinitePast();  // of life
    bool left = false;
    bool live = false;
    WorkerCounters counters;  // of this incarnation
    WorkerCounters earlier;   // of the ones before
  };
  void BeginLease(Member* member, absl::Time now);

  const std::string group_;
  std::vector<Member> members_;
  MembershipCounts counts_;
  WorkerCounters base_;  // of no rank of ours
};

// Adds `more` to `sum`: sums, except for the first step (the smallest that is not 0) and the
// largest staleness.
void AddCounters(const WorkerCounters& more, WorkerCounters* sum);

}  // namespace codistill

#endif  // CODISTILL_SERVER_MEMBERSHIP_H_
