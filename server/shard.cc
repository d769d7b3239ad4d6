#include "server/shard.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/fault.h"
#include "common/base/status.h"
#include "common/base/trace.h"
#include "common/checkpoint/checkpoint_tensors.h"
#include "common/checkpoint/manifest.h"
#include "common/config/job.h"
#include "glog/logging.h"

namespace codistill {
namespace {

void Run(std::vector<std::function<void()>>* effects) {
  for (const std::function<void()>& effect : *effects) effect();
}

// In the order of a decision.
std::vector<ShardStore::Contribution> ContributionsOf(
    const std::vector<std::shared_ptr<StagedPush>>& pushes,
    const google::protobuf::RepeatedPtrField<Contributor>& contributors) {
  std::vector<ShardStore::Contribution> contributions;
  for (size_t i = 0; i < pushes.size(); ++i) {
    contributions.push_back({pushes[i].get(), contributors[static_cast<int>(i)].num_examples()});
  }
  return contributions;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelShard>> ModelShard::Create(Options options) {
  std::unique_ptr<ModelShard> shard(new ModelShard(std::move(options)));
  ShardStore::Options store;
  store.map = shard->options_.map;
  store.shard = shard->options_.shard;
  store.optimizer = shard->options_.job.training().optimizer();
  store.threads = shard->options_.job.training().server_threads();
  store.held_cuts = shard->options_.job.training().held_cuts();
  store.clock = shard->options_.clock;
  CODISTILL_ASSIGN_OR_RETURN(shard->store_, ShardStore::Create(std::move(store)));
  CODISTILL_ASSIGN_OR_RETURN(
      shard->embeddings_,
      EmbeddingStore::Create(shard->options_.job, shard->options_.group, shard->options_.shard,
                             shard->options_.map.num_shards()));
  CODISTILL_ASSIGN_OR_RETURN(shard->executor_, Executor::Create({"shard", 1, 1024}));
  CODISTILL_ASSIGN_OR_RETURN(shard->io_executor_, Executor::Create({"shard-io", 1, 16}));
  return shard;
}

ModelShard::ModelShard(Options options)
    : options_(std::move(options)),
      sync_(options_.job.training().update_mode() == TrainingConfig::SYNC),
      group_name_(options_.job.groups(options_.group).name()),
      max_workers_(MaxWorkers(options_.job, options_.group)),
      max_staleness_(options_.job.training().update_mode() == TrainingConfig::BOUNDED_STALENESS
                         ? options_.job.training().max_staleness()
                         : -1),
      weights_lag_(options_.job.training().weights_lag()) {}

ModelShard::~ModelShard() {
  Drain();
  if (executor_ != nullptr) executor_->Shutdown();
  if (io_executor_ != nullptr) io_executor_->Shutdown();
}

std::string ModelShard::Name() const {
  return absl::StrCat("shard ", options_.shard, " of group ", group_name_);
}

absl::Status ModelShard::CheckGeneration(uint64_t generation) const {
  if (draining_) return absl::UnavailableError(absl::StrCat(Name(), " is draining"));
  if (generation_ == 0) {
    return absl::UnavailableError(absl::StrCat(Name(), " is loading; try again"));
  }
  if (generation != generation_) {
    return absl::AbortedError(absl::StrCat("generation ", generation,
                                           " is not the group's, which is ", generation_,
                                           "; register again"));
  }
  return absl::OkStatus();
}

void ModelShard::FailAll(const absl::Status& status, Effects* effects) {
  for (auto& item : waiting_) {
    effects->push_back([done = std::move(item.second.done), status] { done(status); });
  }
  for (ParkedPull& pull : parked_pulls_) {
    effects->push_back([done = std::move(pull.done), status] { done(status); });
  }
  for (auto& item : open_) {
    if (const std::shared_ptr<StagedPush> push = item.second.lock()) push->Supersede();
  }
  for (ParkedRows& pull : parked_rows_) {
    effects->push_back([done = std::move(pull.done), status] { done(status); });
  }
  waiting_.clear();
  parked_pulls_.clear();
  parked_rows_.clear();
  open_.clear();
}

void ModelShard::Drain() {
  Effects effects;
  {
    MutexLock lock(&mu_);
    draining_ = true;
    FailAll(absl::UnavailableError(absl::StrCat(Name(), " is draining")), &effects);
  }
  Run(&effects);
}

ModelShard::State ModelShard::state() const {
  State state;
  MutexLock lock(&mu_);
  state.generation = generation_;
  state.step = step_;
  state.loading = loading_;
  state.newest_cut = store_->newest_cut();
  return state;
}

ShardCounters ModelShard::counters() const {
  MutexLock lock(&mu_);
  ShardCounters counters = counters_;
  counters.staged_pushes = static_cast<int64_t>(waiting_.size());
  for (const auto& item : open_) counters.staged_pushes += item.second.expired() ? 0 : 1;
  counters.parked_calls = static_cast<int64_t>(waiting_.size() + parked_pulls_.size());
  return counters;
}

ShardLoad ModelShard::load() const {
  const ShardCounters counters = this->counters();
  ShardLoad load;
  load.set_shard(options_.shard);
  load.set_weight_bytes(store_->values_bytes());
  load.set_slot_bytes(store_->slot_bytes());
  load.set_pieces(static_cast<int64_t>(store_->layout().pieces().size()));
  load.set_pulls(counters.pulls);
  load.set_pull_bytes(counters.pull_bytes);
  load.set_pushes(counters.pushes);
  load.set_push_bytes(counters.push_bytes);
  load.set_commits(counters.commits);
  for (EmbeddingTableStatus& table : embeddings_->Status()) {
    *load.add_tables() = std::move(table);
  }
  return load;
}

absl::Time ModelShard::last_leader_call() const {
  MutexLock lock(&mu_);
  return last_leader_call_;
}

ProbeReply ModelShard::Probe() {
  ProbeReply reply;
  *reply.mutable_load() = load();
  MutexLock lock(&mu_);
  last_leader_call_ = options_.clock->Now();
  reply.set_shard(options_.shard);
  reply.set_process_nonce(options_.process_nonce);
  reply.set_generation(generation_);
  reply.set_step(step_);
  reply.set_shard_incarnation(generation_ == 0 ? 0 : incarnation_);
  pushes_.Fill(reply.mutable_pushes());
  return reply;
}

std::vector<RankPushes> ModelShard::push_counts() const {
  google::protobuf::RepeatedPtrField<RankPushes> ranks;
  MutexLock lock(&mu_);
  pushes_.Fill(&ranks);
  return {ranks.begin(), ranks.end()};
}

// ---------------------------------------------------------------------------------------- restore

void ModelShard::Restore(RestoreRequest request, Done<RestoreReply> done) {
  {
    MutexLock lock(&mu_);
    last_leader_call_ = options_.clock->Now();
  }
  // Whatever happens, `done` is called once: by the task, or here if it cannot run.
  auto shared = std::make_shared<Done<RestoreReply>>(std::move(done));
  const absl::Status status = executor_->Schedule(
      [this, request = std::move(request), shared] { (*shared)(DoRestore(request)); });
  if (!status.ok()) (*shared)(Annotate(status, Name()));
}

absl::StatusOr<RestoreReply> ModelShard::DoRestore(const RestoreRequest& request) {
  Effects effects;
  RestoreReply reply;
  reply.set_process_nonce(options_.process_nonce);
  {
    MutexLock lock(&mu_);
    if (draining_) return absl::UnavailableError(absl::StrCat(Name(), " is draining"));
    if (request.leader_claim() != 0 && request.leader_claim() < leader_claim_) {
      return absl::FailedPreconditionError(absl::StrCat(Name(), " follows the leader of claim ",
                                                        leader_claim_, "; that of claim ",
                                                        request.leader_claim(), " is older"));
    }
    leader_claim_ = std::max<uint64_t>(leader_claim_, request.leader_claim());
    if (request.keep() && (generation_ == 0 || request.generation() != generation_)) {
      return absl::FailedPreconditionError(absl::StrCat(Name(), " is in generation ", generation_,
                                                        "; it cannot be kept for ",
                                                        request.generation()));
    }
    if (request.generation() == 0 || request.generation() < newest_generation_) {
      return absl::FailedPreconditionError(
          absl::StrCat(Name(), " has seen generation ", newest_generation_,
                       "; it cannot go back to ", request.generation()));
    }
    if (request.generation() == newest_generation_ && request.leader_nonce() != leader_nonce_ &&
        !request.keep()) {
      return absl::FailedPreconditionError(absl::StrCat(
          Name(), ": generation ", request.generation(), " belongs to another leader"));
    }
    if (request.shard_map_digest() != options_.map_digest) {
      return absl::FailedPreconditionError(
          absl::StrCat(Name(), ": the leader's shard map (digest ", request.shard_map_digest(),
                       ") is not this shard's (", options_.map_digest,
                       "): do all shards read the same job file and tensor list?"));
    }
    const bool again =
        request.generation() == generation_ && request.shard_incarnation() == incarnation_;
    if (again || request.keep()) {
      leader_nonce_ = request.leader_nonce();
      options_.reporter->SetLeader(request.leader_address());
      reply.set_step(step_);
      reply.set_shard_incarnation(incarnation_);
      reply.set_end_example(outcomes_.end_example());
      reply.set_furthest_step(outcomes_.furthest_step());
      return reply;
    }
    newest_generation_ = request.generation();
    leader_nonce_ = request.leader_nonce();
    incarnation_ = request.shard_incarnation();
    generation_ = 0;
    loading_ = true;
    newest_incarnation_.clear();
    previous_.reset();
    decisions_.clear();
    outcomes_.Clear();
    async_reports_.clear();
    written_ = Written();
    FailAll(absl::AbortedError(absl::StrCat("the group begins generation ", request.generation(),
                                            "; register again")),
            &effects);
  }
  Run(&effects);

  const absl::Time begin = options_.clock->Now();
  FaultPoint("shard.restore.begun");
  const absl::Status status = Load(request);
  FaultPoint("shard.restore.loaded");
  options_.reporter->SetLeader(request.leader_address());
  MutexLock lock(&mu_);
  loading_ = false;
  if (!status.ok()) {
    ++counters_.failures;
    LOG(ERROR) << Name() << ": generation " << request.generation()
               << " could not be loaded: " << status;
    return status;
  }
  ++counters_.restores;
  generation_ = request.generation();
  step_ = std::max(store_->step(), request.min_step());
  reply.set_step(step_);
  reply.set_shard_incarnation(incarnation_);
  LOG(INFO) << Name() << ": generation " << generation_ << " begins at step " << step_ << " from "
            << (request.manifest().empty() ? "the initial weights" : request.manifest()) << ", "
            << store_->values_bytes() << " bytes of weights in "
            << absl::ToDoubleSeconds(options_.clock->Now() - begin) << " s";
  return reply;
}

absl::Status ModelShard::Load(const RestoreRequest& request) {
  int64_t label = 0;
  if (request.manifest().empty()) {
    CODISTILL_RETURN_IF_ERROR(store_->LoadInitial(WeightsPath(options_.job, options_.group),
                                                  options_.job.groups(options_.group).warm_start(),
                                                  options_.file_system));
  } else {
    const std::string directory = CheckpointDirectory(options_.job, options_.group);
    CODISTILL_ASSIGN_OR_RETURN(
        const CheckpointManifest manifest,
        ReadManifest(JoinPath(directory, request.manifest()), options_.file_system));
    if (manifest.shard_map_digest() != options_.map_digest) {
      CODISTILL_ASSIGN_OR_RETURN(
          const std::unique_ptr<CheckpointTensors> tensors,
          CheckpointTensors::Open(directory, manifest, options_.file_system));
      CODISTILL_RETURN_IF_ERROR(store_->LoadResharded(tensors.get()));
    } else if (options_.shard >= manifest.files_size()) {
      return absl::DataLossError(absl::StrCat(JoinPath(directory, request.manifest()),
                                              ": names no file of shard ", options_.shard));
    } else {
      CODISTILL_RETURN_IF_ERROR(
          store_->LoadCheckpoint(JoinPath(directory, manifest.files(options_.shard).name()),
                                 manifest, options_.file_system));
    }
    label = manifest.version().step();
    CODISTILL_RETURN_IF_ERROR(
        embeddings_->checkpoint()->Load(store_->step(), directory, manifest, options_.shard,
                                        options_.map.num_shards(), options_.file_system));
  }
  if (request.manifest().empty()) embeddings_->Clear(store_->step());
  embeddings_->cuts()->Start(label);
  store_->Publish(label);  // followers can load at once
  return absl::OkStatus();
}

// ---------------------------------------------------------------------------------------- commit

void ModelShard::Commit(CommitRequest request, Done<CommitReply> done) {
  {
    MutexLock lock(&mu_);
    last_leader_call_ = options_.clock->Now();
  }
  auto shared = std::make_shared<Done<CommitReply>>(std::move(done));
  const absl::Status status = executor_->Schedule(
      [this, request = std::move(request), shared] { (*shared)(DoCommit(request)); });
  if (!status.ok()) (*shared)(Annotate(status, Name()));
}

absl::StatusOr<std::vector<std::shared_ptr<StagedPush>>> ModelShard::Staged(
    int64_t step, const google::protobuf::RepeatedPtrField<Contributor>& contributors) const {
  std::vector<std::shared_ptr<StagedPush>> pushes;
  for (const Contributor& contributor : contributors) {
    const auto it = waiting_.find({contributor.rank(), contributor.incarnation()});
    if (it == waiting_.end() || it->second.push->begin().step() != step) {
      return absl::FailedPreconditionError(
          absl::StrCat(Name(), ": the push of rank ", contributor.rank(), ", incarnation ",
                       contributor.incarnation(), ", for step ", step, " is not staged"));
    }
    pushes.push_back(it->second.push);
  }
  return pushes;
}

void ModelShard::Prepare(PrepareRequest request, Done<PrepareReply> done) {
  {
    MutexLock lock(&mu_);
    last_leader_call_ = options_.clock->Now();
  }
  auto shared = std::make_shared<Done<PrepareReply>>(std::move(done));
  const absl::Status status = executor_->Schedule(
      [this, request = std::move(request), shared] { (*shared)(DoPrepare(request)); });
  if (!status.ok()) (*shared)(Annotate(status, Name()));
}

absl::StatusOr<PrepareReply> ModelShard::DoPrepare(const PrepareRequest& request) {
  std::vector<std::shared_ptr<StagedPush>> held;
  {
    MutexLock lock(&mu_);
    if (generation_ == 0 || request.generation() != generation_) {
      return absl::AbortedError(absl::StrCat(Name(), " is in generation ", generation_,
                                             ", the question in ", request.generation()));
    }
    if (!sync_ || request.step() != step_ + 1) {
      return absl::FailedPreconditionError(absl::StrCat(Name(), ": norms of step ", request.step(),
                                                        " were asked for after step ", step_));
    }
    CODISTILL_ASSIGN_OR_RETURN(held, Staged(request.step(), request.contributors()));
  }
  PrepareReply reply;
  reply.set_step(request.step());
  for (TensorNorm& norm :
       store_->Norms(ContributionsOf(held, request.contributors()), request.weights())) {
    *reply.add_norms() = std::move(norm);
  }
  return reply;
}

absl::StatusOr<CommitReply> ModelShard::DoCommit(const CommitRequest& request) {
  return sync_ ? DoCommitSync(request) : DoCommitAsync(request);
}

absl::StatusOr<CommitReply> ModelShard::DoCommitSync(const CommitRequest& request) {
  std::vector<ShardStore::Contribution> contributions;
  std::vector<std::shared_ptr<StagedPush>> held;
  bool again = false;
  {
    MutexLock lock(&mu_);
    // A draining shard still takes the decisions of its leader, which drains too.
    if (generation_ == 0 || request.generation() != generation_) {
      return absl::AbortedError(absl::StrCat(Name(), " is in generation ", generation_,
                                             ", the commit in ", request.generation()));
    }
    again = request.step() <= step_;
    if (request.step() > step_ + 1) {
      return absl::FailedPreconditionError(
          absl::StrCat(Name(), ": step ", request.step(), " does not follow step ", step_));
    }
    if (!again) {
      CODISTILL_ASSIGN_OR_RETURN(held, Staged(request.step(), request.contributors()));
      contributions = ContributionsOf(held, request.contributors());
    }
  }
  if (!again && store_->optimizer().NeedsTensorNorms() && !contributions.empty() &&
      request.norms().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(Name(), ": the commit of step ", request.step(),
                                                   " brings no norms, which ",
                                                   store_->optimizer().KindName(), " needs"));
  }
  CommitReply reply;
  if (again) {
    // Answered again; what it asks to be kept can still be kept while it is the newest step.
    if (request.step() == store_->step()) Keep(request);
    reply.set_step(store_->step());
    return reply;
  }

  if (!store_->CanApply({request.step(),
                         request.learning_rate(),
                         request.weight_decay(),
                         request.clip_scale(),
                         {}},
                        contributions)) {
    return absl::FailedPreconditionError(
        absl::StrCat(Name(), ": step ", request.step(), " was decided with learning rate ",
                     request.learning_rate(), " and weight decay ", request.weight_decay(),
                     ", other than the job's, by which its push was taken"));
  }

  if (weights_lag_ > 0) {
    // What the update would write over is written elsewhere as long as somebody may want it.
    MutexLock lock(&mu_);
    previous_ = store_->Live(request.step() - 1, /*exact=*/true);
  }
  FaultPoint("shard.commit.received");
  TraceSpan update("update", "update");
  update.Arg("step", request.step()).Arg("shard", options_.shard);
  const absl::Time begin = options_.clock->Now();
  store_->Apply({request.step(),
                 request.learning_rate(),
                 request.weight_decay(),
                 request.clip_scale(),
                 {request.norms().begin(), request.norms().end()}},
                contributions);
  ApplyRows(request.step(), request.learning_rate(), contributions);
  update.End();
  if (options_.on_commit) {
    options_.on_commit(absl::ToDoubleSeconds(options_.clock->Now() - begin));
  }
  Effects effects;
  {
    MutexLock lock(&mu_);
    step_ = request.step();
    ++counters_.commits;
    Resolve(request, &effects);
    WakePulls(&effects);
  }
  held.clear();
  FaultPoint("shard.commit.applied");
  Run(&effects);
  FaultPoint("shard.commit.answered");
  // Workers go on meanwhile; nothing changes the values before this thread's next task.
  Keep(request);
  reply.set_step(request.step());
  return reply;
}

void ModelShard::Keep(const CommitRequest& request) {
  if (request.publish()) {
    embeddings_->cuts()->Publish(request.step());
    store_->Publish(request.step());
  }
  if (!request.checkpoint()) return;
  {
    MutexLock lock(&mu_);
    written_ = Written();
  }
  store_->TakeSnapshot(request.step());
  embeddings_->checkpoint()->Snapshot(request.step());
}

void ModelShard::Resolve(const CommitRequest& request, Effects* effects) {
  Decision decision;
  decision.step = request.step();
  std::map<int32_t, uint64_t> applied;
  for (const Contributor& c : request.contributors()) {
    applied[c.rank()] = c.incarnation();
    decision.applied.insert(c.rank());
  }
  decision.rejected.insert(request.rejected().begin(), request.rejected().end());

  for (auto it = waiting_.begin(); it != waiting_.end();) {
    const int32_t rank = it->first.first;
    const uint64_t incarnation = it->first.second;
    Waiting& waiting = it->second;
    if (waiting.push->begin().step() > request.step()) {
      ++it;
      continue;
    }
    PushReply reply;
    reply.set_step(request.step());
    const auto contributor = applied.find(rank);
    if (contributor != applied.end() && contributor->second == incarnation) {
      reply.set_outcome(APPLIED);
    } else if (decision.rejected.count(rank) > 0) {
      reply.set_outcome(REJECTED);
      reply.set_message(
          absl::StrCat("gradient of tensor ", waiting.end.not_finite_tensor(), " is not finite"));
      ++counters_.rejected;
      LOG(WARNING) << Name() << ": push of rank " << rank << " for step " << request.step()
                   << " rejected: " << reply.message();
    } else {
      reply.set_outcome(DROPPED_LATE);
      reply.set_message(absl::StrCat("step ", request.step(), " was decided without this push"));
    }
    effects->push_back([done = std::move(waiting.done), reply] { done(reply); });
    it = waiting_.erase(it);
  }
  decisions_.push_back(std::move(decision));
  if (decisions_.size() > 64) decisions_.pop_front();
}

absl::StatusOr<CommitReply> ModelShard::DoCommitAsync(const CommitRequest& request) {
  {
    MutexLock lock(&mu_);
    if (generation_ == 0 || request.generation() != generation_) {
      return absl::AbortedError(absl::StrCat(Name(), " is in generation ", generation_,
                                             ", the commit in ", request.generation()));
    }
  }
  Keep(request);
  CommitReply reply;
  reply.set_step(store_->step());
  return reply;
}

}  // namespace codistill
