#include "common/model/held_versions.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace codistill {

std::string VersionName(const Version& version) {
  return absl::StrCat(version.generation(), ".", version.step());
}

bool Follows(const Version& a, const Version& b) {
  return a.generation() != b.generation() || a.step() > b.step();
}

void HeldVersions::Publish(Ptr snapshot) {
  std::vector<Ptr> next, old;  // what is let go of is destroyed outside the lock
  next.reserve(keep_ + 1);
  MutexLock lock(&mu_);
  const uint64_t generation = snapshot->version.generation();
  const int64_t step = snapshot->version.step();
  next.push_back(std::move(snapshot));
  for (const Ptr& held : held_) {
    if (next.size() >= keep_) break;
    // The same version read again takes the place of the first.
    if (held->version.generation() == generation && held->version.step() != step) {
      next.push_back(held);
    }
  }
  old = std::exchange(held_, std::move(next));
}

HeldVersions::Ptr HeldVersions::Newest() const {
  MutexLock lock(&mu_);
  return held_.empty() ? nullptr : held_.front();
}

std::vector<HeldVersions::Ptr> HeldVersions::All() const {
  MutexLock lock(&mu_);
  return held_;
}

HeldVersions::Ptr HeldVersions::WaitForNewer(const Version& than, absl::Time deadline) const {
  MutexLock lock(&mu_);
  auto newer = [this, &than]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !held_.empty() && Follows(held_.front()->version, than);
  };
  if (!mu_.AwaitWithDeadline(absl::Condition(&newer), deadline)) return nullptr;
  return held_.front();
}

}  // namespace codistill
