#ifndef CODISTILL_COMMON_CLIENT_PUSH_VERDICT_H_
#define CODISTILL_COMMON_CLIENT_PUSH_VERDICT_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"

namespace codistill {

// Whether one push is finite, and its norm, which every shard is told alike though each sees only
// its own frames:
// the streams of a push meet here before their END. Thread-safe.
class PushVerdict {
 public:
  explicit PushVerdict(int num_shards) : waited_for_(num_shards), shards_(num_shards) {}

  // A shard's frames have all been looked at. `not_finite_tensor`: the first of them that is not
  // finite; empty: all are. `squared_norm`: of their gradients.
  void Add(int shard, std::string not_finite_tensor, double squared_norm) {
    MutexLock lock(&mu_);
    shards_[shard].squared_norm = squared_norm;
    shards_[shard].not_finite_tensor = std::move(not_finite_tensor);
    Count(shard);
  }

  // Nothing more comes of a shard: its stream has ended, with an answer or an error.
  void Leave(int shard) {
    MutexLock lock(&mu_);
    Count(shard);
  }

  // The tensor to name, that of the first shard which has one; empty: the push is finite. Waits
  // until all shards were added or have left. DEADLINE_EXCEEDED otherwise.
  absl::StatusOr<std::string> Await(absl::Time deadline) {
    MutexLock lock(&mu_);
    if (!mu_.AwaitWithDeadline(absl::Condition(this, &PushVerdict::AllIn), deadline)) {
      return absl::DeadlineExceededError("the push was not completed by its deadline");
    }
    for (const Shard& shard : shards_) {
      if (!shard.not_finite_tensor.empty()) return shard.not_finite_tensor;
    }
    return std::string();
  }

  // Of the gradients of all shards, added in their order; once Await has returned.
  double total_squared_norm() const {
    MutexLock lock(&mu_);
    double sum = 0;
    for (const Shard& shard : shards_) sum += shard.squared_norm;
    return sum;
  }

 private:
  struct Shard {
    bool counted = false;
    std::string not_finite_tensor;
    double squared_norm = 0;
  };
  void Count(int shard) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (!shards_[shard].counted) --waited_for_;
    shards_[shard].counted = true;
  }
  bool AllIn() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return waited_for_ == 0; }

  mutable Mutex mu_;
  int waited_for_ ABSL_GUARDED_BY(mu_);
  std::vector<Shard> shards_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_PUSH_VERDICT_H_
