#include "common/model/step_estimate.h"

#include <algorithm>
#include <cmath>

namespace codistill {
namespace {

constexpr absl::Duration kWindow = absl::Seconds(10);
constexpr absl::Duration kInterval = absl::Milliseconds(100);  // between points kept

}  // namespace

void StepEstimate::Told(const GroupState& state, absl::Time now) {
  if (state.version().generation() != generation_) {
    steps_.clear();
    generation_ = state.version().generation();
  }
  stop_steps_ = state.stop_steps();
  moving_ = state.phase() == GroupState::TRAINING;
  // The newest point is replaced until it is old enough to be kept.
  if (steps_.size() >= 2 && now - steps_[steps_.size() - 2].first < kInterval) steps_.pop_back();
  steps_.emplace_back(now, state.version().step());
  while (steps_.size() > 2 && now - steps_[1].first >= kWindow) steps_.pop_front();
}

int64_t StepEstimate::At(absl::Time now) const {
  if (steps_.empty()) return 0;
  const int64_t told = steps_.back().second;
  const absl::Duration silence = now - steps_.back().first;
  if (!moving_ || silence <= kPatience || steps_.size() < 2) return told;
  const double seconds = absl::ToDoubleSeconds(steps_.back().first - steps_.front().first);
  const double rate = seconds > 0 ? static_cast<double>(told - steps_.front().second) / seconds : 0;
  const double unheard = std::ceil(std::max(0.0, rate) * absl::ToDoubleSeconds(silence));
  if (stop_steps_ > 0 && unheard >= static_cast<double>(stop_steps_ - told)) {
    return std::max(told, stop_steps_);
  }
  return told + static_cast<int64_t>(unheard);
}

}  // namespace codistill
