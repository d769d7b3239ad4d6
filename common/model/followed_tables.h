#ifndef CODISTILL_COMMON_MODEL_FOLLOWED_TABLES_H_
#define CODISTILL_COMMON_MODEL_FOLLOWED_TABLES_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/client/row_follower.h"
#include "common/model/followed_rows.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// Keeps a follower's copy of all embedding tables of a group up with its cuts: whole at first, then
// by what changed. Used by one thread, but for Cancel and size.
class FollowedTables {
 public:
  // `group`: index in job.groups.
  FollowedTables(const JobConfig& job, int group);

  // Where the shards are from now on.
  void Connect(const GroupRef& group, uint64_t shard_map_digest,
               const std::vector<std::string>& addresses);

  struct Result {
    std::vector<std::shared_ptr<const FollowedRows>> tables;  // by index in the job
    uint64_t bytes = 0;                                       // received
  };
  // The tables of a cut. ABORTED: the shards do not have it any more, or a group that trains on has
  // given whole tables that mix it with later steps, which the next cut will put right. What has
  // come until an error is of use for the next Load.
  absl::StatusOr<Result> Load(uint64_t generation, int64_t cut_step, absl::Time deadline);

  // Ends a Load in progress. Any thread.
  void Cancel();

  // Rows held now, in all tables. Any thread.
  int64_t rows() const;

 private:
  // Version of the rows.
  struct Held {
    uint64_t generation = 0;  // 0 = nothing
    int64_t cut = -1;
    bool exact = false;
  };

  const bool sync_;
  std::vector<int64_t> dims_;
  std::vector<std::shared_ptr<const FollowedRows>> empty_;
  std::vector<std::shared_ptr<const FollowedRows>> tables_;
  Held held_;

  mutable Mutex mu_;
  std::shared_ptr<RowFollower> client_ ABSL_GUARDED_BY(mu_);
  int64_t rows_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_FOLLOWED_TABLES_H_
