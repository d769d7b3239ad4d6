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

std::vector<int32_t> StepCollector::Missing() const {
  std::vector<int32_t> missing;
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    if (ranks_[rank].ends.size() < static_cast<size_t>(num_shards_)) {
      missing.push_back(static_cast<int32_t>(rank));
    }
  }
  return missing;
}

StepCollector::Decision StepCollector::Decide() const {
  Decision decision;
  for (size_t i = 0; i < ranks_.size(); ++i) {
    const Rank& rank = ranks_[i];
    const auto bad = std::find_if(rank.ends.begin(), rank.ends.end(),
                                  [](const auto& end) { return !end.second.finite(); });
    if (bad != rank.ends.end()) {
      decision.rejected.push_back(static_cast<int32_t>(i));
      decision.not_finite.push_back(bad->second.not_finite_tensor());
    } else {
      const PushEnd& end = rank.ends.begin()->second;  // the same on every shard
      Contributor contributor;
      contributor.set_rank(static_cast<int32_t>(i));
      contributor.set_incarnation(rank.incarnation);
      contributor.set_num_examples(end.num_examples());
      decision.contributors.push_back(contributor);
      decision.statistics.Add(end);
    }
    if (!rank.worker_state.empty()) {
      decision.worker_states[static_cast<int32_t>(i)] = rank.worker_state;
    }
  }
  return decision;
}

}  // namespace codistill
