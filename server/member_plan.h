#ifndef CODISTILL_SERVER_MEMBER_PLAN_H_
#define CODISTILL_SERVER_MEMBER_PLAN_H_

#include <cstdint>
#include <optional>
#include <vector>

namespace codistill {

// Who takes part in which step of a SYNC group, and which of the group's examples each takes. A
// step takes `batch` examples for every member, in the order of their ranks, after those of the
// step before. What has been handed out must not change, so that it can be handed out again after a
// failure: whoever comes or goes changes only the steps after. Not thread-safe: part of the
// leader's state.
class MemberPlan {
 public:
  struct Member {
    int32_t rank = 0;
    uint64_t incarnation = 0;  // 0 = whichever process holds the rank (FIXED)
  };

  explicit MemberPlan(int64_t batch) : batch_(static_cast<uint64_t>(batch)) {}

  // Forgets everything: `step` steps are behind us, and the next one starts at `next_example`.
  void Reset(int64_t step, uint64_t next_example, std::vector<Member> members);
  // Steps from `first` on are for `members`, in order of rank, whatever was planned for them.
  // Precondition: no earlier than the first step known.
  void ChangeFrom(int64_t first, std::vector<Member> members);
  // Steps up to `step` will not be asked about any more.
  void Forget(int64_t step);

  // Precondition of all: a step after Reset's and Forget's.
  const std::vector<Member>& At(int64_t step) const { return Find(step).members; }
  // Whether this process of the rank is a member of the step.
  bool Has(int64_t step, int32_t rank, uint64_t incarnation) const;
  // Nothing if the rank is no member.
  std::optional<uint64_t> FirstExample(int64_t step, int32_t rank) const;
  // First example of step + 1: the data cursor once `step` is committed.
  uint64_t NextExample(int64_t step) const;

 private:
  struct Period {
    int64_t first = 1;  // step; until the next period's
    uint64_t first_example = 0;
    std::vector<Member> members;
  };
  const Period& Find(int64_t step) const;

  const uint64_t batch_;
  std::vector<Period> periods_ = {Period()};  // by `first`, never empty
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_MEMBER_PLAN_H_
