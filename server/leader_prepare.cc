// The round before a commit whose update depends on norms over all shards (server/
// gradient_norms.h). The decision stands already: the same contributors are committed afterwards,
// so a shard that is asked again answers the same.

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/fault.h"
#include "server/gradient_norms.h"
#include "server/leader.h"

namespace codistill {
namespace {

constexpr absl::Duration kPrepareTimeout = absl::Seconds(30);
constexpr absl::Duration kRetryDelay = absl::Milliseconds(200);

}  // namespace

bool GroupLeader::NeedsPrepare(const CommitInFlight& commit) const {
  return NeedsNorms(job_.training().optimizer()) && commit.request.contributors_size() > 0;
}

void GroupLeader::SendPrepare() {
  commit_->retry = absl::InfiniteFuture();
  PrepareRequest request;
  *request.mutable_group() = Ref();
  request.set_generation(commit_->request.generation());
  request.set_step(commit_->request.step());
  *request.mutable_contributors() = commit_->request.contributors();
  request.set_weights(NeedsTensorNorms(job_.training().optimizer()));
  for (int s = 0; s < num_shards_; ++s) {
    if (commit_->acknowledged[s] || commit_->sent[s]) continue;
    commit_->sent[s] = true;
    effects_.push_back([this, s, epoch = epoch_, request] {
      FaultPoint("leader.prepare.sending");
      options_.links[s]->Prepare(request, kPrepareTimeout,
                                 [this, s, epoch](absl::StatusOr<PrepareReply> reply) {
                                   Enter([&] { OnPrepareReply(epoch, s, reply); });
                                 });
    });
  }
}

void GroupLeader::OnPrepareReply(uint64_t epoch, int shard,
                                 const absl::StatusOr<PrepareReply>& reply) {
  if (epoch != epoch_ || commit_ == nullptr || !commit_->preparing || stopped_) return;
  commit_->sent[shard] = false;
  if (!reply.ok()) {
    if (absl::IsUnavailable(reply.status()) || absl::IsDeadlineExceeded(reply.status()) ||
        absl::IsResourceExhausted(reply.status())) {
      commit_->retry = options_.clock->Now() + kRetryDelay;  // the shard may only be slow
      return;
    }
    BeginRestore(absl::StrCat("shard ", shard, " could not prepare step ", commit_->request.step(),
                              ": ", reply.status().message()));
    return;
  }
  commit_->acknowledged[shard] = true;
  commit_->prepared[shard] = *reply;
  if (!std::all_of(commit_->acknowledged.begin(), commit_->acknowledged.end(),
                   [](bool a) { return a; })) {
    return;
  }
  const OptimizerConfig& optimizer = job_.training().optimizer();
  std::vector<TensorNorm> norms = SumOverShards(commit_->prepared);
  commit_->request.set_clip_scale(ClipScale(optimizer, GlobalNorm(norms)));
  if (NeedsTensorNorms(optimizer)) {
    for (TensorNorm& norm : norms) *commit_->request.add_norms() = std::move(norm);
  }
  commit_->preparing = false;
  commit_->acknowledged.assign(num_shards_, false);
  SendCommit();
}

}  // namespace codistill
