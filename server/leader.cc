#include "server/leader.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "common/config/job.h"
#include "glog/logging.h"
#include "server/drain_times.h"

namespace codistill {
namespace {

constexpr absl::Duration kObserverInterval = absl::Milliseconds(20);
constexpr absl::Duration kObserverSilence = absl::Seconds(1);
constexpr absl::Duration kClaimCheck = absl::Milliseconds(500);
constexpr absl::Duration kRateWindow = absl::Seconds(5);
// ASYNC: how long the last cut waits for the other shards to come to the last step.
constexpr absl::Duration kAsyncLastStep = absl::Seconds(2);

}  // namespace

absl::StatusOr<std::unique_ptr<GroupLeader>> GroupLeader::Create(Options options) {
  if (static_cast<int>(options.links.size()) != options.map.num_shards()) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.links.size(), " links for ", options.map.num_shards(), " shards"));
  }
  const bool own_thread = options.run_io == nullptr;
  std::unique_ptr<GroupLeader> leader(new GroupLeader(std::move(options)));
  if (own_thread) {
    CODISTILL_ASSIGN_OR_RETURN(leader->io_executor_, Executor::Create({"leader-io", 1, 64}));
    Executor* const executor = leader->io_executor_.get();
    leader->options_.run_io = [executor](std::function<void()> task) {
      // At most a handful are under way at a time; none runs after the end.
      executor->Schedule(std::move(task)).IgnoreError();
    };
  }
  return leader;
}

GroupLeader::GroupLeader(Options options)
    : options_(std::move(options)),
      job_(options_.job),
      sync_(job_.training().update_mode() == TrainingConfig::SYNC),
      elastic_(job_.training().membership() == TrainingConfig::ELASTIC),
      num_shards_(options_.map.num_shards()),
      num_workers_(job_.groups(options_.group).num_workers()),
      max_workers_(MaxWorkers(job_, options_.group)),
      min_workers_(job_.groups(options_.group).min_workers()),
      backup_workers_(job_.training().backup_workers()),
      lease_(absl::Seconds(job_.training().lease_s())),
      stop_steps_(job_.stop().steps()),
      max_staleness_(job_.training().update_mode() == TrainingConfig::BOUNDED_STALENESS
                         ? job_.training().max_staleness()
                         : -1),
      rejoin_timeout_(absl::Seconds(job_.training().rejoin_timeout_s())),
      directory_path_(CheckpointDirectory(job_, options_.group)),
      shard_addresses_(num_shards_),
      shards_(num_shards_),
      membership_(job_.groups(options_.group).name(), max_workers_),
      plan_(job_.training().batch_size()),
      pushes_(num_shards_),
      history_(job_.training().log_every_steps()),
      clocks_(max_workers_, num_shards_),
      ledger_(max_workers_, num_shards_) {}

GroupLeader::~GroupLeader() { Stop(); }

void GroupLeader::Stop() {
  Enter([this] {
    stopped_ = true;
    ++epoch_;
    FailAssignments(absl::UnavailableError("the leader is gone"));
    AnswerCheckpointWaiters(absl::UnavailableError("the leader is gone"));
  });
  if (io_executor_ != nullptr) io_executor_->Shutdown();
}

void GroupLeader::SetAddresses(std::string leader_address,
                               std::vector<std::string> shard_addresses) {
  address_ = std::move(leader_address);
  shard_addresses_ = std::move(shard_addresses);
  shard_addresses_.resize(num_shards_);
}

GroupRef GroupLeader::Ref() const {
  GroupRef ref;
  ref.set_run_id(RunId(job_));
  ref.set_group(GroupName());
  return ref;
}

// ------------------------------------------------------------------------------------------ state

bool GroupLeader::Finished() const {
  return stage_ == Stage::kReady && step_ >= stop_steps_ && newest_cut_ >= stop_steps_ &&
         (!HasDirectory() || checkpointed_step_ >= stop_steps_);
}

GroupState::Phase GroupLeader::PhaseNow() const {
  if (failed_) return GroupState::FAILED;
  if (draining_) return GroupState::DRAINING;
  if (stage_ != Stage::kReady) {
    return opened_before_ ? GroupState::RESTORING : GroupState::STARTING;
  }
  if (Reloading()) return GroupState::RESTORING;
  if (Finished()) return GroupState::FINISHED;
  if (!started_) return GroupState::STARTING;
  return paused_ ? GroupState::PAUSED : GroupState::TRAINING;
}

void GroupLeader::NotePhase() {
  const GroupState::Phase phase = PhaseNow();
  if (phase == noted_phase_) return;
  LOG(INFO) << "group " << GroupName() << ": "
            << absl::AsciiStrToLower(GroupState::Phase_Name(phase)) << " (generation "
            << generation_ << ", step " << step_ << ")";
  noted_phase_ = phase;
  changed_ = true;
}

