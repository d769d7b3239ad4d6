// Pushes: from the first frame to the answer.

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/fault.h"
#include "common/base/retry_after.h"
#include "common/base/status.h"
#include "common/base/trace.h"
#include "common/config/job.h"
#include "common/config/schedule.h"
#include "glog/logging.h"
#include "server/gradient_norms.h"
#include "server/shard.h"

namespace codistill {
namespace {

// Reports an ASYNC shard keeps for a leader that does not answer; with so many, pushes wait too.
constexpr size_t kMaxAsyncReports = 4096;

}  // namespace

absl::StatusOr<std::shared_ptr<StagedPush>> ModelShard::BeginPush(const PushBegin& begin) {
  MutexLock lock(&mu_);
  const bool known = begin.rank() >= 0 && begin.rank() < max_workers_;
  const int32_t counted_as = known ? begin.rank() : -1;
  pushes_.Begun(counted_as);
  const auto refuse = [&](const absl::Status& status) {
    mu_.AssertHeld();
    ++counters_.failures;
    pushes_.Refused(counted_as);
    return status;
  };
  if (const absl::Status status = CheckGeneration(begin.generation()); !status.ok()) {
    pushes_.Refused(counted_as);
    return status;
  }
  if (begin.shard_map_digest() != options_.map_digest) {
    return refuse(absl::FailedPreconditionError(
        absl::StrCat("digest ", begin.shard_map_digest(), " of the shard map is not the group's, ",
                     options_.map_digest)));
  }
  if (!known) {
    return refuse(absl::InvalidArgumentError(
        absl::StrCat("rank ", begin.rank(), " is none of the group's ", max_workers_, " workers")));
  }
  uint64_t& newest = newest_incarnation_[begin.rank()];
  if (begin.incarnation() < newest) {
    return refuse(absl::FailedPreconditionError(absl::StrCat("rank ", begin.rank(),
                                                             ": incarnation ", begin.incarnation(),
                                                             " was replaced by ", newest)));
  }
  if (begin.step() < 1 || (sync_ && begin.step() > step_ + 1 + weights_lag_)) {
    return refuse(absl::FailedPreconditionError(absl::StrCat(
        "push for step ", begin.step(), " while ", Name(), " takes step ", step_ + 1)));
  }
  newest = begin.incarnation();
  if (!sync_) outcomes_.Begun(begin);
  for (int64_t i = 0; i <= weights_lag_; ++i) {
    const auto open = open_.find({begin.rank(), i});
    if (open == open_.end()) continue;
    const std::shared_ptr<StagedPush> older = open->second.lock();
    if (older != nullptr &&
        (open->first == Place(begin) || older->begin().incarnation() != begin.incarnation())) {
      older->Supersede();
    }
  }
  std::shared_ptr<StagedPush> push;
  // The only push that can be of this step: nothing that is yet to be decided enters its update.
  if (sync_ && max_workers_ == 1 && begin.step() == step_ + 1) {
    push = store_->NewEarlyPush(begin, {begin.step(),
                                        LearningRateAt(options_.job, begin.step()),
                                        WeightDecayAt(options_.job, begin.step()),
                                        1.0,
                                        {}});
  }
  if (push == nullptr) push = store_->NewPush(begin);
  if (!embeddings_->empty()) push->ExpectRows(&embeddings_->row_layout());
  open_[Place(begin)] = push;
  return push;
}

ModelShard::Done<PushReply> ModelShard::Counted(int32_t rank, Done<PushReply> done) {
  return [this, rank, done = std::move(done)](absl::StatusOr<PushReply> reply) {
    {
      MutexLock lock(&mu_);
      pushes_.Answered(rank, reply);
    }
    done(std::move(reply));
  };
}

void ModelShard::DropPush(const StagedPush& push, bool refused) {
  MutexLock lock(&mu_);
  if (refused) {
    pushes_.Refused(push.begin().rank());
  } else {
    pushes_.Lost(push.begin().rank());
  }
}

void ModelShard::EndPush(std::shared_ptr<StagedPush> push, PushEnd end, Done<PushReply> done) {
  FaultPoint("shard.push.ended");
  const PushBegin& begin = push->begin();
  done = Counted(begin.rank(), std::move(done));
  {
    MutexLock lock(&mu_);
    ++counters_.pushes;
    counters_.push_bytes += push->payload_bytes();
  }
  absl::Status status;
  // What no arithmetic on the push may meet.
  if (end.num_examples() < 0 || end.num_labels() < 0) {
    status = absl::InvalidArgumentError(absl::StrCat("END of rank ", begin.rank(), ": ",
                                                     end.num_examples(), " examples, ",
                                                     end.num_labels(), " labels"));
  } else if (end.finite()) {
    status = push->CheckComplete();
    if (status.ok() && push->rows() != nullptr) status = push->rows()->finite();
    // Clipping by a norm that is none would make NaNs, or not clip at all.
    if (status.ok() && !sync_ && options_.job.training().optimizer().clip_norm() > 0 &&
        !(std::isfinite(end.total_squared_norm()) &&
          end.total_squared_norm() >= end.squared_norm())) {
      status = absl::InvalidArgumentError(absl::StrCat(
          "END of rank ", begin.rank(), ": total_squared_norm ", end.total_squared_norm(),
          " is not that of a push of which this shard alone has ", end.squared_norm()));
    }
  }
  if (!status.ok()) {
    {
      MutexLock lock(&mu_);
      ++counters_.failures;
    }
    done(status);
    return;
  }
  if (!sync_) {
    EndPushAsync(std::move(push), std::move(end), std::move(done));
    return;
  }

  Effects effects;
  {
    MutexLock lock(&mu_);
    const absl::Status generation = CheckGeneration(begin.generation());
    if (!generation.ok()) {
      effects.push_back([&done, generation] { done(generation); });
    } else if (push->superseded()) {
      effects.push_back([&done, &begin] {
        done(absl::AbortedError(
            absl::StrCat("a newer push of rank ", begin.rank(), " has taken this one's place")));
      });
    } else if (begin.step() <= step_) {
      effects.push_back([&done, reply = DecidedAlready(begin)] { done(reply); });
    } else {
      const std::pair<int32_t, uint64_t> key(begin.rank(), begin.incarnation());
      if (const auto open = open_.find(Place(begin));
          open != open_.end() && open->second.lock() == push) {
        open_.erase(open);
      }
      // The same process sends its push again: the connection was lost.
      const auto same = waiting_.find(key);
      if (same != waiting_.end()) {
        effects.push_back([older = std::move(same->second.done)] {
          older(absl::AbortedError("the same process has sent this push again"));
        });
        waiting_.erase(same);
      }
      // The leader may have decided for an older incarnation a moment ago, so that one is kept; of
      // two older ones only the newer.
      const auto first = waiting_.lower_bound({begin.rank(), 0});
      const auto last = waiting_.lower_bound({begin.rank() + 1, 0});
      if (std::distance(first, last) >= 2) {
        effects.push_back([older = std::move(first->second.done)] {
          older(
              absl::FailedPreconditionError("a newer process of this rank has replaced this one"));
        });
        waiting_.erase(first);
      }
      Waiting& waiting = waiting_[key];
      waiting.push = std::move(push);
      waiting.end = std::move(end);
      waiting.done = std::move(done);
      Report(key.first, key.second, &waiting, &effects);
    }
  }
  for (const auto& effect : effects) effect();
}

PushReply ModelShard::DecidedAlready(const PushBegin& begin) const {
  PushReply reply;
  reply.set_step(step_);
  reply.set_outcome(DROPPED_LATE);
  reply.set_message(absl::StrCat("step ", begin.step(), " was decided without this push"));
  for (const Decision& decision : decisions_) {
    if (decision.step != begin.step()) continue;
    if (decision.applied.count(begin.rank()) > 0) {
      reply.set_step(begin.step());
      reply.set_outcome(DUPLICATE);
      reply.set_message(
          absl::StrCat("rank ", begin.rank(), " is part of step ", begin.step(), " already"));
    } else if (decision.rejected.count(begin.rank()) > 0) {
      reply.set_step(begin.step());
      reply.set_outcome(REJECTED);
      reply.set_message("an earlier push for this step was not finite");
    }
  }
  return reply;
}

void ModelShard::Report(int32_t rank, uint64_t incarnation, Waiting* waiting, Effects* effects) {
  waiting->reporting = true;
  ReportEndRequest request;
  request.mutable_group()->set_run_id(RunId(options_.job));
  request.mutable_group()->set_group(group_name_);
  request.set_generation(waiting->push->begin().generation());
  request.set_step(waiting->push->begin().step());
  request.set_rank(rank);
  request.set_incarnation(incarnation);
  request.set_shard(options_.shard);
  *request.mutable_end() = waiting->end;
  if (options_.shard == 0) request.set_worker_state(waiting->push->worker_state());
  effects->push_back([this, request = std::move(request)] {
    options_.reporter->ReportEnd(
        request, [this, generation = request.generation(), step = request.step(),
                  rank = request.rank(), incarnation = request.incarnation()](absl::Status status) {
          OnReported(generation, step, rank, incarnation, status);
        });
  });
}

void ModelShard::OnReported(uint64_t generation, int64_t step, int32_t rank, uint64_t incarnation,
                            const absl::Status& status) {
  Done<PushReply> refused;
  {
    MutexLock lock(&mu_);
    const auto it = waiting_.find({rank, incarnation});
    if (it == waiting_.end() || it->second.push->begin().generation() != generation ||
        it->second.push->begin().step() != step) {
      return;
    }
    it->second.reporting = false;
    it->second.reported = status.ok();
    // Everything else is tried again by Tick: the leader is away, or restoring.
    if (absl::IsFailedPrecondition(status) || absl::IsInvalidArgument(status) ||
        absl::IsPermissionDenied(status)) {
      refused = std::move(it->second.done);
      waiting_.erase(it);
    }
  }
  if (refused) refused(status);
}

void ModelShard::Tick() {
  Effects effects;
  {
    MutexLock lock(&mu_);
    for (auto& item : waiting_) {
      if (item.second.reported || item.second.reporting) continue;
      Report(item.first.first, item.first.second, &item.second, &effects);
    }
    WakePulls(&effects);  // some wait for other readers to end
  }
  for (const auto& effect : effects) effect();
  if (!sync_) SendAsyncReports();
}

// ------------------------------------------------------------------------------------------ ASYNC

void ModelShard::EndPushAsync(std::shared_ptr<StagedPush> push, PushEnd end, Done<PushReply> done) {
  auto shared = std::make_shared<Done<PushReply>>(std::move(done));
  const absl::Status status =
      executor_->Schedule([this, push = std::move(push), end = std::move(end), shared]() mutable {
        absl::StatusOr<PushReply> reply = DecideAsync(*push, end);
        push.reset();
        (*shared)(std::move(reply));
        SendAsyncReports();
      });
  if (!status.ok()) (*shared)(Annotate(status, Name()));
}

absl::StatusOr<PushReply> ModelShard::DecideAsync(const StagedPush& push, const PushEnd& end) {
  const PushBegin& begin = push.begin();
  PushReply reply;
  int64_t next = 0;
  {
    MutexLock lock(&mu_);
    CODISTILL_RETURN_IF_ERROR(CheckGeneration(begin.generation()));
    if (push.superseded()) {
      return absl::AbortedError(
          absl::StrCat("a newer push of rank ", begin.rank(), " has taken this one's place"));
    }
    if (std::optional<PushReply> earlier = outcomes_.Find(begin)) return *std::move(earlier);
    if (async_reports_.size() >= kMaxAsyncReports) {
      // What is applied must be told to the leader, or its books would be wrong.
      return WithRetryAfter(
          absl::ResourceExhaustedError(
              absl::StrCat(Name(), ": ", kMaxAsyncReports, " reports wait for the leader already")),
          absl::Milliseconds(200));
    }
    reply.set_step(step_);
    const int64_t behind = outcomes_.furthest_step() - begin.step();
    if (step_ >= options_.job.stop().steps()) {
      reply.set_outcome(DROPPED_LATE);
      reply.set_message(absl::StrCat("the group has reached its last step, ", step_));
    } else if (begin.shard_incarnation() != 0 && begin.shard_incarnation() != incarnation_) {
      reply.set_outcome(TOO_STALE);
      reply.set_message(absl::StrCat("computed from weights of incarnation ",
                                     begin.shard_incarnation(), " of ", Name(),
                                     ", which is in incarnation ", incarnation_));
    } else if (max_staleness_ >= 0 && behind > max_staleness_) {
      reply.set_outcome(TOO_STALE);
      reply.set_message(absl::StrCat("step ", begin.step(), " of rank ", begin.rank(), " is ",
                                     behind, " steps behind the furthest, ",
                                     outcomes_.furthest_step(), "; training.max_staleness is ",
                                     max_staleness_));
    }
    if (reply.outcome() != PUSH_OUTCOME_INVALID) {
      if (reply.outcome() == TOO_STALE) ++counters_.too_stale;
      NoteAsync(push, end, reply);
      return reply;
    }
    next = step_ + 1;
    if (end.finite()) {
      counters_.max_staleness = std::max(counters_.max_staleness, behind);
      counters_.max_update_lag = std::max(counters_.max_update_lag, step_ - begin.weights_step());
    }
  }
  reply.set_step(next);
  reply.set_outcome(APPLIED);
  std::vector<ShardStore::Contribution> contributions;
  if (end.finite()) {
    contributions.push_back({&push, std::max<int64_t>(end.num_examples(), 1)});
  } else {
    // It changes nothing but counts as a step, as in SYNC: a job whose pushes are all refused ends.
    reply.set_outcome(REJECTED);
    reply.set_message(
        absl::StrCat("gradient of tensor ", end.not_finite_tensor(), " is not finite"));
    LOG(WARNING) << Name() << ": push " << begin.step() << " of rank " << begin.rank()
                 << " rejected: " << reply.message();
  }
  TraceSpan update("update", "update");
  update.Arg("step", next).Arg("rank", begin.rank()).Arg("shard", options_.shard);
  // Only this thread changes step_, so `next` stays right.
  const absl::Time started = options_.clock->Now();
  store_->Apply(
      {next,
       LearningRateAt(options_.job, next),
       WeightDecayAt(options_.job, next),
       ClipScale(options_.job.training().optimizer(), std::sqrt(end.total_squared_norm())),
       {}},
      contributions);
  ApplyRows(next, LearningRateAt(options_.job, next), contributions);
  update.End();
  if (options_.on_commit) {
    options_.on_commit(absl::ToDoubleSeconds(options_.clock->Now() - started));
  }

  Effects effects;
  {
    MutexLock lock(&mu_);
    step_ = next;
    ++counters_.commits;
    if (!end.finite()) ++counters_.rejected;
    NoteAsync(push, end, reply);
    WakePulls(&effects);
  }
  for (const auto& effect : effects) effect();
  return reply;
}

void ModelShard::NoteAsync(const StagedPush& push, const PushEnd& end, const PushReply& reply) {
  const PushBegin& begin = push.begin();
  outcomes_.Note(begin, reply);
  ReportEndRequest report;
  report.mutable_group()->set_run_id(RunId(options_.job));
  report.mutable_group()->set_group(group_name_);
  report.set_generation(begin.generation());
  report.set_step(reply.step());
  report.set_rank(begin.rank());
  report.set_incarnation(begin.incarnation());
  report.set_shard(options_.shard);
  report.set_shard_incarnation(incarnation_);
  report.set_own_step(begin.step());
  report.set_outcome(reply.outcome());
  *report.mutable_end() = end;
  if (options_.shard == 0) report.set_worker_state(push.worker_state());
  async_reports_.push_back(std::move(report));
}

void ModelShard::SendAsyncReports() {
  ReportEndRequest report;
  {
    MutexLock lock(&mu_);
    if (async_reporting_ || async_reports_.empty()) return;
    async_reporting_ = true;
    report = async_reports_.front();
  }
  // One at a time, so that the leader sees the counts in order.
  options_.reporter->ReportEnd(report, [this, report](absl::Status status) {
    {
      MutexLock lock(&mu_);
      async_reporting_ = false;
      const bool later = absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
      if (later) return;  // Tick tries again
      if (!async_reports_.empty() && async_reports_.front().own_step() == report.own_step() &&
          async_reports_.front().rank() == report.rank() &&
          async_reports_.front().incarnation() == report.incarnation() &&
          async_reports_.front().shard_incarnation() == report.shard_incarnation() &&
          async_reports_.front().generation() == report.generation()) {
        async_reports_.pop_front();
      }
    }
    SendAsyncReports();
  });
}

}  // namespace codistill
