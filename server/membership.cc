#include "server/membership.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace codistill {
namespace {

constexpr size_t kReplacedNonces = 16;

}  // namespace

Membership::Membership(std::string group, int num_workers)
    : group_(std::move(group)), members_(num_workers) {}

absl::Status Membership::CheckRank(int32_t rank) const {
  if (rank >= 0 && rank < size()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("rank ", rank, " is none of group ", group_, "'s ", size(), " workers"));
}

absl::StatusOr<uint64_t> Membership::Register(const RegisterRequest& request, absl::Time now) {
  CODISTILL_RETURN_IF_ERROR(CheckRank(request.rank()));
  Member& member = members_[request.rank()];
  if (member.incarnation == 0 || member.nonce != request.process_nonce()) {
    if (std::count(member.replaced.begin(), member.replaced.end(), request.process_nonce()) > 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("worker ", request.rank(), " of group ", group_,
                       ": a newer process has taken this one's place; leave"));
    }
    if (member.incarnation != 0) {
      if (member.live) {
        member.live = false;
        counts_.set_replaced(counts_.replaced() + 1);
      }
      member.replaced.push_back(member.nonce);
      if (member.replaced.size() > kReplacedNonces) member.replaced.pop_front();
    }
    if (member.nonce != request.process_nonce()) {
      AddCounters(member.counters, &member.earlier);
      member.counters.Clear();
      member.nonce = request.process_nonce();
    }
    member.incarnation =
        std::max(member.incarnation + 1,
                 static_cast<uint64_t>(std::max<int64_t>(1, absl::ToUnixMicros(now))));
  }
  member.address = request.address();
  member.http_address = request.http_address();
  member.state = "registered";
  member.left = false;
  member.last_heard = now;
  BeginLease(&member, now);
  return member.incarnation;
}

absl::Status Membership::Check(int32_t rank, uint64_t incarnation, bool known_only,
                               uint64_t nonce) const {
  CODISTILL_RETURN_IF_ERROR(CheckRank(rank));
  const Member& member = members_[rank];
  if (incarnation < member.incarnation && nonce != 0 && nonce == member.nonce) {
    return absl::AbortedError(absl::StrCat("worker ", rank, " of group ", group_, ": incarnation ",
                                           incarnation, " is now ", member.incarnation,
                                           "; register again"));
  }
  if (incarnation < member.incarnation) {
    return absl::FailedPreconditionError(
        absl::StrCat("worker ", rank, " of group ", group_, ": incarnation ", incarnation,
                     " was replaced by ", member.incarnation, "; leave"));
  }
  if (known_only && incarnation != member.incarnation) {
    return absl::AbortedError(absl::StrCat("worker ", rank, " of group ", group_, ": incarnation ",
                                           incarnation, " is not registered; register again"));
  }
  return absl::OkStatus();
}

void Membership::BeginLease(Member* member, absl::Time now) {
  member->last_sign = now;
  if (member->live) return;
  member->live = true;
  counts_.set_joined(counts_.joined() + 1);
}

void Membership::Heard(int32_t rank, absl::Time now) {
  Member& member = members_[rank];
  member.last_heard = now;
  // What a process sends on its way out does not bring it back.
  if (!member.left) BeginLease(&member, now);
}

void Membership::HeardThroughShard(int32_t rank, absl::Time now) {
  members_[rank].last_heard = now;
}

void Membership::Heartbeat(const HeartbeatRequest& request, absl::Time now) {
  Member& member = members_[request.rank()];
  member.counters = request.counters();
  member.state = request.leaving() ? "left" : request.state();
  if (request.leaving() && member.live) {
    member.live = false;
    counts_.set_left(counts_.left() + 1);
  }
  member.left = request.leaving();
  Heard(request.rank(), now);
}

std::vector<MemberPlan::Member> Membership::Live() const {
  std::vector<MemberPlan::Member> live;
  for (int32_t rank = 0; rank < size(); ++rank) {
    if (members_[rank].live) live.push_back({rank, members_[rank].incarnation});
  }
  return live;
}

std::vector<int32_t> Membership::EndLeases(absl::Time now, absl::Duration lease, absl::Time since) {
  std::vector<int32_t> ended;
  for (int32_t rank = 0; rank < size(); ++rank) {
    Member& member = members_[rank];
    if (!member.live || now - std::max(member.last_sign, since) <= lease) continue;
    member.live = false;
    member.state = "lease ended";
    counts_.set_leases_ended(counts_.leases_ended() + 1);
    ended.push_back(rank);
  }
  return ended;
}

MembershipCounts Membership::counts() const {
  MembershipCounts counts = counts_;
  counts.set_members(static_cast<int32_t>(Live().size()));
  return counts;
}

bool Membership::AllRegistered() const { return Unregistered().empty(); }

bool Membership::AllLeft() const {
  return std::all_of(members_.begin(), members_.end(),
                     [](const Member& m) { return m.incarnation == 0 || m.left || !m.live; });
}

std::vector<int32_t> Membership::Unregistered() const {
  std::vector<int32_t> ranks;
  for (int32_t rank = 0; rank < size(); ++rank) {
    if (!registered(rank)) ranks.push_back(rank);
  }
  return ranks;
}

