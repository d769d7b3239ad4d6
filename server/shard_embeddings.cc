// Embedding tables as the shard's protocol has them.

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/shard.h"

namespace codistill {

void ModelShard::Follow(FollowRequest request, Done<std::unique_ptr<FollowReader>> done) {
  auto shared = std::make_shared<Done<std::unique_ptr<FollowReader>>>(std::move(done));
  // On the thread that changes the tables: a whole table is read as it is between two updates.
  const absl::Status status = executor_->Schedule(
      [this, request = std::move(request), shared] { (*shared)(DoFollow(request)); });
  if (!status.ok()) (*shared)(Annotate(status, Name()));
}

absl::StatusOr<std::unique_ptr<FollowReader>> ModelShard::DoFollow(const FollowRequest& request) {
  {
    MutexLock lock(&mu_);
    CODISTILL_RETURN_IF_ERROR(CheckGeneration(request.generation()));
  }
  if (request.shard_map_digest() != options_.map_digest) {
    return absl::FailedPreconditionError(absl::StrCat("digest ", request.shard_map_digest(),
                                                      " of the shard map is not the group's, ",
                                                      options_.map_digest));
  }
  return embeddings_->cuts()->Read(request.cut_step(),
                                   request.has_since_cut_step() ? request.since_cut_step() : -1);
}

}  // namespace codistill
