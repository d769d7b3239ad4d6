// What the leader answers its workers.

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/config/schedule.h"
#include "common/config/shard_map.h"
#include "glog/logging.h"
#include "server/leader.h"

namespace codistill {
namespace {

constexpr int32_t kMaxAssignments = 128;

}  // namespace

absl::StatusOr<RegisterReply> GroupLeader::Register(const RegisterRequest& request) {
  const absl::Time now = options_.clock->Now();
  absl::StatusOr<RegisterReply> result = absl::InternalError("not answered");
  Enter([&] {
    if (const absl::Status status = CheckServing(generation_); !status.ok()) {
      result = status;
      return;
    }
    if (const absl::Status status = membership_.CheckRank(request.rank()); !status.ok()) {
      result = status;
      return;
    }
    TensorList ours, theirs;
    *ours.mutable_tensors() = options_.map.tensors();
    *theirs.mutable_tensors() = request.tensors();
    if (const std::string difference = FirstDifference(ours, theirs); !difference.empty()) {
      result = absl::FailedPreconditionError(
          absl::StrCat("worker ", request.rank(), " of group ", GroupName(),
                       ": its archive is not the group's model: ", difference));
      return;
    }
    // The step whose decision is on its way may have this rank's push in it, and its state after
    // it. The next process is to go on from there.
    if (sync_ && StateWithEveryStep() && commit_ != nullptr && !commit_->again &&
        !membership_.Is(request.rank(), request.process_nonce())) {
      result = absl::UnavailableError(absl::StrCat("step ", commit_->request.step(), " of group ",
                                                   GroupName(), " is being decided; try again"));
      return;
    }
    const uint64_t before = membership_.incarnation(request.rank());
    const bool was_live = membership_.live(request.rank());
    const absl::StatusOr<uint64_t> incarnation = membership_.Register(request, now);
    if (!incarnation.ok()) {
      result = incarnation.status();
      return;
    }
    if (*incarnation != before) {
      LOG(INFO) << "group " << GroupName() << ": worker " << request.rank() << " registered from "
                << request.address() << ", incarnation " << *incarnation;
      for (auto& item : collectors_) {
        // A step whose decision is on its way stays as it is.
        if (commit_ != nullptr && item.first == commit_->request.step()) continue;
        // ELASTIC: the newcomer takes part in later steps only, and what is whole of the old one
        // counts.
        if (elastic_ && item.second.Whole(request.rank())) continue;
        item.second.ForgetOlder(request.rank(), *incarnation);
      }
      for (auto it = parked_.begin(); it != parked_.end();) {
        if (it->request.rank() != request.rank()) {
          ++it;
          continue;
        }
        effects_.push_back([done = std::move(it->done)] {
          done(absl::FailedPreconditionError("a newer process of this rank has registered"));
        });
        it = parked_.erase(it);
      }
    }
    if (!sync_) NoteRegistrant(request, *incarnation != before);
    RegisterReply reply;
    reply.set_generation(generation_);
    reply.set_incarnation(*incarnation);
    *reply.mutable_shard_map() = options_.map;
    reply.set_shard_map_digest(options_.map_digest);
    for (const std::string& address : shard_addresses_) reply.add_shard_addresses(address);
    reply.mutable_version()->set_generation(generation_);
    reply.mutable_version()->set_step(step_);
    if (!sync_) {
      for (const ShardState& shard : shards_) reply.mutable_version()->add_shard_steps(shard.step);
    }
    reply.set_num_workers(num_workers_);
    const auto state = worker_states_.find(request.rank());
    if (StateWithEveryStep() && state != worker_states_.end()) {
      // As it is now, for a process that takes the place of a lost one.
      reply.set_worker_state(state->second);
      reply.set_worker_state_step(step_);
    } else if (origin_ != nullptr) {
      for (const WorkerState& state : origin_->worker_states()) {
        if (state.rank() != request.rank()) continue;
        reply.set_worker_state(state.state());
        reply.set_worker_state_step(origin_->version().step());
      }
    }
    result = std::move(reply);
    MaybeStart(now);
    if (*incarnation != before || !was_live) PlanMembers();
  });
  return result;
}

void GroupLeader::GetAssignments(const GetAssignmentsRequest& request, absl::Time deadline,
                                 Done<GetAssignmentsReply> done) {
  const absl::Time now = options_.clock->Now();
  Enter([&] {
    absl::Status status = CheckServing(request.generation());
    if (status.ok()) {
      status = membership_.Check(request.rank(), request.incarnation(), /*known_only=*/true);
    }
    if (!status.ok()) {
      effects_.push_back([done = std::move(done), status] { done(status); });
      return;
    }
    Heard(request.rank(), now);
    if (!sync_) NoteOver(request.rank(), request.completed_step());
    for (auto it = parked_.begin(); it != parked_.end(); ++it) {
      if (it->request.rank() != request.rank()) continue;
      // One call of a rank waits at a time; an older one is answered as if its time were up.
      effects_.push_back([older = std::move(it->done)] { older(GetAssignmentsReply()); });
      parked_.erase(it);
      break;
    }
    GetAssignmentsReply reply;
    if (TryAssign(request, &reply)) {
      effects_.push_back([done = std::move(done), reply] { done(reply); });
    } else {
      parked_.push_back({request, deadline, std::move(done)});
    }
  });
}

bool GroupLeader::TryAssign(const GetAssignmentsRequest& request, GetAssignmentsReply* reply) {
  if (draining_ || Finished()) {
    reply->set_finished(true);
    return true;
  }
  // After the last step workers wait for its checkpoint: until then they may be needed again.
  if (!started_ || Reloading() || step_ >= stop_steps_ || TooFew()) return false;
  if (sync_) {
    AssignSync(request, reply);
  } else {
    AssignAsync(request, reply);
  }
  if (reply->assignments_size() == 0) return false;
  if (training_begin_ == absl::InfiniteFuture()) {
    training_begin_ = options_.clock->Now();
    history_.SkipTo(base_seconds_);
  }
  return true;
}

void GroupLeader::AssignSync(const GetAssignmentsRequest& request, GetAssignmentsReply* reply) {
  const int64_t ahead = std::clamp(request.max_assignments(), 1, kMaxAssignments);
  int64_t decided = step_;
  // Whoever may be done without need not begin a step whose decision is on its way.
  if ((elastic_ || backup_workers_ > 0) && commit_ != nullptr) {
    decided = std::max(decided, commit_->request.step());
  }
  const int64_t first = std::max(request.first_step(), decided + 1);
  int64_t last = std::min(step_ + ahead, stop_steps_);
  // What one rank has been given the others need too, also while paused.
  if (paused_) last = std::min(last, handed_out_);
  for (int64_t step = first; step <= last; ++step) {
    if (!plan_.Has(step, request.rank(), request.incarnation())) continue;
    Assignment* const assignment = reply->add_assignments();
    assignment->set_step(step);
    assignment->set_first_example(*plan_.FirstExample(step, request.rank()));
    assignment->set_num_examples(job_.training().batch_size());
    assignment->set_teacher_weight(TeacherWeightAt(job_, step));
    assignment->set_want_worker_state(StateWithEveryStep() || SnapshotDue(step));
    // A step has no older weights than those the generation began with.
    const int64_t oldest = origin_ == nullptr ? 0 : origin_->version().step();
    assignment->set_weights_step(std::max(oldest, step - 1 - job_.training().weights_lag()));
    for (const MemberPlan::Member& member : plan_.At(step)) assignment->add_members(member.rank);
    handed_out_ = std::max(handed_out_, step);
  }
}

void GroupLeader::AssignAsync(const GetAssignmentsRequest& request, GetAssignmentsReply* reply) {
  constexpr size_t kRemembered = 2 * kMaxAssignments;
  if (paused_) return;
  AsyncRank& rank = async_ranks_[request.rank()];
  const int64_t count = std::clamp(request.max_assignments(), 1, kMaxAssignments);
  // Ranges are issued once: what a process took with it is lost. Only an answer that did not arrive
  // is given again, to the process it was for.
  if (request.first_step() == 0) rank.issued.clear();
  const int64_t first =
      request.first_step() == 0 ? rank.next_step : std::min(request.first_step(), rank.next_step);
  for (const Assignment& issued : rank.issued) {
    if (issued.step() >= first && reply->assignments_size() < count) {
      *reply->add_assignments() = issued;
    }
  }
  const int64_t batch = job_.training().batch_size();
  while (reply->assignments_size() < count && !ledger_.Full(request.rank())) {
    // Nothing is handed out that would run ahead of the slowest by more than the bound. The clocks
    // never go back, so what is handed out stays within it.
    if (max_staleness_ >= 0 && rank.next_step > clocks_.Limit(max_staleness_)) break;
    async_totals_.set_max_ahead(
        std::max(async_totals_.max_ahead(), rank.next_step - 1 - clocks_.Slowest()));
    ledger_.Issued(request.rank(), request.incarnation(), rank.next_step);
    Assignment assignment;
    assignment.set_step(rank.next_step++);
    assignment.set_first_example(async_cursor_);
    assignment.set_num_examples(batch);
    async_cursor_ += static_cast<uint64_t>(batch);
    assignment.set_teacher_weight(TeacherWeightAt(job_, assignment.step()));
    assignment.set_want_worker_state(StateWithEveryStep());
    if (elastic_) {
      for (const auto& member : membership_.Live()) assignment.add_members(member.rank);
    } else {
      for (int32_t member = 0; member < num_workers_; ++member) assignment.add_members(member);
    }
    rank.issued.push_back(assignment);
    if (rank.issued.size() > kRemembered) rank.issued.pop_front();
    if (assignment.step() >= first) *reply->add_assignments() = std::move(assignment);
  }
}

void GroupLeader::NoteRegistrant(const RegisterRequest& request, bool another) {
  // What this process was handed by an earlier leader is not handed out again.
  async_cursor_ = std::max<uint64_t>(async_cursor_, request.end_example());
  AsyncRank& rank = async_ranks_[request.rank()];
  if (another) {
    // Whatever was handed to the process before is over.
    rank.next_step = std::max(rank.next_step, clocks_.Slowest() + 1);
    rank.issued.clear();
    const int64_t slowest = clocks_.Slowest();
    clocks_.Join(request.rank(), rank.next_step - 1);
    if (max_staleness_ >= 0 && clocks_.Slowest() > slowest) WakeAssignments();
  } else if (request.generation() == generation_) {
    NoteOver(request.rank(), request.completed_step());
  }
}

void GroupLeader::NoteOver(int32_t rank, int64_t step) {
  const int64_t slowest = clocks_.Slowest();
  // A worker cannot be done with what it was not given.
  clocks_.Over(rank, std::min(step, async_ranks_[rank].next_step - 1));
  if (max_staleness_ >= 0 && clocks_.Slowest() > slowest) WakeAssignments();
}

void GroupLeader::WakeAssignments() {
  std::vector<ParkedAssignments> still;
  for (ParkedAssignments& parked : parked_) {
    GetAssignmentsReply reply;
    if (TryAssign(parked.request, &reply)) {
      effects_.push_back([done = std::move(parked.done), reply] { done(reply); });
    } else {
      still.push_back(std::move(parked));
    }
  }
  parked_ = std::move(still);
}

void GroupLeader::FailAssignments(const absl::Status& status) {
  for (ParkedAssignments& parked : parked_) {
    effects_.push_back([done = std::move(parked.done), status] { done(status); });
  }
  parked_.clear();
}

void GroupLeader::ExpireAssignments(absl::Time now) {
  for (auto it = parked_.begin(); it != parked_.end();) {
    if (now < it->deadline) {
      ++it;
      continue;
    }
    effects_.push_back([done = std::move(it->done)] { done(GetAssignmentsReply()); });
    it = parked_.erase(it);
  }
}

absl::StatusOr<HeartbeatReply> GroupLeader::Heartbeat(const HeartbeatRequest& request) {
  const absl::Time now = options_.clock->Now();
  absl::StatusOr<HeartbeatReply> result = HeartbeatReply();
  Enter([&] {
    absl::Status status = membership_.Check(request.rank(), request.incarnation(),
                                            /*known_only=*/false, request.process_nonce());
    if (status.ok() && !request.fatal_error().empty()) {
      Fail(absl::StrCat("worker ", request.rank(), " of group ", GroupName(), ": ",
                        request.fatal_error()));
    }
    if (status.ok() && membership_.incarnation(request.rank()) == request.incarnation()) {
      const bool was_live = membership_.live(request.rank());
      membership_.Heartbeat(request, now);
      if (was_live != membership_.live(request.rank())) PlanMembers();
      if (request.leaving()) {
        LOG(INFO) << "group " << GroupName() << ": worker " << request.rank() << " has left";
        // It has all its answers: they are asked for, so that reports of the end have them.
        for (ShardState& shard : shards_) shard.last_probe = absl::InfinitePast();
      }
    }
    if (status.ok() && superseded_) status = absl::UnavailableError(error_);
    if (status.ok() && failed_) status = absl::FailedPreconditionError(error_);
    if (!status.ok()) {
      result = status;
      return;
    }
    result->set_drain(draining_);
    // 0 tells a worker nothing; a generation that is not its own, to register again.
    if (stage_ == Stage::kReady) result->set_generation(generation_);
  });
  return result;
}

absl::Status GroupLeader::ReportEvaluation(const ReportEvaluationRequest& request) {
  absl::Status status;
  Enter([&] {
    if (stage_ != Stage::kReady) {
      status = absl::UnavailableError("the group is restoring");
    } else if (request.result().version().generation() != generation_) {
      status = absl::AbortedError(absl::StrCat("the measured version is of generation ",
                                               request.result().version().generation(),
                                               ", the group in ", generation_));
    } else {
      history_.AddEvaluation(request.result());
    }
  });
  return status;
}

}  // namespace codistill
