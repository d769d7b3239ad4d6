#include "server/push_outcomes.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace codistill {

std::optional<PushReply> PushOutcomes::Find(const PushBegin& begin) const {
  const auto rank = ranks_.find(begin.rank());
  if (rank == ranks_.end() || rank->second.incarnation != begin.incarnation()) return std::nullopt;
  const std::deque<Decided>& decided = rank->second.decided;
  if (decided.empty() || begin.step() > decided.back().step) return std::nullopt;
  for (const Decided& earlier : decided) {
    if (earlier.step != begin.step()) continue;
    PushReply reply = earlier.reply;
    if (reply.outcome() == APPLIED) {
      reply.set_outcome(DUPLICATE);
      reply.set_message(
          absl::StrCat("push ", begin.step(), " of rank ", begin.rank(), " was applied already"));
    }
    return reply;
  }
  PushReply reply;
  reply.set_outcome(DROPPED_LATE);
  reply.set_step(decided.back().reply.step());
  reply.set_message(absl::StrCat("push ", begin.step(), " of rank ", begin.rank(), " comes after ",
                                 decided.back().step, ", which was decided already"));
  return reply;
}

void PushOutcomes::Note(const PushBegin& begin, const PushReply& reply) {
  Rank& rank = ranks_[begin.rank()];
  if (rank.incarnation != begin.incarnation()) {
    rank.incarnation = begin.incarnation();
    rank.decided.clear();
  }
  rank.decided.push_back({begin.step(), reply});
  if (rank.decided.size() > kRemembered) rank.decided.pop_front();
  if (reply.outcome() == APPLIED) furthest_step_ = std::max(furthest_step_, begin.step());
}

void PushOutcomes::Begun(const PushBegin& begin) {
  end_example_ = std::max<uint64_t>(end_example_, begin.end_example());
}

}  // namespace codistill
