// Checkpoints: shards write their files while training goes on, the manifest comes last.

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/fault.h"
#include "common/base/status.h"
#include "common/checkpoint/manifest.h"
#include "common/config/embedding.h"
#include "common/config/schedule.h"
#include "glog/logging.h"
#include "server/leader.h"

namespace codistill {
namespace {

constexpr absl::Duration kWriteTimeout = absl::Minutes(10);
constexpr absl::Duration kRetryDelay = absl::Milliseconds(500);
constexpr uint32_t kMaxAttempts = 10;

}  // namespace

bool GroupLeader::SnapshotDue(int64_t step) const {
  return HasDirectory() && (CheckpointsAt(job_, step) || step == requested_step_);
}

void GroupLeader::StartCheckpoint(const CommitInFlight& commit) {
  const int64_t step = commit.request.step();
  auto checkpoint = std::make_unique<CheckpointInFlight>();
  checkpoint->number = ++checkpoint_number_;
  checkpoint->scheduled = CheckpointsAt(job_, step) || draining_;
  checkpoint->begin = options_.clock->Now();
  checkpoint->attempt.assign(num_shards_, 0);
  checkpoint->written.assign(num_shards_, false);
  checkpoint->sent.assign(num_shards_, false);
  CheckpointManifest& manifest = checkpoint->manifest;
  manifest.set_format_version(1);
  manifest.set_job(job_.name());
  manifest.set_group(GroupName());
  manifest.mutable_version()->set_generation(generation_);
  manifest.mutable_version()->set_step(step);
  if (!sync_) {
    for (int64_t shard_step : commit.shard_steps) {
      manifest.mutable_version()->add_shard_steps(shard_step);
    }
  }
  manifest.set_shard_map_digest(options_.map_digest);
  *manifest.mutable_shard_map() = options_.map;
  for (int s = 0; s < num_shards_; ++s) {
    manifest.add_files();
    if (HasEmbeddings(job_.model())) manifest.add_tables();
  }
  manifest.set_next_example(NextExample());
  for (const auto& item : worker_states_) {
    WorkerState* const state = manifest.add_worker_states();
    state->set_rank(item.first);
    state->set_state(item.second);
  }
  manifest.set_training_seconds(TrainingSeconds(last_commit_));
  manifest.set_examples(examples_);
  GetHistoryReply history;
  history_.Fill(&history);
  *history.mutable_totals() = membership_.Totals();
  history.set_restores(restores_);
  if (!sync_) FillAsync(history.mutable_async());
  membership_.Save(&manifest);
  manifest.set_history(history.SerializeAsString());
  manifest.set_created_unix_ms(absl::ToUnixMillis(options_.clock->Now()));
  manifest.set_optimizer(OptimizerConfig::Kind_Name(job_.training().optimizer().kind()));
  checkpoint_ = std::move(checkpoint);
  SendCheckpoint();
}

void GroupLeader::SendCheckpoint() {
  checkpoint_->retry = absl::InfiniteFuture();
  for (int s = 0; s < num_shards_; ++s) {
    if (checkpoint_->written[s] || checkpoint_->sent[s]) continue;
    checkpoint_->sent[s] = true;
    WriteCheckpointRequest request;
    *request.mutable_group() = Ref();
    request.set_generation(generation_);
    request.set_step(checkpoint_->manifest.version().step());
    request.set_attempt(checkpoint_->attempt[s]++);
    request.set_directory(directory_path_);
    effects_.push_back(
        [this, s, epoch = epoch_, number = checkpoint_->number, request = std::move(request)] {
          options_.links[s]->WriteCheckpoint(
              request, kWriteTimeout,
              [this, s, epoch, number](absl::StatusOr<WriteCheckpointReply> reply) {
                Enter([&] { OnCheckpointReply(epoch, number, s, reply); });
              });
        });
  }
}

void GroupLeader::OnCheckpointReply(uint64_t epoch, int64_t number, int shard,
                                    const absl::StatusOr<WriteCheckpointReply>& reply) {
  if (epoch != epoch_ || checkpoint_ == nullptr || checkpoint_->number != number || stopped_)
    return;
  checkpoint_->sent[shard] = false;
  if (!reply.ok()) {
    const bool passing =
        absl::IsUnavailable(reply.status()) || absl::IsDeadlineExceeded(reply.status());
    if (passing && checkpoint_->attempt[shard] < kMaxAttempts) {
      checkpoint_->retry = options_.clock->Now() + kRetryDelay;
      return;
    }
    EndCheckpoint(Annotate(reply.status(), absl::StrCat("checkpoint of step ",
                                                        checkpoint_->manifest.version().step())));
    return;
  }
  CheckpointFile* const file = checkpoint_->manifest.mutable_files(shard);
  file->set_name(reply->file_name());
  file->set_bytes(reply->bytes());
  file->set_crc32c(reply->crc32c());
  if (HasEmbeddings(job_.model())) {
    ShardTables* const tables = checkpoint_->manifest.mutable_tables(shard);
    tables->Clear();
    for (const WrittenFile& written : reply->table_files()) {
      CheckpointFile* const of_tables = tables->add_files();
      of_tables->set_name(written.name());
      of_tables->set_bytes(written.bytes());
      of_tables->set_crc32c(written.crc32c());
    }
  }
  checkpoint_->written[shard] = true;
  if (!std::all_of(checkpoint_->written.begin(), checkpoint_->written.end(),
                   [](bool w) { return w; })) {
    return;
  }
  effects_.push_back([this, epoch, manifest = checkpoint_->manifest] {
    options_.run_io([this, epoch, manifest] {
      FaultPoint("leader.checkpoint.files");
      CheckpointCatalog::Retention retention;
      retention.keep = job_.checkpoint().keep();
      if (job_.checkpoint().max_age_s() > 0) {
        retention.max_age = absl::Seconds(job_.checkpoint().max_age_s());
      }
      retention.now = options_.clock->Now();
      const absl::Status status = directory_->Commit(manifest, retention);
      FaultPoint("leader.checkpoint.manifest");
      Enter([&] { OnManifestWritten(epoch, status); });
    });
  });
}

void GroupLeader::OnManifestWritten(uint64_t epoch, const absl::Status& status) {
  if (epoch != epoch_ || checkpoint_ == nullptr) return;
  if (!status.ok()) {
    EndCheckpoint(Annotate(
        status, absl::StrCat("checkpoint of step ", checkpoint_->manifest.version().step())));
    return;
  }
  const CheckpointManifest& manifest = checkpoint_->manifest;
  uint64_t bytes = 0;
  for (const CheckpointFile& file : manifest.files()) bytes += file.bytes();
  for (const ShardTables& tables : manifest.tables()) {
    for (const CheckpointFile& file : tables.files()) bytes += file.bytes();
  }
  ++counters_.checkpoints;
  last_checkpoint_.Clear();
  *last_checkpoint_.mutable_version() = manifest.version();
  last_checkpoint_.set_manifest(JoinPath(directory_path_, ManifestName(manifest.version())));
  last_checkpoint_.set_bytes(bytes);
  checkpointed_step_ = manifest.version().step();
  LOG(INFO) << "group " << GroupName() << ": checkpoint of step " << checkpointed_step_ << ", "
            << bytes << " bytes, "
            << absl::ToDoubleSeconds(options_.clock->Now() - checkpoint_->begin)
            << " s: " << last_checkpoint_.manifest();
  EndCheckpoint(absl::OkStatus());
  WakeAssignments();  // after the last step they wait for this
}

void GroupLeader::EndCheckpoint(const absl::Status& status) {
  const bool scheduled = checkpoint_->scheduled;
  const int64_t step = checkpoint_->manifest.version().step();
  checkpoint_.reset();
  changed_ = true;
  const bool asked = requested_step_ >= 0 ? step >= requested_step_ : true;
  if (asked) requested_step_ = -1;
  if (status.ok()) {
    if (asked) AnswerCheckpointWaiters(last_checkpoint_);
    TryDecide();
    return;
  }
  ++counters_.failures;
  if (asked) AnswerCheckpointWaiters(status);
  if (absl::IsAborted(status) || absl::IsNotFound(status)) {
    // The shard was restarted in between; the group will be restored.
    LOG(WARNING) << "group " << GroupName() << ": " << status;
    return;
  }
  if (scheduled) {
    Fail(std::string(status.message()));
  } else {
    LOG(ERROR) << "group " << GroupName() << ": " << status;
    TryDecide();
  }
}

void GroupLeader::AnswerCheckpointWaiters(const absl::StatusOr<CheckpointReply>& reply) {
  for (Done<CheckpointReply>& done : checkpoint_waiters_) {
    effects_.push_back([done = std::move(done), reply] { done(reply); });
  }
  checkpoint_waiters_.clear();
  requested_step_ = -1;
}

void GroupLeader::Checkpoint(Done<CheckpointReply> done) {
  Enter([&] {
    absl::Status status = CheckServing(generation_);
    if (status.ok() && !HasDirectory()) {
      status = absl::FailedPreconditionError("checkpoint.directory: the job has none");
    }
    if (status.ok() && draining_) status = absl::UnavailableError("the group is draining");
    if (!status.ok()) {
      effects_.push_back([done = std::move(done), status] { done(status); });
      return;
    }
    const bool first = checkpoint_waiters_.empty();
    checkpoint_waiters_.push_back(std::move(done));
    if (!first) return;  // one is on its way
    const bool idle =
        step_ >= stop_steps_ || !started_ || (paused_ && (!sync_ || handed_out_ <= step_));
    if (idle && checkpointed_step_ == step_ && checkpoint_ == nullptr) {
      AnswerCheckpointWaiters(last_checkpoint_);
    } else if (idle && checkpoint_ == nullptr) {
      snapshot_now_ = true;
      TryDecide();
    } else if (idle) {
      requested_step_ = checkpoint_->manifest.version().step();
    } else if (sync_) {
      // The first step whose workers can still be told to bring their state.
      requested_step_ = std::min(std::max(handed_out_, step_) + 1, stop_steps_);
    } else {
      requested_step_ = std::min(step_ + 1, stop_steps_);
    }
  });
}

}  // namespace codistill
