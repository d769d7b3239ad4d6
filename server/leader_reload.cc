// ASYNC: a shard that was lost is loaded again alone, in the generation of the others.

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/checkpoint/manifest.h"
#include "glog/logging.h"
#include "server/leader.h"

namespace codistill {

bool GroupLeader::Reloading() const {
  return stage_ == Stage::kReady &&
         std::any_of(shards_.begin(), shards_.end(), [](const ShardState& s) { return !s.loaded; });
}

void GroupLeader::LoseShard(int s, const std::string& reason) {
  const bool survivors = std::any_of(shards_.begin(), shards_.end(), [&](const ShardState& other) {
    return &other != &shards_[s] && other.loaded;
  });
  if (sync_ || stage_ != Stage::kReady || !survivors || (Finished() && !HasDirectory())) {
    BeginRestore(reason);
    return;
  }
  if (failed_ || stopped_) return;
  if (++fruitless_restores_ > kMaxFruitlessRestores) {
    Fail(absl::StrCat("shards were loaded again ", kMaxFruitlessRestores,
                      " times without a step in between; the last time because ", reason));
    return;
  }
  LOG(WARNING) << "group " << GroupName() << ": shard " << s
               << " is loaded again alone: " << reason;
  // A cut or checkpoint on its way has lost a part of itself. What was to be kept is kept later.
  if (commit_ != nullptr) {
    if (commit_->again) {
      snapshot_now_ = true;
    } else {
      async_cuts_.push_front(
          {commit_->request.step(), commit_->request.publish(), commit_->request.checkpoint()});
    }
    commit_.reset();
  }
  if (checkpoint_ != nullptr) {
    EndCheckpoint(absl::AbortedError(absl::StrCat("checkpoint of step ",
                                                  checkpoint_->manifest.version().step(),
                                                  ": shard ", s, " was lost")));
  }
  ++epoch_;  // answers of the lost process, and to what was given up
  changed_ = true;
  ShardState& lost = shards_[s];
  lost.loaded = false;
  lost.generation = 0;
  lost.incarnation = NextIncarnation(lost.incarnation);
  ledger_.ShardLost(s);
  async_totals_.set_shard_reloads(async_totals_.shard_reloads() + 1);
  reload_known_ = false;
  for (ShardState& shard : shards_) {
    if (shard.loaded) continue;
    shard.restore_in_flight = false;
    shard.retry_restore = absl::InfinitePast();
  }
  effects_.push_back([this, epoch = epoch_, except = unloadable_] {
    options_.run_io([this, epoch, except] {
      auto opening = std::make_shared<Opening>();
      if (HasDirectory()) {
        absl::StatusOr<CheckpointCatalog::Newest> newest = directory_->FindNewest(except);
        opening->status = newest.status();
        if (newest.ok()) {
          opening->manifest = std::move(newest->manifest);
          opening->refused = std::move(newest->refused);
        }
        if (opening->manifest != nullptr) opening->status = CheckManifest(*opening->manifest);
      }
      Enter([&] { OnReloadOpened(epoch, std::move(*opening)); });
    });
  });
}

void GroupLeader::OnReloadOpened(uint64_t epoch, Opening opening) {
  if (epoch != epoch_ || failed_ || stopped_) return;
  for (const absl::Status& status : opening.refused) {
    LOG(ERROR) << "group " << GroupName() << ": a checkpoint is passed over: " << status.message();
  }
  if (!opening.status.ok()) {
    Fail(std::string(opening.status.message()));
    return;
  }
  reload_ = std::move(opening.manifest);
  reload_known_ = true;
  LOG(INFO) << "group " << GroupName() << ": lost shards are loaded from "
            << (reload_ == nullptr ? "the initial weights" : ManifestName(reload_->version()));
  TickRestore(options_.clock->Now());
}

void GroupLeader::CountLostUpdates(int s, int64_t from, const CheckpointManifest* manifest) {
  const int64_t had = manifest != nullptr && s < manifest->version().shard_steps_size()
                          ? manifest->version().shard_steps(s)
                          : 0;
  async_totals_.set_lost_updates(async_totals_.lost_updates() + std::max<int64_t>(0, from - had));
}

void GroupLeader::OnReloaded() {
  LOG(INFO) << "group " << GroupName() << ": all shards are loaded again";
  changed_ = true;
  ready_since_ = options_.clock->Now();
  reload_.reset();
  reload_known_ = false;
  // Followers get a cut that all shards have; the last one, where that is what the loss undid.
  if (step_ >= stop_steps_) {
    async_final_ = true;
    async_cuts_.push_back({stop_steps_, true, HasDirectory() && checkpointed_step_ < stop_steps_});
  } else {
    async_cuts_.push_back({step_, true, false});
  }
  WakeAssignments();
  TryDecide();
}

}  // namespace codistill
