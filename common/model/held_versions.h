#ifndef CODISTILL_COMMON_MODEL_HELD_VERSIONS_H_
#define CODISTILL_COMMON_MODEL_HELD_VERSIONS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/model/followed_model.h"

namespace codistill {

// "generation.step".
std::string VersionName(const Version& version);

// Whether `a` takes the place of `b`. A version of another generation always does, even one of a
// smaller step: a leader that lost everything counts from 1 again, and what it says is how things
// are.
bool Follows(const Version& a, const Version& b);

// The versions of a model that are held: what every FollowedModel has in common. The lock is held
// for the exchange of pointers and nothing else, so that who reads never waits for who loads.
// Thread-safe.
class HeldVersions {
 public:
  using Ptr = std::shared_ptr<const FollowedModel::Snapshot>;

  // Keeps the newest `keep` versions, at least 1.
  explicit HeldVersions(int keep) : keep_(keep) {}

  // Makes `snapshot` the newest. Versions of other generations and those beyond `keep` are let go
  // of.
  void Publish(Ptr snapshot) ABSL_LOCKS_EXCLUDED(mu_);

  // Null before the first.
  Ptr Newest() const ABSL_LOCKS_EXCLUDED(mu_);
  // Newest first.
  std::vector<Ptr> All() const ABSL_LOCKS_EXCLUDED(mu_);
  // Null at the deadline.
  Ptr WaitForNewer(const Version& than, absl::Time deadline) const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  const size_t keep_;
  mutable Mutex mu_;
  std::vector<Ptr> held_ ABSL_GUARDED_BY(mu_);  // newest first
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_HELD_VERSIONS_H_
