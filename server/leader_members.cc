// Who takes part: the start, leases, and what a step still waits for.

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "glog/logging.h"
#include "server/leader.h"

namespace codistill {

void GroupLeader::MaybeStart(absl::Time now) {
  if (started_ || stage_ != Stage::kReady) return;
  if (!elastic_) {
    if (!membership_.AllRegistered()) return;
  } else {
    // A group that an earlier leader had trained goes on with whoever is still there: workers that
    // live register within a second or so.
    const int live = static_cast<int>(membership_.Live().size());
    const absl::Duration patience = taken_up_ ? lease_ : rejoin_timeout_;
    if (live < num_workers_ && (live < min_workers_ || now - ready_since_ <= patience)) return;
    if (live < num_workers_) {
      LOG(WARNING) << "group " << GroupName() << ": " << live << " of " << num_workers_
                   << " workers have come; it begins with them";
    }
  }
  started_ = true;
  ready_since_ = now;
  CountClocks();
  plan_.ChangeFrom(step_ + 1, FirstMembers());
  WakeAssignments();
}

std::vector<MemberPlan::Member> GroupLeader::FirstMembers() const {
  if (elastic_) return started_ ? membership_.Live() : std::vector<MemberPlan::Member>();
  std::vector<MemberPlan::Member> all;
  for (int32_t rank = 0; rank < num_workers_; ++rank) all.push_back({rank, 0});
  return all;
}

void GroupLeader::Heard(int32_t rank, absl::Time now) {
  const bool was_live = membership_.live(rank);
  membership_.Heard(rank, now);
  if (!was_live && membership_.live(rank)) PlanMembers();
}

void GroupLeader::TickLeases(absl::Time now) {
  if (!elastic_) return;
  // After a pause of our own, signs of life wait unread: everybody gets another lease.
  if (now - last_tick_ > lease_ / 4) leases_from_ = now;
  last_tick_ = now;
  const std::vector<int32_t> ended = membership_.EndLeases(now, lease_, leases_from_);
  for (const int32_t rank : ended) {
    LOG(WARNING) << "group " << GroupName() << ": worker " << rank << " not heard from for "
                 << absl::FormatDuration(lease_) << " (training.lease_s): no member any more";
  }
  if (!ended.empty()) PlanMembers();
}

void GroupLeader::CountClocks() {
  if (sync_ || !elastic_) return;
  for (int32_t rank = 0; rank < max_workers_; ++rank) {
    if (membership_.live(rank) == clocks_.counts(rank)) continue;
    if (!membership_.live(rank)) {
      clocks_.Leave(rank);
      continue;
    }
    // It goes on where the slowest is: clocks never go back.
    const int64_t slowest = clocks_.Slowest();
    async_ranks_[rank].next_step = std::max(async_ranks_[rank].next_step, slowest + 1);
    clocks_.Join(rank, slowest);
  }
}

void GroupLeader::PlanMembers() {
  CountClocks();
  if (!elastic_ || !started_ || stage_ != Stage::kReady || failed_) return;
  plan_.ChangeFrom(std::max(handed_out_, step_) + 1, membership_.Live());
  WakeAssignments();
  TryDecide();
}

bool GroupLeader::TooFew() const {
  return elastic_ && static_cast<int>(membership_.Live().size()) < min_workers_;
}

std::vector<int32_t> GroupLeader::MembersAt(int64_t step, bool awaited) const {
  std::vector<int32_t> ranks;
  for (const MemberPlan::Member& member : plan_.At(step)) {
    const bool gone = elastic_ && (!membership_.live(member.rank) ||
                                   membership_.incarnation(member.rank) != member.incarnation);
    if (!awaited || !gone) ranks.push_back(member.rank);
  }
  return ranks;
}

bool GroupLeader::ReadyToDecide(int64_t step, const StepCollector& collector) const {
  const std::vector<int32_t> members = MembersAt(step, /*awaited=*/false);
  const size_t whole = members.size() - collector.Missing(members).size();
  if (whole == 0 || TooFew()) return false;
  return whole + static_cast<size_t>(backup_workers_) >= members.size() ||
         collector.Missing(MembersAt(step, /*awaited=*/true)).empty();
}

void GroupLeader::ReplanIfDeserted() {
  const int64_t step = step_ + 1;
  if (!elastic_ || !started_ || drain_frozen_ || step > stop_steps_ || TooFew()) return;
  if (!MembersAt(step, /*awaited=*/true).empty()) return;
  const auto it = collectors_.find(step);
  const std::vector<int32_t> members = MembersAt(step, /*awaited=*/false);
  if (it != collectors_.end() && it->second.Missing(members).size() < members.size()) return;
  // What some of them had pushed in part was of the plan that ends here.
  collectors_.clear();
  plan_.ChangeFrom(step, membership_.Live());
  LOG(INFO) << "group " << GroupName() << ": nobody is left of the members of step " << step
            << "; it is given to ranks " << absl::StrJoin(MembersAt(step, false), ", ");
  WakeAssignments();
}

std::string GroupLeader::WaitingForWorkers() const {
  if (!elastic_) {
    return absl::StrCat("waiting for workers ", absl::StrJoin(membership_.Unregistered(), ", "));
  }
  return absl::StrCat("waiting for workers: ", membership_.Live().size(), " are there, ",
                      started_ ? min_workers_ : num_workers_, " are needed");
}

void GroupLeader::FillPushes(GetHistoryReply* reply) const {
  for (const auto& [rank, counts] : pushes_.Totals()) {
    RankPushes* const out = reply->add_pushes();
    out->set_rank(rank);
    *out->mutable_counts() = counts;
  }
  *reply->mutable_membership() = membership_.counts();
}

std::map<int32_t, PushCounts> GroupLeader::push_counts() const {
  MutexLock lock(&mu_);
  return pushes_.Totals();
}

}  // namespace codistill
