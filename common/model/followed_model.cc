#include "common/model/followed_model.h"

#include <algorithm>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/base/status.h"
#include "common/base/thread_priority.h"
#include "common/client/leader_client.h"
#include "common/client/tensor_client.h"
#include "common/config/embedding.h"
#include "common/config/job.h"
#include "common/config/shard_map.h"
#include "common/model/embedding_model.h"
#include "common/model/followed_tables.h"
#include "common/model/held_versions.h"
#include "common/model/model_compiler.h"
#include "common/model/model_pool.h"
#include "common/model/prepare_model.h"
#include "common/model/step_estimate.h"
#include "glog/logging.h"

namespace codistill {
namespace {

constexpr absl::Duration kPullTimeout = absl::Seconds(60);
constexpr absl::Duration kFirstBackoff = absl::Milliseconds(50);
constexpr absl::Duration kMaxBackoff = absl::Seconds(2);
// Wanted cuts that wait to be loaded; shards hold fewer.
constexpr size_t kMaxPending = 16;

class FollowedModelImpl final : public FollowedModel {
 public:
  FollowedModelImpl(Options options, std::shared_ptr<ModelPool> pool)
      : wants_(std::move(options.wants)),
        transfer_dtype_(options.transfer_dtype),
        weights_(options.weights),
        precision_(AnswerPrecision(options.weights, options.precision)),
        name_(options.job.groups(options.group).name()),
        address_(options.job.groups(options.group).shards(0).address()),
        model_(options.job.model()),
        forward_(ForwardConfig(options.job.model())),
        pool_(std::move(pool)),
        compiler_(forward_, name_),
        optimize_predict_(options.optimize_predict),
        held_(options.held_versions),
        tables_(options.job, options.group) {
    ref_.set_run_id(RunId(options.job));
    ref_.set_group(name_);
    thread_ = std::thread([this, low_priority = options.low_priority] {
      SetThreadName("follow");
      if (low_priority) LowerThreadPriority();
      Run();
      MutexLock lock(&mu_);
      stopped_ = true;
    });
    watcher_ = GroupWatcher::Start(address_, ref_, [this](const GroupState& s) { OnState(s); });
  }

  ~FollowedModelImpl() override {
    watcher_.reset();
    pool_->Stop();
    {
      MutexLock lock(&mu_);
      stopping_ = true;
      // Again and again, because a pull may be just about to begin.
      do {
        if (client_ != nullptr) client_->CancelPull();
        tables_.Cancel();
      } while (!mu_.AwaitWithTimeout(absl::Condition(&stopped_), absl::Milliseconds(10)));
    }
    thread_.join();
  }

  absl::StatusOr<std::shared_ptr<const Snapshot>> Get() const override {
    if (auto newest = held_.Newest()) return newest;
    MutexLock lock(&mu_);
    return absl::UnavailableError(Awaited());
  }

  std::vector<std::shared_ptr<const Snapshot>> Held() const override { return held_.All(); }

  absl::StatusOr<std::shared_ptr<const Snapshot>> WaitForNewer(const Version& than,
                                                               absl::Time deadline) override {
    auto newer = held_.WaitForNewer(than, deadline);
    MutexLock lock(&mu_);
    if (newer == nullptr) {
      return absl::DeadlineExceededError(
          current_ == nullptr
              ? Awaited()
              : absl::StrCat("group ", name_, ": nothing newer than ", VersionName(than), " yet"));
    }
    if (newer == current_) delivered_ = true;
    return newer;
  }

  GroupState group_state() const override {
    MutexLock lock(&mu_);
    return state_;
  }
  absl::Duration group_silence() const override { return watcher_->silence(); }
  int64_t group_step() const override {
    MutexLock lock(&mu_);
    return step_.At(absl::Now());
  }
  Counters counters() const override {
    MutexLock lock(&mu_);
    Counters counters = counters_;
    counters.last_load_error = last_error_;
    return counters;
  }

 private:
  // What a load needs to know.
  struct Target {
    Version cut;
    ShardMap map;
    uint64_t digest = 0;
    std::vector<std::string> addresses;
  };

  void OnState(const GroupState& state) ABSL_LOCKS_EXCLUDED(mu_);
  void Run();
  absl::StatusOr<Target> NextTarget() ABSL_LOCKS_EXCLUDED(mu_);
  // `refused`: the cut is here, and no good.
  absl::Status Load(const Target& target, std::unique_ptr<Model> model, bool* refused);
  absl::Status Connect(const Target& target);
  absl::Status Prepare(Model* model) const;
  void Publish(std::unique_ptr<Model> model, FollowedTables::Result rows, Version version,
               uint64_t bytes);
  void Drop(const Version& cut) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  std::string Awaited() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (!last_error_.empty()) {
      return absl::StrCat("group ", name_, ": no cut loaded yet: ", last_error_);
    }
    if (state_.phase() == GroupState::PHASE_INVALID) {
      return absl::StrCat("group ", name_, ": no cut loaded yet: waiting for its leader at ",
                          address_);
    }
    return absl::StrCat("group ", name_, ": no cut loaded yet: waiting for the first (group is ",
                        GroupState::Phase_Name(state_.phase()), ")");
  }