void GroupLeader::Fail(const std::string& message) {
  if (failed_) return;
  failed_ = true;
  error_ = message;
  ++epoch_;  // whatever is on its way no longer matters
  ++counters_.failures;
  LOG(ERROR) << "group " << GroupName() << " has failed: " << message;
  commit_.reset();
  checkpoint_.reset();
  FailAssignments(absl::FailedPreconditionError(message));
  AnswerCheckpointWaiters(absl::FailedPreconditionError(message));
}

void GroupLeader::TickClaim(absl::Time now) {
  if (claim_ == 0 || claim_in_flight_ || now - last_claim_check_ < kClaimCheck) return;
  claim_in_flight_ = true;
  last_claim_check_ = now;
  effects_.push_back([this] {
    options_.run_io([this] {
      const absl::Status status =
          directory_ == nullptr ? absl::OkStatus() : directory_->CheckClaim();
      // A directory that cannot be read now says nothing about who owns it.
      if (absl::IsFailedPrecondition(status)) directory_->LetGo();
      Enter([&] { OnClaimChecked(status); });
    });
  });
}

void GroupLeader::OnClaimChecked(const absl::Status& status) {
  claim_in_flight_ = false;
  if (!absl::IsFailedPrecondition(status) || superseded_ || stopped_) return;
  superseded_ = true;
  claim_ = 0;
  const std::string message =
      absl::StrCat("the leader of group ", GroupName(), " ends: ", status.message());
  Fail(message);
  if (options_.on_superseded) {
    effects_.push_back(
        [this, message] { options_.on_superseded(absl::FailedPreconditionError(message)); });
  }
}

absl::Status GroupLeader::CheckServing(uint64_t generation) const {
  if (stopped_) return absl::UnavailableError("the leader is gone");
  // Whoever asks finds the newer leader, at the same address or another.
  if (superseded_) return absl::UnavailableError(error_);
  if (failed_) return absl::FailedPreconditionError(error_);
  if (stage_ != Stage::kReady) {
    return absl::UnavailableError(absl::StrCat(
        "group ", GroupName(), " is ", opened_before_ ? "restoring" : "starting", "; try again"));
  }
  if (generation != generation_) {
    return absl::AbortedError(absl::StrCat("generation ", generation,
                                           " is not the group's, which is ", generation_,
                                           "; register again"));
  }
  return absl::OkStatus();
}

void GroupLeader::FillState(bool with_map, GroupState* state) const {
  state->set_phase(PhaseNow());
  Version* const version = state->mutable_version();
  version->set_generation(generation_);
  version->set_step(step_);
  if (!sync_) {
    for (const ShardState& shard : shards_) version->add_shard_steps(shard.step);
  }
  if (stage_ == Stage::kReady) {
    state->mutable_newest_cut()->set_generation(generation_);
    state->mutable_newest_cut()->set_step(newest_cut_);
    for (int64_t step : cut_shard_steps_) state->mutable_newest_cut()->add_shard_steps(step);
  }
  for (const std::string& address : shard_addresses_) state->add_shard_addresses(address);
  state->set_shard_map_digest(options_.map_digest);
  state->set_error(error_);
  state->set_stop_steps(stop_steps_);
  if (with_map) *state->mutable_shard_map() = options_.map;
}

GroupState GroupLeader::State(bool with_map) const {
  GroupState state;
  MutexLock lock(&mu_);
  FillState(with_map, &state);
  return state;
}

double GroupLeader::TrainingSeconds(absl::Time now) const {
  if (training_begin_ == absl::InfiniteFuture()) return base_seconds_;
  return base_seconds_ + std::max(0.0, absl::ToDoubleSeconds(now - training_begin_));
}

void GroupLeader::FillHistory(GetHistoryReply* reply) const {
  history_.Fill(reply);
  *reply->mutable_totals() = membership_.Totals();
  FillState(false, reply->mutable_state());
  reply->set_training_seconds(TrainingSeconds(last_commit_));
  reply->set_examples(examples_);
  reply->set_restores(restores_);
  FillPushes(reply);
  if (!sync_) FillAsync(reply->mutable_async());
}

void GroupLeader::FillAsync(AsyncCounters* counters) const {
  ledger_.Fill(counters);
  counters->set_lost_updates(async_totals_.lost_updates());
  counters->set_shard_reloads(async_totals_.shard_reloads());
  counters->set_max_ahead(async_totals_.max_ahead());
}

AsyncCounters GroupLeader::async_counters() const {
  AsyncCounters counters;
  MutexLock lock(&mu_);
  if (!sync_) FillAsync(&counters);
  return counters;
}

GetHistoryReply GroupLeader::GetHistory() const {
  GetHistoryReply reply;
  MutexLock lock(&mu_);
  FillHistory(&reply);
  return reply;
}

