#include "server/step_collector.h"

#include <algorithm>

namespace codistill {

void StepStatistics::Add(const PushEnd& end) {
  examples += end.num_examples();
  label_loss_sum += end.label_loss_sum();
  labels += end.num_labels();
  if (end.used_teacher()) {
    teacher_loss_sum += end.teacher_loss_sum();
    teacher_labels += end.num_labels();
    teacher_weight = std::max(teacher_weight, static_cast<double>(end.teacher_weight()));
  }
}

void StepCollector::Add(const ReportEndRequest& request) {
  Rank& rank = ranks_[request.rank()];
  if (request.incarnation() < rank.incarnation) return;
  ForgetOlder(request.rank(), request.incarnation());
  rank.incarnation = request.incarnation();
  rank.ends[request.shard()] = request.end();
  if (!request.worker_state().empty()) rank.worker_state = request.worker_state();
}

void StepCollector::ForgetOlder(int32_t rank_index, uint64_t incarnation) {
  Rank& rank = ranks_[rank_index];
  if (rank.incarnation >= incarnation) return;
  rank = Rank();
}

std::vector<int32_t> StepCollector::Missing(const std::vector<int32_t>& members) const {
  std::vector<int32_t> missing;
  for (const int32_t rank : members) {
    if (!Whole(rank)) missing.push_back(rank);
  }
  return missing;
}

StepCollector::Decision StepCollector::Decide(const std::vector<int32_t>& members) const {
  Decision decision;
  for (const int32_t i : members) {
    const Rank& rank = ranks_[i];
    if (!Whole(i)) {
      decision.dropped.push_back(i);
      continue;
    }
    const auto bad = std::find_if(rank.ends.begin(), rank.ends.end(),
                                  [](const auto& end) { return !end.second.finite(); });
    if (bad != rank.ends.end()) {
      decision.rejected.push_back(i);
      decision.not_finite.push_back(bad->second.not_finite_tensor());
    } else {
      const PushEnd& end = rank.ends.begin()->second;  // the same on every shard
      Contributor contributor;
      contributor.set_rank(i);
      contributor.set_incarnation(rank.incarnation);
      contributor.set_num_examples(end.num_examples());
      decision.contributors.push_back(contributor);
      decision.statistics.Add(end);
    }
    if (!rank.worker_state.empty()) {
      decision.worker_states[i] = rank.worker_state;
    }
  }
  return decision;
}

}  // namespace codistill
