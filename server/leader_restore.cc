// How a generation begins: at the start, and again whenever a shard was lost.

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/checkpoint/manifest.h"
#include "common/config/shard_map.h"
#include "glog/logging.h"
#include "server/leader.h"

namespace codistill {
namespace {

constexpr absl::Duration kProbeInterval = absl::Milliseconds(500);
constexpr absl::Duration kProbeTimeout = absl::Seconds(2);
constexpr absl::Duration kRestoreTimeout = absl::Minutes(10);
constexpr absl::Duration kRestoreRetry = absl::Milliseconds(500);

}  // namespace

// ------------------------------------------------------------------------------------------ probes

void GroupLeader::TickProbes(absl::Time now) {
  for (int s = 0; s < num_shards_; ++s) {
    ShardState& shard = shards_[s];
    if (shard.probe_in_flight || now - shard.last_probe < kProbeInterval) continue;
    shard.probe_in_flight = true;
    shard.last_probe = now;
    ProbeRequest request;
    *request.mutable_group() = Ref();
    effects_.push_back(
        [this, s, epoch = epoch_, loaded = shard.loaded, request = std::move(request)] {
          options_.links[s]->Probe(request, kProbeTimeout,
                                   [this, s, epoch, loaded](absl::StatusOr<ProbeReply> reply) {
                                     Enter([&] { OnProbeReply(epoch, s, loaded, reply); });
                                   });
        });
  }
}

void GroupLeader::OnProbeReply(uint64_t epoch, int s, bool was_loaded,
                               const absl::StatusOr<ProbeReply>& reply) {
  const absl::Time now = options_.clock->Now();
  ShardState& shard = shards_[s];
  shard.probe_in_flight = false;
  if (failed_ || stopped_) return;
  if (!reply.ok()) {
    if (absl::IsPermissionDenied(reply.status())) {
      Fail(absl::StrCat("shard ", s, " at ", shard_addresses_[s],
                        " is not this group's: ", reply.status().message()));
      return;
    }
    if (shard.reachable && shard.seen) {
      LOG(WARNING) << "group " << GroupName() << ": shard " << s << " at " << shard_addresses_[s]
                   << " does not answer: " << reply.status();
    }
    shard.reachable = false;
    // Shards never seen are waited for: they may still have to be placed somewhere.
    if (shard.seen && now - shard.last_answer > rejoin_timeout_) {
      Fail(absl::StrCat("shard ", s, " of group ", GroupName(), " at ", shard_addresses_[s],
                        ": not heard from for ", absl::ToInt64Seconds(rejoin_timeout_), " s"));
    }
    return;
  }
  if (reply->shard() != s) {
    Fail(absl::StrCat("shard ", s, " of group ", GroupName(), ": at ", shard_addresses_[s],
                      " is shard ", reply->shard()));
    return;
  }
  if (shard.seen && !shard.reachable) {
    LOG(INFO) << "group " << GroupName() << ": shard " << s << " answers again";
  }
  shard.seen = true;
  shard.reachable = true;
  shard.last_answer = now;
  pushes_.Update(s, reply->process_nonce(), reply->pushes());
  shard.load = reply->load();
  if (epoch != epoch_) return;  // asked before the last change of course

  const bool another = reply->process_nonce() != shard.nonce;
  // An answer that crossed with the shard's Restore says nothing about it.
  if (shard.loaded && !was_loaded) return;
  if (shard.loaded && (another || reply->generation() != generation_)) {
    // A shard that was only out of reach still has everything, and training just goes on with it.
    LoseShard(s, absl::StrCat("shard ", s, " of group ", GroupName(),
                              another ? " was restarted" : " has lost its generation"));
    shards_[s].generation = reply->generation();
    return;
  }
  if (!shard.loaded) shard.generation = reply->generation();
  if (!sync_ && shard.loaded) shard.step = std::max(shard.step, reply->step());
  if (stage_ == Stage::kGathering &&
      std::all_of(shards_.begin(), shards_.end(), [](const ShardState& x) { return x.seen; })) {
    Open();
  }
}

// ----------------------------------------------------------------------------------------- opening

void GroupLeader::BeginRestore(const std::string& reason) {
  if (failed_ || stopped_) return;
  if (Finished() && !HasDirectory()) {
    // Workers have left, and whoever loads a finished group must not get untrained weights.
    Fail(absl::StrCat(
        reason,
        " after the last step, and the job has no checkpoint.directory: the model is lost"));
    return;
  }
  LOG(WARNING) << "group " << GroupName() << ": the group is restored: " << reason;
  if (++fruitless_restores_ > kMaxFruitlessRestores) {
    Fail(absl::StrCat("restored ", kMaxFruitlessRestores,
                      " times without a step in between; the last time because ", reason));
    return;
  }
  ++restores_;
  Open();
}

void GroupLeader::Open() {
  stage_ = Stage::kOpening;
  ++epoch_;
  changed_ = true;
  commit_.reset();
  checkpoint_.reset();
  collectors_.clear();
  async_cuts_.clear();
  snapshot_now_ = false;
  const absl::Status aborted = absl::AbortedError(
      absl::StrCat("group ", GroupName(), " begins another generation; register again"));
  FailAssignments(aborted);
  AnswerCheckpointWaiters(aborted);
  uint64_t at_least = generation_ + 1, newest = 0;
  for (ShardState& shard : shards_) {
    newest = std::max(newest, shard.generation);
    shard.loaded = false;
    shard.restore_in_flight = false;
    shard.retry_restore = absl::InfinitePast();
    at_least = std::max(at_least, shard.generation + 1);
  }
  // ASYNC: a restarted leader goes on with the shards that have outlived the one before.
  const uint64_t adopt = sync_ || opened_before_ ? 0 : newest;
  effects_.push_back([this, epoch = epoch_, at_least, adopt, except = unloadable_] {
    options_.run_io([this, epoch, at_least, adopt, except] {
      auto opening = std::make_shared<Opening>(ReadOpening(at_least, adopt, except));
      Enter([&] { OnOpened(epoch, std::move(*opening)); });
    });
  });
}

GroupLeader::Opening GroupLeader::ReadOpening(uint64_t at_least, uint64_t adopt,
                                              const std::vector<Version>& except) {
  Opening opening;
  if (!HasDirectory() && adopt > 0) {
    opening.generation = adopt;
    opening.adopted = true;
    return opening;
  }
  if (!HasDirectory()) {
    // Nothing remembers the last generation but time, which goes on across restarts.
    opening.generation = std::max(at_least, static_cast<uint64_t>(std::max<int64_t>(
                                                1, absl::ToUnixMicros(options_.clock->Now()))));
    return opening;
  }
  opening.status = [&]() -> absl::Status {
    if (directory_ == nullptr) {
      CODISTILL_ASSIGN_OR_RETURN(directory_,
                                 CheckpointCatalog::Claim(directory_path_, options_.file_system));
      CODISTILL_ASSIGN_OR_RETURN(const int swept, directory_->SweepOrphans());
      opening.claim = directory_->claim_number();
      if (swept > 0) {
        LOG(INFO) << directory_path_ << ": removed " << swept
                  << " files that belong to no checkpoint";
      }
    }
    CODISTILL_ASSIGN_OR_RETURN(CheckpointCatalog::Newest newest, directory_->FindNewest(except));
    opening.manifest = std::move(newest.manifest);
    opening.refused = std::move(newest.refused);
    if (opening.manifest != nullptr) CODISTILL_RETURN_IF_ERROR(CheckManifest(*opening.manifest));
    CODISTILL_ASSIGN_OR_RETURN(opening.last_generation, directory_->LastGeneration());
    if (adopt > 0 && adopt >= opening.last_generation) {
      opening.generation = adopt;
      opening.adopted = true;
      return absl::OkStatus();
    }
    opening.generation = std::max(at_least, opening.last_generation + 1);
    return directory_->BeginGeneration(opening.generation);
  }();
  return opening;
}

absl::Status GroupLeader::CheckManifest(const CheckpointManifest& manifest) const {
  const std::string name = JoinPath(directory_path_, ManifestName(manifest.version()));
  const auto differs = [&](const std::string& what, const std::string& theirs,
                           const std::string& ours) {
    return absl::FailedPreconditionError(absl::StrCat("checkpoint ", name, " is of another ", what,
                                                      ": ", theirs, ", the job has ", ours,
                                                      "; use another checkpoint directory"));
  };
  if (manifest.group() != GroupName()) return differs("group", manifest.group(), GroupName());
  const std::string optimizer = OptimizerConfig::Kind_Name(job_.training().optimizer().kind());
  if (manifest.optimizer() != optimizer) {
    return differs("optimizer", manifest.optimizer(), optimizer);
  }
  // The number of shards may be another: they find their parts in the files of the others.
  if (manifest.shard_map_digest() != options_.map_digest) {
    TensorList theirs, ours;
    *theirs.mutable_tensors() = manifest.shard_map().tensors();
    *ours.mutable_tensors() = options_.map.tensors();
    const std::string difference = FirstDifference(ours, theirs);
    if (!difference.empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat("checkpoint ", name, " is of another model: ", difference,
                       " (here: the job, there: the checkpoint); use another checkpoint "
                       "directory"));
    }
  }
  if ((manifest.version().shard_steps_size() == 0) != sync_) {
    return differs("update mode", sync_ ? "ASYNC" : "SYNC", sync_ ? "SYNC" : "ASYNC");
  }
  return absl::OkStatus();
}

