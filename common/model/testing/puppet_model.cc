#include "common/model/testing/puppet_model.h"

#include <utility>

#include "absl/time/clock.h"

namespace codistill {

absl::StatusOr<std::shared_ptr<const FollowedModel::Snapshot>> PuppetFollowedModel::Get() const {
  MutexLock lock(&mu_);
  if (held_.empty()) return absl::UnavailableError("waiting for the first cut");
  return held_.front();
}

absl::StatusOr<std::shared_ptr<const FollowedModel::Snapshot>> PuppetFollowedModel::WaitForNewer(
    const Version&, absl::Time) {
  return Get();
}

GroupState PuppetFollowedModel::group_state() const {
  MutexLock lock(&mu_);
  return state_;
}

FollowedModel::Counters PuppetFollowedModel::counters() const {
  MutexLock lock(&mu_);
  return counters_;
}

std::vector<std::shared_ptr<const FollowedModel::Snapshot>> PuppetFollowedModel::Held() const {
  MutexLock lock(&mu_);
  return held_;
}

void PuppetFollowedModel::Keep(int versions) {
  MutexLock lock(&mu_);
  keep_ = versions;
}

void PuppetFollowedModel::Hold(std::shared_ptr<const Model> model, uint64_t generation,
                               int64_t step, absl::Time loaded_at) {
  auto snapshot = std::make_shared<Snapshot>();
  snapshot->model = std::move(model);
  snapshot->version.set_generation(generation);
  snapshot->version.set_step(step);
  snapshot->loaded_at = loaded_at;
  MutexLock lock(&mu_);
  held_.insert(held_.begin(), std::move(snapshot));
  if (held_.size() > keep_) held_.resize(keep_);
  ++counters_.swaps;
}

void PuppetFollowedModel::SetGroupStep(uint64_t generation, int64_t step) {
  MutexLock lock(&mu_);
  state_.set_phase(GroupState::TRAINING);
  state_.mutable_version()->set_generation(generation);
  state_.mutable_version()->set_step(step);
}

absl::StatusOr<Model::Logits> PuppetModel::Predict(absl::Span<const Tensor> inputs,
                                                   States* states) const {
  {
    MutexLock lock(&mu_);
    ++begun_;
    auto free = [this] { return !held_up_; };
    mu_.Await(absl::Condition(&free));
  }
  return pass_(inputs, states);
}

absl::StatusOr<Model::Logits> PuppetModel::Forward(absl::Span<const Tensor>, States*, uint64_t) {
  return absl::UnimplementedError("a puppet does not train");
}

absl::Status PuppetModel::Backward(const Tensor&, const OnGradient&) {
  return absl::UnimplementedError("a puppet does not train");
}

void PuppetModel::HoldUp() {
  MutexLock lock(&mu_);
  held_up_ = true;
}

void PuppetModel::LetGo() {
  MutexLock lock(&mu_);
  held_up_ = false;
}

void PuppetModel::AwaitPasses(int count) const {
  MutexLock lock(&mu_);
  auto enough = [this, count] { return begun_ >= count; };
  mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(30));
}

}  // namespace codistill