WorkerCounters Membership::Totals() const {
  WorkerCounters totals = base_;
  for (const Member& member : members_) {
    AddCounters(member.earlier, &totals);
    AddCounters(member.counters, &totals);
  }
  // A rate is of now, not of all times.
  double rate = 0;
  for (const Member& member : members_) {
    if (member.live) rate += member.counters.examples_per_second();
  }
  totals.set_examples_per_second(rate);
  return totals;
}

void Membership::Save(CheckpointManifest* manifest) const {
  for (int32_t rank = 0; rank < size(); ++rank) {
    const Member& member = members_[rank];
    SavedMember* const saved = manifest->add_members();
    saved->set_rank(rank);
    saved->set_process_nonce(member.nonce);
    *saved->mutable_counters() = member.counters;
    *saved->mutable_earlier() = member.earlier;
    if (rank == 0) AddCounters(base_, saved->mutable_earlier());
  }
}

void Membership::Load(const CheckpointManifest& manifest, const WorkerCounters& totals) {
  if (manifest.members_size() == 0) {
    base_ = totals;
    return;
  }
  for (const SavedMember& saved : manifest.members()) {
    if (!CheckRank(saved.rank()).ok()) {  // the job had more workers
      AddCounters(saved.counters(), &base_);
      AddCounters(saved.earlier(), &base_);
      continue;
    }
    Member& member = members_[saved.rank()];
    member.nonce = saved.process_nonce();
    member.counters = saved.counters();
    member.counters.clear_examples_per_second();
    member.earlier = saved.earlier();
  }
}

void Membership::FillStatus(absl::Time now, int expected, DaemonStatus* status) const {
  for (int32_t rank = 0; rank < size(); ++rank) {
    const Member& member = members_[rank];
    if (rank >= expected && member.incarnation == 0) continue;
    MemberStatus* const out = status->add_members();
    out->set_rank(rank);
    out->set_incarnation(member.incarnation);
    out->set_state(member.incarnation == 0 ? "not registered" : member.state);
    out->set_address(member.address);
    out->set_http_address(member.http_address);
    if (member.incarnation != 0) {
      out->set_seconds_since_heartbeat(absl::ToDoubleSeconds(now - member.last_heard));
    }
    *out->mutable_counters() = member.counters;
    out->set_member(member.live);
  }
}

void AddCounters(const WorkerCounters& more, WorkerCounters* sum) {
  sum->set_steps(sum->steps() + more.steps());
  sum->set_examples(sum->examples() + more.examples());
  sum->set_pushes_dropped(sum->pushes_dropped() + more.pushes_dropped());
  sum->set_pushes_rejected(sum->pushes_rejected() + more.pushes_rejected());
  sum->set_pushes_too_stale(sum->pushes_too_stale() + more.pushes_too_stale());
  sum->set_push_bytes(sum->push_bytes() + more.push_bytes());
  sum->set_pull_bytes(sum->pull_bytes() + more.pull_bytes());
  sum->set_teacher_requests(sum->teacher_requests() + more.teacher_requests());
  sum->set_teacher_failures(sum->teacher_failures() + more.teacher_failures());
  sum->set_teacher_skipped_steps(sum->teacher_skipped_steps() + more.teacher_skipped_steps());
  sum->set_teacher_used_steps(sum->teacher_used_steps() + more.teacher_used_steps());
  if (more.first_step_used() != 0 &&
      (sum->first_step_used() == 0 || more.first_step_used() < sum->first_step_used())) {
    sum->set_first_step_used(more.first_step_used());
  }
  sum->set_max_staleness_steps(std::max(sum->max_staleness_steps(), more.max_staleness_steps()));
  sum->set_sum_staleness_steps(sum->sum_staleness_steps() + more.sum_staleness_steps());
  sum->set_sum_prefetch_lag_steps(sum->sum_prefetch_lag_steps() + more.sum_prefetch_lag_steps());
  sum->set_examples_per_second(sum->examples_per_second() + more.examples_per_second());
  sum->set_compute_seconds(sum->compute_seconds() + more.compute_seconds());
  sum->set_wait_seconds(sum->wait_seconds() + more.wait_seconds());
  sum->set_pushes_duplicate(sum->pushes_duplicate() + more.pushes_duplicate());
  sum->set_pushes_lost(sum->pushes_lost() + more.pushes_lost());
  sum->set_steps_skipped(sum->steps_skipped() + more.steps_skipped());
  sum->set_teacher_hedged(sum->teacher_hedged() + more.teacher_hedged());
  sum->set_teacher_late(sum->teacher_late() + more.teacher_late());
  for (const TeacherCounters& teacher : more.teachers()) {
    TeacherCounters* of_name = nullptr;
    for (TeacherCounters& known : *sum->mutable_teachers()) {
      if (known.name() == teacher.name()) of_name = &known;
    }
    if (of_name == nullptr) {
      *sum->add_teachers() = teacher;
      continue;
    }
    of_name->set_requests(of_name->requests() + teacher.requests());
    of_name->set_failures(of_name->failures() + teacher.failures());
    of_name->set_refused(of_name->refused() + teacher.refused());
    of_name->set_hedged(of_name->hedged() + teacher.hedged());
    of_name->set_late(of_name->late() + teacher.late());
  }
}

}  // namespace codistill