void GroupLeader::OnOpened(uint64_t epoch, Opening opening) {
  if (opening.claim != 0) claim_ = opening.claim;
  if (epoch != epoch_ || failed_ || stopped_) return;
  for (const absl::Status& status : opening.refused) {
    LOG(ERROR) << "group " << GroupName() << ": a checkpoint is passed over: " << status.message();
  }
  if (!opening.status.ok()) {
    Fail(std::string(opening.status.message()));
    return;
  }
  generation_ = opening.generation;
  if (!opened_before_ && opening.last_generation > 0) taken_up_ = true;
  if (!opened_before_ && !HasDirectory() &&
      std::any_of(shards_.begin(), shards_.end(),
                  [](const ShardState& shard) { return shard.generation > 0; })) {
    taken_up_ = true;
    LOG(ERROR) << "group " << GroupName()
               << ": an earlier leader trained this group, and the job has no "
                  "checkpoint.directory: "
               << (opening.adopted ? "lost shards start" : "training starts")
               << " over from the initial weights";
  }
  origin_ = std::move(opening.manifest);
  manifest_ = origin_ == nullptr ? "" : ManifestName(origin_->version());
  stage_ = Stage::kRestoring;
  adopting_ = opening.adopted;
  for (ShardState& shard : shards_) {
    shard.keep = adopting_ && shard.generation == generation_;
    shard.incarnation = NextIncarnation(shard.incarnation);
  }
  LOG(INFO) << "group " << GroupName() << ": generation " << generation_
            << (adopting_ ? " goes on, lost shards from " : " begins from ")
            << (manifest_.empty() ? "the initial weights" : manifest_);
  TickRestore(options_.clock->Now());
}

