// Pulls: which version one reads, and how long it waits for it.

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/retry_after.h"
#include "common/base/status.h"
#include "common/config/job.h"
#include "glog/logging.h"
#include "server/shard.h"

namespace codistill {
namespace {

constexpr int64_t kMiB = 1 << 20;
// When a pull that found too many others waiting is worth another try.
constexpr absl::Duration kRetryDelay = absl::Milliseconds(200);

}  // namespace

void ModelShard::Pull(const PullRequest& request, Done<std::unique_ptr<PullSource>> done) {
  absl::StatusOr<std::unique_ptr<PullSource>> source;
  {
    MutexLock lock(&mu_);
    source = TryPull(request);
    if (source.ok() && *source == nullptr) {
      // One pull a worker may wait, and those of processes that have died in the meantime.
      if (parked_pulls_.size() >= 16 + 4 * static_cast<size_t>(max_workers_)) {
        source = WithRetryAfter(absl::ResourceExhaustedError(absl::StrCat(
                                    Name(), ": ", parked_pulls_.size(), " pulls wait already")),
                                kRetryDelay);
      } else {
        parked_pulls_.push_back({request, std::move(done)});
        return;
      }
    }
  }
  done(std::move(source));
}

absl::StatusOr<std::unique_ptr<PullSource>> ModelShard::TryPull(const PullRequest& request) {
  CODISTILL_RETURN_IF_ERROR(CheckGeneration(request.generation()));
  if (request.shard_map_digest() != options_.map_digest) {
    return absl::FailedPreconditionError(absl::StrCat("digest ", request.shard_map_digest(),
                                                      " of the shard map is not the group's, ",
                                                      options_.map_digest));
  }
  for (uint32_t tensor : request.tensors()) {
    if (tensor >= static_cast<uint32_t>(options_.map.tensors_size())) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor,
                                                     " is not in the shard map, ", "which has ",
                                                     options_.map.tensors_size()));
    }
  }
  if (request.transfer_dtype() != DT_INVALID && request.transfer_dtype() != DT_FLOAT &&
      request.transfer_dtype() != DT_BFLOAT16) {
    return absl::InvalidArgumentError(
        absl::StrCat("transfer_dtype: ", DataType_Name(request.transfer_dtype()),
                     " is not served; DT_FLOAT and DT_BFLOAT16 are"));
  }
  const std::vector<uint32_t> tensors(request.tensors().begin(), request.tensors().end());
  const auto source = [&](std::shared_ptr<const Cut> cut, int64_t step) {
    mu_.AssertHeld();
    ++counters_.pulls;
    for (const ShardPiece& piece : store_->layout().pieces()) {
      const bool wanted = tensors.empty() || std::find(tensors.begin(), tensors.end(),
                                                       piece.piece.tensor()) != tensors.end();
      if (wanted) counters_.pull_bytes += piece.bytes;
    }
    Version version;
    version.set_generation(generation_);
    version.set_step(step);
    if (!sync_) {
      version.add_shard_steps(cut->step());
      version.add_shard_incarnations(incarnation_);
    }
    return std::make_unique<PullSource>(store_, std::move(cut), version, tensors, kMiB,
                                        request.transfer_dtype());
  };
  std::shared_ptr<const Cut> live;
  switch (request.source_case()) {
    case PullRequest::kCutStep: {
      std::shared_ptr<const Cut> cut = store_->FindCut(request.cut_step());
      if (cut == nullptr) {
        return absl::AbortedError(absl::StrCat("the cut of step ", request.cut_step(),
                                               " is not held; the newest is of step ",
                                               store_->newest_cut()));
      }
      const int64_t label = cut->label();
      return source(std::move(cut), label);
    }
    case PullRequest::kStep:
      if (!sync_) {
        return absl::InvalidArgumentError(
            "source step: an ASYNC group has no common step; use at_least_step");
      }
      if (request.step() > step_) return nullptr;
      if (previous_ != nullptr && previous_->step() == request.step() && request.step() < step_) {
        return source(previous_, request.step());
      }
      if (request.step() < step_) {
        return absl::OutOfRangeError(absl::StrCat("weights of step ", request.step(),
                                                  " are gone: the shard has come to step ", step_));
      }
      live = store_->Live(step_, /*exact=*/true);
      break;
    case PullRequest::kAtLeastStep:
      if (request.at_least_step() > step_) return nullptr;
      live = store_->Live(sync_ ? step_ : request.at_least_step(), /*exact=*/sync_);
      break;
    case PullRequest::SOURCE_NOT_SET:
      return absl::InvalidArgumentError(
          "source: one of step, at_least_step and cut_step must be set");
  }
  // None while an update is under way, which wakes the pull when it ends.
  if (live == nullptr) return nullptr;
  const int64_t step = live->step();
  return source(std::move(live), step);
}

void ModelShard::WakePulls(Effects* effects) {
  WakeRows(effects);
  std::vector<ParkedPull> still;
  for (ParkedPull& pull : parked_pulls_) {
    absl::StatusOr<std::unique_ptr<PullSource>> source = TryPull(pull.request);
    if (source.ok() && *source == nullptr) {
      still.push_back(std::move(pull));
      continue;
    }
    // std::function wants copyable captures.
    auto shared = std::make_shared<absl::StatusOr<std::unique_ptr<PullSource>>>(std::move(source));
    effects->push_back([done = std::move(pull.done), shared] { done(std::move(*shared)); });
  }
  parked_pulls_ = std::move(still);
}

}  // namespace codistill
