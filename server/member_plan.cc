#include "server/member_plan.h"

#include <algorithm>
#include <utility>

namespace codistill {

void MemberPlan::Reset(int64_t step, uint64_t next_example, std::vector<Member> members) {
  periods_.clear();
  periods_.push_back({step + 1, next_example, std::move(members)});
}

void MemberPlan::ChangeFrom(int64_t first, std::vector<Member> members) {
  const uint64_t first_example = NextExample(first - 1);
  while (!periods_.empty() && periods_.back().first >= first) periods_.pop_back();
  periods_.push_back({first, first_example, std::move(members)});
}

void MemberPlan::Forget(int64_t step) {
  const auto kept = std::find_if(periods_.rbegin(), periods_.rend(),
                                 [step](const Period& p) { return p.first <= step + 1; });
  if (kept != periods_.rend()) periods_.erase(periods_.begin(), kept.base() - 1);
}

const MemberPlan::Period& MemberPlan::Find(int64_t step) const {
  const auto found = std::find_if(periods_.rbegin(), periods_.rend(),
                                  [step](const Period& p) { return p.first <= step; });
  return found == periods_.rend() ? periods_.front() : *found;
}

bool MemberPlan::Has(int64_t step, int32_t rank, uint64_t incarnation) const {
  const std::vector<Member>& members = At(step);
  return std::any_of(members.begin(), members.end(), [&](const Member& m) {
    return m.rank == rank && (m.incarnation == 0 || m.incarnation == incarnation);
  });
}

std::optional<uint64_t> MemberPlan::FirstExample(int64_t step, int32_t rank) const {
  const Period& period = Find(step);
  const auto found = std::find_if(period.members.begin(), period.members.end(),
                                  [rank](const Member& m) { return m.rank == rank; });
  if (found == period.members.end()) return std::nullopt;
  return NextExample(step - 1) + static_cast<uint64_t>(found - period.members.begin()) * batch_;
}

uint64_t MemberPlan::NextExample(int64_t step) const {
  const Period& period = Find(step + 1);
  return period.first_example +
         static_cast<uint64_t>(step + 1 - period.first) * period.members.size() * batch_;
}

}  // namespace codistill