// --------------------------------------------------------------------------------------- restoring

// From the clock, so that they grow across restarts of the leader too.
uint64_t GroupLeader::NextIncarnation(uint64_t before) const {
  return std::max(before + 1, static_cast<uint64_t>(
                                  std::max<int64_t>(1, absl::ToUnixMicros(options_.clock->Now()))));
}

void GroupLeader::TickRestore(absl::Time now) {
  const bool reload = Reloading() && reload_known_;
  if ((stage_ != Stage::kRestoring && !reload) || failed_) return;
  // Those that are kept come first: the others count on from where they have come to.
  const bool kept_first = std::any_of(shards_.begin(), shards_.end(), [](const ShardState& shard) {
    return shard.keep && !shard.loaded;
  });
  int64_t newest = 0;
  for (const ShardState& shard : shards_) {
    if (shard.keep) newest = std::max(newest, shard.step);
  }
  for (int s = 0; s < num_shards_; ++s) {
    ShardState& shard = shards_[s];
    if (shard.loaded || shard.restore_in_flight || now < shard.retry_restore) continue;
    if (kept_first && !shard.keep) continue;
    if (adopting_ && !shard.keep) shard.step = std::max(shard.step, newest);
    shard.restore_in_flight = true;
    RestoreRequest request;
    *request.mutable_group() = Ref();
    request.set_generation(generation_);
    request.set_leader_nonce(options_.nonce);
    request.set_leader_address(address_);
    request.set_shard_map_digest(options_.map_digest);
    request.set_keep(shard.keep);
    request.set_leader_claim(claim_);
    if (reload) {
      if (reload_ != nullptr) request.set_manifest(ManifestName(reload_->version()));
    } else {
      request.set_manifest(manifest_);
    }
    if (reload || adopting_) request.set_min_step(shard.step);
    request.set_shard_incarnation(shard.incarnation);
    effects_.push_back([this, s, epoch = epoch_, request = std::move(request)] {
      options_.links[s]->Restore(request, kRestoreTimeout,
                                 [this, s, epoch](absl::StatusOr<RestoreReply> reply) {
                                   Enter([&] { OnRestoreReply(epoch, s, reply); });
                                 });
    });
  }
}