  // Cuts that are wanted one by one wait for the held one to have been seen; otherwise only the
  // newest counts.
  bool ShouldLoad() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (stopping_) return true;
    if (pending_.empty()) return false;
    return wants_ == nullptr || current_ == nullptr || delivered_ ||
           pending_.front().generation() != current_->version.generation();
  }

  const std::function<bool(int64_t)> wants_;
  const DataType transfer_dtype_;
  const DataType weights_;
  const DataType precision_;
  const std::string name_;
  const std::string address_;
  const ModelConfig model_;
  const ModelConfig forward_;
  const std::shared_ptr<ModelPool> pool_;
  ModelCompiler compiler_;  // the thread's own
  const bool optimize_predict_;
  HeldVersions held_;
  FollowedTables tables_;  // the thread's own, but for Cancel
  GroupRef ref_;

  mutable Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;  // the thread's last word
  GroupState state_ ABSL_GUARDED_BY(mu_);
  StepEstimate step_ ABSL_GUARDED_BY(mu_);
  Version announced_ ABSL_GUARDED_BY(mu_);            // newest cut heard of
  std::deque<Version> pending_ ABSL_GUARDED_BY(mu_);  // to be loaded, all of one generation
  std::shared_ptr<const Snapshot> current_ ABSL_GUARDED_BY(mu_);  // the newest that is held
  bool delivered_ ABSL_GUARDED_BY(mu_) = false;  // current_ was returned by WaitForNewer
  std::string last_error_ ABSL_GUARDED_BY(mu_);
  Counters counters_ ABSL_GUARDED_BY(mu_);
  // Made and used by the thread alone; guarded for CancelPull.
  std::unique_ptr<TensorClient> client_ ABSL_GUARDED_BY(mu_);

  // The thread's own: what client_ was made for.
  uint64_t client_digest_ = 0;
  std::vector<std::string> client_addresses_;

  std::unique_ptr<GroupWatcher> watcher_;
  std::thread thread_;
};

void FollowedModelImpl::OnState(const GroupState& state) {
  MutexLock lock(&mu_);
  state_ = state;
  step_.Told(state, absl::Now());
  const Version& cut = state.newest_cut();
  if (cut.generation() == 0 || !Follows(cut, announced_)) return;
  if (cut.generation() != announced_.generation()) pending_.clear();
  announced_ = cut;
  if (wants_ == nullptr) {
    pending_.clear();
  } else if (!wants_(cut.step())) {
    return;
  }
  pending_.push_back(cut);
  if (pending_.size() > kMaxPending) pending_.pop_front();
}

absl::StatusOr<FollowedModelImpl::Target> FollowedModelImpl::NextTarget() {
  MutexLock lock(&mu_);
  mu_.Await(absl::Condition(this, &FollowedModelImpl::ShouldLoad));
  if (stopping_) return absl::CancelledError("stopping");
  Target target;
  target.cut = pending_.front();
  target.map = state_.shard_map();
  target.digest = state_.shard_map_digest();
  target.addresses.assign(state_.shard_addresses().begin(), state_.shard_addresses().end());
  return target;
}

void FollowedModelImpl::Run() {
  absl::Duration backoff = kFirstBackoff;
  while (true) {
    absl::StatusOr<Target> target = NextTarget();
    if (!target.ok()) return;
    // Waiting for a spare model may take long, so what to load is looked up again after it.
    absl::StatusOr<std::unique_ptr<Model>> spare = pool_->Take();
    if (spare.ok()) target = NextTarget();
    if (!target.ok()) return;
    bool refused = false;
    const absl::Status status =
        spare.ok() ? Load(*target, *std::move(spare), &refused) : std::move(spare).status();
    MutexLock lock(&mu_);
    if (stopping_) return;
    if (status.ok()) {
      Drop(target->cut);
      last_error_.clear();
      backoff = kFirstBackoff;
      continue;
    }
    last_error_ = absl::StrCat("loading cut ", VersionName(target->cut), ": ", status.message());
    if (absl::IsAborted(status)) {
      // The shards have gone on; so do we.
      if (Follows(announced_, target->cut)) {
        Drop(target->cut);
        continue;
      }
    } else {
      ++counters_.failed_loads;
      LOG(WARNING) << "group " << name_ << ": " << last_error_;
    }
    if (refused) {
      // It came whole and would come the same again.
      Drop(target->cut);
      continue;
    }
    mu_.AwaitWithTimeout(absl::Condition(&stopping_), backoff);
    backoff = std::min(backoff * 2, kMaxBackoff);
  }
}