GroupLeader::Counters GroupLeader::counters() const {
  MutexLock lock(&mu_);
  Counters counters = counters_;
  counters.restores = restores_;
  counters.members = membership_.counts().members();
  return counters;
}

void GroupLeader::FillStatus(DaemonStatus* status) const {
  constexpr int kLastPoints = 100;
  const absl::Time now = options_.clock->Now();
  MutexLock lock(&mu_);
  const GroupState::Phase phase = PhaseNow();
  status->set_state(absl::AsciiStrToLower(GroupState::Phase_Name(phase)));
  status->set_step(step_);
  status->set_generation(generation_);
  status->set_rate_unit("steps/s");
  if (rate_.size() >= 2) {
    const double seconds = absl::ToDoubleSeconds(rate_.back().first - rate_.front().first);
    const double steps = static_cast<double>(rate_.back().second - rate_.front().second);
    if (seconds > 0) status->set_rate(std::max(0.0, steps / seconds));
  }
  std::string detail;
  if (failed_) {
    detail = error_;
  } else if (stage_ == Stage::kGathering) {
    std::vector<int> missing;
    for (int s = 0; s < num_shards_; ++s) {
      if (!shards_[s].seen) missing.push_back(s);
    }
    detail = absl::StrCat("waiting for shards ", absl::StrJoin(missing, ", "));
  } else if (stage_ == Stage::kReady && (!started_ || (TooFew() && step_ < stop_steps_))) {
    detail = WaitingForWorkers();
  } else {
    detail = absl::StrCat("step ", step_, " of ", stop_steps_);
    if (sync_ && !collectors_.empty() && collectors_.begin()->first == step_ + 1 && !commit_) {
      absl::StrAppend(
          &detail, ", waiting for the pushes of ranks ",
          absl::StrJoin(collectors_.begin()->second.Missing(MembersAt(step_ + 1, true)), ", "));
    }
    if (max_staleness_ >= 0 && !parked_.empty() && clocks_.SlowestRank() >= 0) {
      absl::StrAppend(&detail, ", ", parked_.size(), " workers wait for rank ",
                      clocks_.SlowestRank(), ", which has finished ", clocks_.Slowest(),
                      " steps of its own (max_staleness ", max_staleness_, ")");
    }
  }
  if (counters_.rejected > 0) {
    absl::StrAppend(&detail, "; ", counters_.rejected, " pushes rejected, the last in ",
                    last_rejected_);
  }
  status->set_detail(detail);
  FillState(false, status->mutable_group_state());
  membership_.FillStatus(now, num_workers_, status);
  for (const ShardState& shard : shards_) *status->add_shards() = shard.load;
  FillHistory(status->mutable_history());
  for (MemberStatus& member : *status->mutable_members()) {
    for (const RankPushes& rank : status->history().pushes()) {
      if (rank.rank() == member.rank()) *member.mutable_pushes() = rank.counts();
    }
  }
  auto* const points = status->mutable_history()->mutable_training();
  if (points->size() > kLastPoints) points->DeleteSubrange(0, points->size() - kLastPoints);
}

// ------------------------------------------------------------------------------------------- time

void GroupLeader::Tick() {
  const absl::Time now = options_.clock->Now();
  Enter([this, now] {
    if (stopped_) return;
    ExpireAssignments(now);
    TickClaim(now);
    if (!failed_) {
      TickProbes(now);
      TickRestore(now);
      if (commit_ != nullptr && now >= commit_->retry) SendCommit();
      if (checkpoint_ != nullptr && now >= checkpoint_->retry) SendCheckpoint();
      if (!sync_ && !async_final_ && stage_ == Stage::kReady && step_ >= stop_steps_ &&
          now - async_last_step_ >= kAsyncLastStep) {
        async_final_ = true;
        async_cuts_.push_back({stop_steps_, true, HasDirectory()});
      }
      // People asked for a checkpoint of a step that a pause keeps from coming.
      if (requested_step_ > step_ && paused_ && handed_out_ <= step_ && commit_ == nullptr &&
          checkpoint_ == nullptr) {
        requested_step_ = -1;
        snapshot_now_ = true;
      }
      TickLeases(now);
      MaybeStart(now);
      TryDecide();
      TickMissing(now);
    }
    TickRate(now);
    if (draining_) TickDrain(now);
    NotePhase();
    TickObservers(now);
  });
}