void GroupLeader::OnRestoreReply(uint64_t epoch, int s, const absl::StatusOr<RestoreReply>& reply) {
  if (epoch != epoch_ || failed_ || stopped_) return;
  const bool reload = Reloading();
  if (stage_ != Stage::kRestoring && !reload) return;
  ShardState& shard = shards_[s];
  const CheckpointManifest* const from = reload ? reload_.get() : origin_.get();
  shard.restore_in_flight = false;
  if (!reply.ok()) {
    const absl::Status& status = reply.status();
    const std::string who =
        absl::StrCat("shard ", s, " of group ", GroupName(), " at ", shard_addresses_[s]);
    if (absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
        absl::IsResourceExhausted(status)) {
      shard.retry_restore = options_.clock->Now() + kRestoreRetry;
    } else if (shard.keep) {
      shard.generation = 0;  // it was lost in the meantime
      BeginRestore(absl::StrCat(who, " could not be taken over: ", status.message()));
    } else if (from != nullptr && (absl::IsDataLoss(status) || absl::IsNotFound(status))) {
      LOG(ERROR) << who << " cannot load " << ManifestName(from->version()) << ": "
                 << status.message();
      unloadable_.push_back(from->version());
      LoseShard(s, "an older checkpoint is tried");
    } else if (absl::IsFailedPrecondition(status) && shard.generation >= generation_) {
      BeginRestore(absl::StrCat(who, " is in generation ", shard.generation));
    } else {
      Fail(absl::StrCat(who, ": ", status.message()));
    }
    return;
  }
  shard.loaded = true;
  shard.nonce = reply->process_nonce();
  shard.generation = generation_;
  if (shard.keep) {
    shard.incarnation = reply->shard_incarnation();
    async_cursor_ = std::max<uint64_t>(async_cursor_, reply->end_example());
    furthest_step_ = std::max(furthest_step_, reply->furthest_step());
  } else if (reload || adopting_) {
    CountLostUpdates(s, shard.step, from);
  }
  shard.step = reply->step();
  const int64_t expected = origin_ == nullptr ? 0 : origin_->version().step();
  if (sync_ && reply->step() != expected) {
    Fail(absl::StrCat("shard ", s, " of group ", GroupName(), " loaded step ", reply->step(),
                      ", not ", expected));
    return;
  }
  if (std::all_of(shards_.begin(), shards_.end(), [](const ShardState& x) { return x.loaded; })) {
    if (reload) {
      OnReloaded();
    } else {
      OnRestored();
    }
  } else {
    TickRestore(options_.clock->Now());
  }
}

