// From the shards' ENDs to a committed step.

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/fault.h"
#include "common/base/status.h"
#include "common/config/schedule.h"
#include "glog/logging.h"
#include "server/leader.h"

namespace codistill {
namespace {

constexpr absl::Duration kCommitTimeout = absl::Seconds(30);
constexpr absl::Duration kRetryDelay = absl::Milliseconds(200);
constexpr size_t kMaxAsyncCuts = 16;

}  // namespace

absl::Status GroupLeader::ReportEnd(const ReportEndRequest& request) {
  const absl::Time now = options_.clock->Now();
  absl::Status status;
  Enter([&] {
    status = CheckServing(request.generation());
    if (!status.ok()) return;
    if (request.shard() < 0 || request.shard() >= num_shards_) {
      status = absl::InvalidArgumentError(
          absl::StrCat("shard ", request.shard(), " is none of ", num_shards_, " shards"));
      return;
    }
    status = membership_.Check(request.rank(), request.incarnation(), /*known_only=*/sync_);
    if (!status.ok() && sync_) return;
    status = membership_.CheckRank(request.rank());
    if (!status.ok()) return;
    membership_.HeardThroughShard(request.rank(), now);
    if (sync_) {
      OnEndSync(request);
    } else {
      OnEndAsync(request);
    }
    TryDecide();
  });
  return status;
}

void GroupLeader::OnEndSync(const ReportEndRequest& request) {
  // A shard may commit a step before the leader has heard so from all of them, and a fast worker's
  // next push then ends before the leader calls the step committed.
  if (request.step() <= step_ || request.step() > step_ + 2) return;
  if (commit_ != nullptr && !commit_->again && request.step() == commit_->request.step()) return;
  if (!plan_.Has(request.step(), request.rank(), request.incarnation())) return;
  collectors_.try_emplace(request.step(), max_workers_, num_shards_).first->second.Add(request);
}

void GroupLeader::OnEndAsync(const ReportEndRequest& request) {
  ShardState& shard = shards_[request.shard()];
  if (request.shard_incarnation() != shard.incarnation) return;  // of a process that was lost
  shard.step = std::max(shard.step, request.step());
  ledger_.Decided(request.rank(), request.incarnation(), request.own_step(), request.shard(),
                  request.outcome());
  const int64_t slowest = clocks_.Slowest();
  clocks_.Decided(request.rank(), request.shard(), request.own_step());
  if (max_staleness_ >= 0 && clocks_.Slowest() > slowest) WakeAssignments();
  const bool update = request.outcome() == APPLIED || request.outcome() == REJECTED;
  // A probe may have brought shard 0's count already: only reports count as steps of the group.
  if (request.shard() == 0 && update && request.step() > step_) {
    step_ = request.step();
    if (!request.worker_state().empty()) {
      worker_states_[request.rank()] = request.worker_state();
    }
    StepStatistics statistics;
    if (request.end().finite()) {
      statistics.Add(request.end());
    } else {
      NoteRejected(step_, request.rank(), request.end().not_finite_tensor());
    }
    CountStep(step_, statistics);
    if (step_ >= stop_steps_) {
      async_last_step_ = last_commit_;
      WakeAssignments();
    } else if (PublishesAt(job_, step_) || SnapshotDue(step_)) {
      async_cuts_.push_back({step_, PublishesAt(job_, step_), SnapshotDue(step_)});
      if (async_cuts_.size() > kMaxAsyncCuts) async_cuts_.pop_front();
    }
  }
  const bool all_there = step_ >= stop_steps_ &&
                         std::all_of(shards_.begin(), shards_.end(),
                                     [this](const ShardState& s) { return s.step >= stop_steps_; });
  if (all_there && !async_final_) {
    async_final_ = true;
    async_cuts_.push_back({stop_steps_, true, HasDirectory()});
  }
}

void GroupLeader::NoteRejected(int64_t step, int32_t rank, const std::string& tensor) {
  ++counters_.rejected;
  last_rejected_ = absl::StrCat("step ", step, ": the push of worker ", rank,
                                " is rejected: the gradient of tensor ", tensor, " is not finite");
  LOG(WARNING) << "group " << GroupName() << ", " << last_rejected_;
}

void GroupLeader::CountStep(int64_t step, const StepStatistics& statistics) {
  last_commit_ = options_.clock->Now();
  changed_ = true;
  fruitless_restores_ = 0;
  examples_ += statistics.examples;
  history_.AddStep(step, statistics, LearningRateAt(job_, step), TrainingSeconds(last_commit_),
                   step >= stop_steps_);
}

uint64_t GroupLeader::NextExample() const {
  if (!sync_) return async_cursor_;
  return plan_.NextExample(step_);
}

void GroupLeader::TryDecide() {
  if (stage_ != Stage::kReady || failed_ || stopped_ || commit_ != nullptr || Reloading()) return;
  if (snapshot_now_ && checkpoint_ == nullptr) {
    snapshot_now_ = false;
    auto commit = std::make_unique<CommitInFlight>();
    commit->again = true;
    commit->request.set_step(step_);
    commit->request.set_checkpoint(true);
    commit->request.set_clip_scale(1);
    StartCommit(std::move(commit));
    return;
  }
  if (sync_) {
    ReplanIfDeserted();
    TryDecideSync();
  } else {
    TryDecideAsync();
  }
}

void GroupLeader::TryDecideSync() {
  const int64_t step = step_ + 1;
  const auto it = collectors_.find(step);
  if (drain_frozen_ || it == collectors_.end() || !ReadyToDecide(step, it->second)) return;
  // Shards keep one snapshot: a step that needs one waits for the one before to be written.
  if (SnapshotDue(step) && checkpoint_ != nullptr) return;

  auto commit = std::make_unique<CommitInFlight>();
  commit->decision = it->second.Decide(MembersAt(step, /*awaited=*/false));
  CommitRequest& request = commit->request;
  request.set_step(step);
  for (const Contributor& contributor : commit->decision.contributors) {
    *request.add_contributors() = contributor;
  }
  for (size_t i = 0; i < commit->decision.rejected.size(); ++i) {
    const int32_t rank = commit->decision.rejected[i];
    request.add_rejected(rank);
    NoteRejected(step, rank, commit->decision.not_finite[i]);
  }
  for (const int32_t rank : commit->decision.dropped) request.add_dropped(rank);
  counters_.dropped += static_cast<int64_t>(commit->decision.dropped.size());
  request.set_learning_rate(LearningRateAt(job_, step));
  request.set_weight_decay(WeightDecayAt(job_, step));
  request.set_clip_scale(1);
  request.set_publish(PublishesAt(job_, step));
  request.set_checkpoint(SnapshotDue(step));
  collectors_.erase(it);
  StartCommit(std::move(commit));
}

void GroupLeader::TryDecideAsync() {
  if (async_cuts_.empty()) return;
  if (async_cuts_.front().checkpoint && checkpoint_ != nullptr) return;
  const AsyncCut cut = async_cuts_.front();
  async_cuts_.pop_front();
  auto commit = std::make_unique<CommitInFlight>();
  commit->request.set_step(cut.step);
  commit->request.set_publish(cut.publish);
  commit->request.set_checkpoint(cut.checkpoint);
  commit->request.set_clip_scale(1);
  StartCommit(std::move(commit));
}

void GroupLeader::StartCommit(std::unique_ptr<CommitInFlight> commit) {
  *commit->request.mutable_group() = Ref();
  commit->request.set_generation(generation_);
  commit->acknowledged.assign(num_shards_, false);
  commit->sent.assign(num_shards_, false);
  commit->shard_steps.assign(num_shards_, 0);
  commit->prepared.resize(num_shards_);
  commit->preparing = NeedsPrepare(*commit);
  commit_ = std::move(commit);
  SendCommit();
}

void GroupLeader::SendCommit() {
  if (commit_->preparing) return SendPrepare();
  commit_->retry = absl::InfiniteFuture();
  for (int s = 0; s < num_shards_; ++s) {
    if (commit_->acknowledged[s] || commit_->sent[s]) continue;
    commit_->sent[s] = true;
    effects_.push_back([this, s, epoch = epoch_, request = commit_->request] {
      FaultPoint("leader.commit.sending");
      options_.links[s]->Commit(request, kCommitTimeout,
                                [this, s, epoch](absl::StatusOr<CommitReply> reply) {
                                  Enter([&] { OnCommitReply(epoch, s, reply); });
                                });
      FaultPoint("leader.commit.sent");
    });
  }
}

void GroupLeader::OnCommitReply(uint64_t epoch, int shard,
                                const absl::StatusOr<CommitReply>& reply) {
  // A commit ends when all shards have answered, so within an epoch every answer is to this one.
  if (epoch != epoch_ || commit_ == nullptr || stopped_) return;
  commit_->sent[shard] = false;
  if (!reply.ok()) {
    if (absl::IsUnavailable(reply.status()) || absl::IsDeadlineExceeded(reply.status()) ||
        absl::IsResourceExhausted(reply.status())) {
      commit_->retry = options_.clock->Now() + kRetryDelay;  // the shard may only be slow
      return;
    }
    LoseShard(shard, absl::StrCat("shard ", shard, " did not commit step ", commit_->request.step(),
                                  ": ", reply.status().message()));
    return;
  }
  commit_->acknowledged[shard] = true;
  commit_->shard_steps[shard] = reply->step();
  if (std::all_of(commit_->acknowledged.begin(), commit_->acknowledged.end(),
                  [](bool a) { return a; })) {
    OnCommitted();
  }
}

void GroupLeader::OnCommitted() {
  const std::unique_ptr<CommitInFlight> commit = std::move(commit_);
  const CommitRequest& request = commit->request;
  if (sync_ && !commit->again) {
    step_ = request.step();
    collectors_.erase(collectors_.begin(), collectors_.upper_bound(step_));
    plan_.Forget(step_);
    CountStep(step_, commit->decision.statistics);
    worker_states_ = std::move(commit->decision.worker_states);
  }
  if (request.publish()) {
    newest_cut_ = std::max(newest_cut_, request.step());
    cut_shard_steps_ = sync_ ? std::vector<int64_t>() : commit->shard_steps;
    changed_ = true;
  }
  if (request.checkpoint()) StartCheckpoint(*commit);
  WakeAssignments();
  TryDecide();
}

}  // namespace codistill
