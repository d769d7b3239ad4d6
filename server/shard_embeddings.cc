// Embedding tables as the shard's protocol has them.

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/checkpoint/table_file.h"
#include "server/shard.h"

namespace codistill {

void ModelShard::ApplyRows(int64_t step, double learning_rate,
                           absl::Span<const ShardStore::Contribution> contributions) {
  if (embeddings_->empty()) return;
  int64_t examples = 0;
  for (const ShardStore::Contribution& c : contributions) examples += c.num_examples;
  std::vector<RowContribution> rows;
  for (const ShardStore::Contribution& c : contributions) {
    if (examples == 0) break;
    rows.push_back(
        {c.push->rows(), static_cast<double>(c.num_examples) / static_cast<double>(examples)});
  }
  embeddings_->Apply(step, learning_rate, rows);
}

void ModelShard::PullRows(const PullRowsRequest& request, Done<Version> done) {
  absl::StatusOr<Version> version;
  {
    MutexLock lock(&mu_);
    version = TryPullRows(request);
    if (version.ok() && version->generation() == 0) {
      // As many as a worker keeps under way, and those of processes that have died meanwhile.
      if (parked_rows_.size() >= 64 + 16 * static_cast<size_t>(max_workers_)) {
        version = absl::ResourceExhaustedError(
            absl::StrCat(Name(), ": ", parked_rows_.size(), " pulls of rows wait already"));
      } else {
        parked_rows_.push_back({request, std::move(done)});
        return;
      }
    }
  }
  done(std::move(version));
}

absl::StatusOr<Version> ModelShard::TryPullRows(const PullRowsRequest& request) {
  CODISTILL_RETURN_IF_ERROR(CheckGeneration(request.generation()));
  if (request.shard_map_digest() != options_.map_digest) {
    return absl::FailedPreconditionError(absl::StrCat("digest ", request.shard_map_digest(),
                                                      " of the shard map is not the group's, ",
                                                      options_.map_digest));
  }
  Version version;
  switch (request.source_case()) {
    case PullRowsRequest::kStep:
      if (!sync_) {
        return absl::InvalidArgumentError(
            "source step: an ASYNC group has no common step; use at_least_step");
      }
      if (request.step() > step_) return version;
      if (request.step() < step_) {
        return absl::AbortedError(absl::StrCat("rows of step ", request.step(),
                                               " are gone: the shard has come to step ", step_));
      }
      break;
    case PullRowsRequest::kAtLeastStep:
      if (request.at_least_step() > step_) return version;
      break;
    case PullRowsRequest::SOURCE_NOT_SET:
      return absl::InvalidArgumentError("source: one of step and at_least_step must be set");
  }
  version.set_generation(generation_);
  version.set_step(step_);
  if (!sync_) version.add_shard_steps(step_);
  return version;
}

void ModelShard::WakeRows(Effects* effects) {
  std::vector<ParkedRows> still;
  for (ParkedRows& pull : parked_rows_) {
    absl::StatusOr<Version> version = TryPullRows(pull.request);
    if (version.ok() && version->generation() == 0) {
      still.push_back(std::move(pull));
      continue;
    }
    effects->push_back(
        [done = std::move(pull.done), version = std::move(version)] { done(version); });
  }
  parked_rows_ = std::move(still);
}

absl::StatusOr<std::vector<CheckpointFile>> ModelShard::WriteTables(
    const WriteCheckpointRequest& request) {
  TableFileHeader identity;
  identity.set_group(group_name_);
  identity.set_shard(options_.shard);
  identity.set_num_shards(options_.map.num_shards());
  identity.mutable_version()->set_generation(request.generation());
  identity.mutable_version()->set_step(request.step());
  const std::string name = TableFileName(options_.shard, options_.map.num_shards(),
                                         identity.version(), request.attempt());
  return embeddings_->checkpoint()->Write(request.step(), request.directory(), name,
                                          std::move(identity), options_.file_system);
}

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