void GroupLeader::OnRestored() {
  const absl::Time now = options_.clock->Now();
  GetHistoryReply saved;
  step_ = 0;
  uint64_t next_example = 0;
  examples_ = 0;
  checkpointed_step_ = -1;
  worker_states_.clear();
  if (origin_ != nullptr) {
    step_ = origin_->version().step();
    next_example = origin_->next_example();
    examples_ = origin_->examples();
    checkpointed_step_ = step_;
    if (!saved.ParseFromString(origin_->history())) saved.Clear();
    for (const WorkerState& state : origin_->worker_states()) {
      worker_states_[state.rank()] = state.state();
    }
    last_checkpoint_.Clear();
    *last_checkpoint_.mutable_version() = origin_->version();
    last_checkpoint_.set_manifest(JoinPath(directory_path_, manifest_));
    for (const CheckpointFile& file : origin_->files()) {
      last_checkpoint_.set_bytes(last_checkpoint_.bytes() + file.bytes());
    }
  }
  if (adopting_) {
    for (const ShardState& shard : shards_) step_ = std::max(step_, shard.step);
    LOG(INFO) << "group " << GroupName() << ": goes on from step " << step_ << ", example "
              << std::max(async_cursor_, next_example);
  }
  plan_.Reset(step_, next_example, FirstMembers());
  // Examples are used once: what was handed out before is not handed out again.
  async_cursor_ = std::max(async_cursor_, next_example);
  async_ranks_.clear();
  clocks_ = WorkerClocks(max_workers_, num_shards_);
  if (!sync_) {
    ledger_.Abandon();
    // A rank's own count starts where its share of the group's steps has come to.
    for (int32_t rank = 0; rank < max_workers_; ++rank) {
      // It must not be behind what shards that were kept have seen of it.
      const int64_t done = std::max(step_ / num_workers_, furthest_step_);
      async_ranks_[rank].next_step = done + 1;
      clocks_.Join(rank, done);
    }
    furthest_step_ = 0;
    CountClocks();
  }
  async_final_ = false;
  async_last_step_ = step_ >= stop_steps_ ? now : absl::InfiniteFuture();
  handed_out_ = step_;
  newest_cut_ = step_;
  cut_shard_steps_.clear();
  if (!sync_) {
    for (const ShardState& shard : shards_) cut_shard_steps_.push_back(shard.step);
  }
  if (!opened_before_) {
    if (origin_ != nullptr) {
      base_seconds_ = origin_->training_seconds();
      membership_.Load(*origin_, saved.totals());
      ledger_.Load(saved.async());
      const int64_t lost_now = async_totals_.lost_updates();  // of shards loaded just now
      async_totals_ = saved.async();
      async_totals_.set_lost_updates(async_totals_.lost_updates() + lost_now);
    }
    if (taken_up_) restores_ += saved.restores() + 1;
    last_commit_ = now;
  }
  // Curves, like the weights, are those of the checkpoint; time goes on.
  history_.Reset(saved, step_, TrainingSeconds(now));
  opened_before_ = true;
  ready_since_ = now;
  last_waiting_log_ = now;
  rate_.clear();
  stage_ = Stage::kReady;
  changed_ = true;
  if (adopting_) {
    // No cut is on all shards. What is there is not told; the next one is made at once.
    newest_cut_ = origin_ == nullptr ? 0 : origin_->version().step();
    OnReloaded();
  }
  adopting_ = false;
  for (ShardState& shard : shards_) shard.keep = false;
}

}  // namespace codistill