void GroupLeader::TickMissing(absl::Time now) {
  if (stage_ != Stage::kReady || paused_ || draining_ || step_ >= stop_steps_) return;
  if (!started_ || TooFew()) {
    if (now - last_waiting_log_ >= absl::Seconds(10)) {
      last_waiting_log_ = now;
      LOG(INFO) << "group " << GroupName() << ": " << WaitingForWorkers();
    }
    return;
  }
  if (commit_ != nullptr || elastic_) return;  // leases see to it
  std::vector<int32_t> awaited;
  if (sync_) {
    const auto it = collectors_.find(step_ + 1);
    if (it != collectors_.end()) {
      awaited = it->second.Missing(MembersAt(step_ + 1, /*awaited=*/true));
      if (awaited.empty()) return;  // the step waits for a checkpoint, not for workers
    }
  }
  if (awaited.empty()) {
    for (int32_t rank = 0; rank < num_workers_; ++rank) awaited.push_back(rank);
  }
  const auto silence = [&](int32_t rank) {
    return now - std::max(membership_.last_heard(rank), ready_since_);
  };
  awaited.erase(std::remove_if(awaited.begin(), awaited.end(),
                               [&](int32_t rank) { return silence(rank) <= rejoin_timeout_; }),
                awaited.end());
  // ASYNC goes on without a rank and fails when none is left; with a bound on staleness the others
  // come to wait for it, as in SYNC, which can do without its backup workers.
  const int bearable = sync_ ? backup_workers_ : max_staleness_ >= 0 ? 0 : num_workers_ - 1;
  if (static_cast<int>(awaited.size()) <= bearable) return;
  Fail(absl::StrCat("worker ", awaited[0], " of group ", GroupName(), ": not heard from for ",
                    absl::ToInt64Seconds(rejoin_timeout_), " s"));
}

void GroupLeader::TickRate(absl::Time now) {
  if (!rate_.empty() && now - rate_.back().first < absl::Milliseconds(250)) return;
  rate_.emplace_back(now, step_);
  while (rate_.size() > 2 && now - rate_.front().first > kRateWindow) rate_.pop_front();
}

void GroupLeader::TickObservers(absl::Time now) {
  const absl::Duration since = now - last_told_;
  if (since < (changed_ ? kObserverInterval : kObserverSilence)) return;
  changed_ = false;
  last_told_ = now;
  for (auto it = observers_.begin(); it != observers_.end();) {
    if (std::shared_ptr<GroupObserver> observer = it->lock()) {
      effects_.push_back([observer = std::move(observer)] { observer->OnGroupChange(); });
      ++it;
    } else {
      it = observers_.erase(it);
    }
  }
}

void GroupLeader::Observe(std::weak_ptr<GroupObserver> observer) {
  MutexLock lock(&mu_);
  observers_.push_back(std::move(observer));
}

// ------------------------------------------------------------------------------------------ drain

absl::Status GroupLeader::Pause() {
  Enter([this] { paused_ = true; });
  return absl::OkStatus();
}

absl::Status GroupLeader::Resume() {
  const absl::Time now = options_.clock->Now();
  Enter([this, now] {
    if (!paused_) return;
    paused_ = false;
    ready_since_ = now;  // nobody was asked for anything meanwhile
    WakeAssignments();
  });
  return absl::OkStatus();
}

void GroupLeader::Drain(std::function<void(absl::Status)> done) {
  const absl::Time now = options_.clock->Now();
  Enter([this, now, &done] {
    drain_done_.push_back(std::move(done));
    if (draining_) return;
    draining_ = true;
    drain_begin_ = now;
    WakeAssignments();  // tells them to leave
  });
}

void GroupLeader::TickDrain(absl::Time now) {
  if (drain_done_.empty()) return;
  if (failed_) return EndDrain(absl::FailedPreconditionError(error_));
  const bool late = now - drain_begin_ > kDrainLeader;
  if (!drain_frozen_) {
    if (!membership_.AllLeft() && now - drain_begin_ <= kDrainWorkers) return;
    drain_frozen_ = true;
  }
  if (stage_ != Stage::kReady) return EndDrain(absl::OkStatus());
  if (late) {
    return EndDrain(absl::DeadlineExceededError(
        absl::StrCat("the checkpoint of step ", step_, " was not written in time")));
  }
  if (commit_ != nullptr || checkpoint_ != nullptr || snapshot_now_) return;
  if (!HasDirectory() || checkpointed_step_ == step_ || step_ == 0) {
    return EndDrain(absl::OkStatus());
  }
  snapshot_now_ = true;
  TryDecide();
}

void GroupLeader::EndDrain(const absl::Status& status) {
  // Who asked for a checkpoint of a step that will not come takes the one that ends the work, if
  // any.
  if (status.ok() && HasDirectory() && checkpointed_step_ == step_ && step_ > 0) {
    AnswerCheckpointWaiters(last_checkpoint_);
  } else {
    AnswerCheckpointWaiters(absl::UnavailableError(
        absl::StrCat("group ", GroupName(), " was drained before the checkpoint")));
  }
  for (auto& done : drain_done_) {
    effects_.push_back([done = std::move(done), status] { done(status); });
  }
  drain_done_.clear();
}

}  // namespace codistill