void FollowedModelImpl::Drop(const Version& cut) {
  while (!pending_.empty() && !Follows(pending_.front(), cut)) pending_.pop_front();
}

absl::Status FollowedModelImpl::Connect(const Target& target) {
  if (target.digest == client_digest_ && target.addresses == client_addresses_) {
    return absl::OkStatus();
  }
  if (ShardMapDigest(target.map) != target.digest) {
    return absl::FailedPreconditionError(
        "the leader's shard map does not have the digest it was announced with");
  }
  TensorList theirs;
  *theirs.mutable_tensors() = target.map.tensors();
  const std::string difference = FirstDifference(pool_->tensors(), theirs);
  if (!difference.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the group's tensors are not those of our archive: ", difference));
  }
  TensorClient::Options options;
  options.group = ref_;
  options.shard_map = target.map;
  options.shard_addresses = target.addresses;
  options.transfer_dtype = transfer_dtype_;
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<TensorClient> client,
                             TensorClient::Create(std::move(options)));
  client_digest_ = target.digest;
  client_addresses_ = target.addresses;
  tables_.Connect(ref_, target.digest, target.addresses);
  MutexLock lock(&mu_);
  client_ = std::move(client);
  return absl::OkStatus();
}

absl::Status FollowedModelImpl::Load(const Target& target, std::unique_ptr<Model> model,
                                     bool* refused) {
  absl::Status status = Connect(target);
  TensorClient* client = nullptr;
  if (status.ok()) {
    MutexLock lock(&mu_);
    client = client_.get();
    if (stopping_) status = absl::CancelledError("stopping");
  }
  if (status.ok()) {
    // The rows first: they may have to wait for the next cut.
    absl::StatusOr<FollowedTables::Result> rows =
        tables_.Load(target.cut.generation(), target.cut.step(), absl::Now() + kPullTimeout);
    status = rows.status();
    if (status.ok()) {
      auto pulled = client->Pull(TensorClient::Source::kCut, target.cut.generation(),
                                 target.cut.step(), model->storage(), absl::Now() + kPullTimeout);
      status = pulled.status();
      if (status.ok()) {
        status = Prepare(model.get());
        *refused = !status.ok();
      }
      if (status.ok()) {
        Publish(std::move(model), *std::move(rows), pulled->version, pulled->bytes);
        return absl::OkStatus();
      }
    }
  }
  pool_->Return(std::move(model));
  return status;
}

absl::Status FollowedModelImpl::Prepare(Model* model) const {
  if (wants_ == nullptr) return PrepareModel(forward_, weights_, model);
  RoundWeights(weights_, model);
  return model->UseWeights(0);
}

void FollowedModelImpl::Publish(std::unique_ptr<Model> model, FollowedTables::Result rows,
                                Version version, uint64_t bytes) {
  auto snapshot = std::make_shared<Snapshot>();
  snapshot->model = pool_->Lend(std::move(model));
  if (optimize_predict_) snapshot->model = compiler_.Compile(std::move(snapshot->model));
  if (HasEmbeddings(model_)) {
    snapshot->model = WithRows(model_, std::move(snapshot->model), std::move(rows.tables));
    bytes += rows.bytes;
  }
  snapshot->version = std::move(version);
  snapshot->loaded_at = absl::Now();
  snapshot->precision = precision_;
  std::shared_ptr<const Snapshot> old;  // let go of outside the lock
  {
    // Before it can be delivered.
    MutexLock lock(&mu_);
    old = std::exchange(current_, snapshot);
    delivered_ = false;
    ++counters_.swaps;
    counters_.pull_bytes += bytes;
  }
  held_.Publish(std::move(snapshot));
}

}  // namespace

absl::StatusOr<std::unique_ptr<FollowedModel>> FollowedModel::Create(Options options) {
  if (options.group < 0 || options.group >= options.job.groups_size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("group ", options.group, " of ", options.job.groups_size(), " in the job"));
  }
  const GroupConfig& group = options.job.groups(options.group);
  if (group.shards_size() == 0 || group.shards(0).address().empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("group ", group.name(), " has no address in shards[0]; that is its leader"));
  }
  Model::Options model;
  model.archive = ArchivePath(options.job, options.group);
  model.config = ForwardConfig(options.job.model());
  model.threads = options.threads;
  model.optimize_predict = options.optimize_predict;
  model.device = options.device;
  model.predict_precision = options.precision;
  CODISTILL_RETURN_IF_ERROR(CheckPrecision(options.weights));
  CODISTILL_ASSIGN_OR_RETURN(std::shared_ptr<ModelPool> pool,
                             ModelPool::Create(std::move(model), options.held_versions));
  return std::make_unique<FollowedModelImpl>(std::move(options), std::move(pool));
}

}  // namespace codistill
