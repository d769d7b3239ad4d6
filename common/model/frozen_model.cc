#include "common/model/frozen_model.h"

#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/base/status.h"
#include "common/base/thread_priority.h"
#include "common/checkpoint/checkpoint_catalog.h"
#include "common/checkpoint/manifest.h"
#include "common/config/embedding.h"
#include "common/model/embedding_model.h"
#include "common/model/held_versions.h"
#include "common/model/model_compiler.h"
#include "common/model/model_pool.h"
#include "common/model/prepare_model.h"
#include "common/model/weight_files.h"
#include "glog/logging.h"

namespace codistill {
namespace {

// A checkpoint that was refused is not read again for so long; a file system that failed may have
// come back by then.
constexpr absl::Duration kRefusedFor = absl::Minutes(1);
constexpr int kAttempts = 5;

Version FirstVersion() {
  Version version;
  version.set_generation(1);
  return version;
}

bool IsManifest(const std::string& path) {
  Version version;
  return ParseManifestName(BaseName(path), &version);
}

std::pair<uint64_t, int64_t> KeyOf(const Version& version) {
  return {version.generation(), version.step()};
}

class FrozenModel final : public FollowedModel {
 public:
  FrozenModel(FrozenModelOptions options, std::shared_ptr<ModelPool> pool)
      : options_(std::move(options)),
        forward_(ForwardConfig(options_.model)),
        pool_(std::move(pool)),
        compiler_(forward_, options_.name),
        held_(options_.held_versions),
        directory_(IsManifest(options_.checkpoint) ? DirName(options_.checkpoint)
                                                   : options_.checkpoint),
        tables_(options_.model, options_.file_system) {}

  ~FrozenModel() override {
    pool_->Stop();
    {
      MutexLock lock(&mu_);
      stopping_ = true;
    }
    if (thread_.joinable()) thread_.join();
  }

  // Without `follow`.
  absl::Status LoadOnce();
  void Follow();

  absl::StatusOr<std::shared_ptr<const Snapshot>> Get() const override {
    if (auto newest = held_.Newest()) return newest;
    MutexLock lock(&mu_);
    return absl::UnavailableError(Awaited());
  }
  std::vector<std::shared_ptr<const Snapshot>> Held() const override { return held_.All(); }
  absl::StatusOr<std::shared_ptr<const Snapshot>> WaitForNewer(const Version& than,
                                                               absl::Time deadline) override {
    if (auto newer = held_.WaitForNewer(than, deadline)) return newer;
    MutexLock lock(&mu_);
    return absl::DeadlineExceededError(Awaited());
  }
  GroupState group_state() const override {
    GroupState state;
    state.set_phase(options_.follow ? GroupState::TRAINING : GroupState::FINISHED);
    if (const auto newest = held_.Newest()) {
      *state.mutable_version() = newest->version;
      *state.mutable_newest_cut() = newest->version;
    }
    return state;
  }
  absl::Duration group_silence() const override {
    if (!options_.follow) return absl::ZeroDuration();
    MutexLock lock(&mu_);
    return absl::Now() - listed_at_;
  }
  Counters counters() const override {
    MutexLock lock(&mu_);
    return counters_;
  }

 private:
  void Run();
  // Loads the newest checkpoint there is beyond the one held, if any. An error: the directory
  // cannot be read.
  absl::Status LoadNewest() ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status LoadVersion(const Version& version) ABSL_LOCKS_EXCLUDED(mu_);
  // Fills, prepares and publishes a spare copy.
  template <typename Read>
  absl::Status Load(const Version& version, const Read& read) ABSL_LOCKS_EXCLUDED(mu_);
  void Publish(std::unique_ptr<Model> model, CheckpointTables::Tables tables, Version version)
      ABSL_LOCKS_EXCLUDED(mu_);
  bool stopping() const ABSL_LOCKS_EXCLUDED(mu_) {
    MutexLock lock(&mu_);
    return stopping_;
  }

  std::string Awaited() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const std::string where = options_.checkpoint.empty() ? options_.archive : options_.checkpoint;
    if (!counters_.last_load_error.empty()) {
      return absl::StrCat("model ", options_.name, ": ", counters_.last_load_error);
    }
    return absl::StrCat("model ", options_.name, ": no newer checkpoint in ", where, " yet");
  }

  const FrozenModelOptions options_;
  const ModelConfig forward_;
  const std::shared_ptr<ModelPool> pool_;
  ModelCompiler compiler_;  // of the thread that loads
  HeldVersions held_;

  const std::string directory_;  // of checkpoints, where that is what there is

  // Of the thread that loads.
  struct Refusal {
    absl::Time until;
    std::string why;
  };
  using Refusals = std::map<std::pair<uint64_t, int64_t>, Refusal>;  // by version
  static std::string WhyRefused(const Refusals& refusals) {
    return absl::StrJoin(refusals, "; ", [](std::string* out, const auto& refusal) {
      absl::StrAppend(out, refusal.second.why);
    });
  }
  CheckpointTables tables_;
  Refusals refused_;  // of versions newer than the held one

  mutable Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time listed_at_ ABSL_GUARDED_BY(mu_) = absl::Now();
  Counters counters_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

template <typename Read>
absl::Status FrozenModel::Load(const Version& version, const Read& read) {
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<Model> model, pool_->Take());
  CheckpointTables::Tables tables;
  absl::Status status = read(model.get(), &tables);
  if (status.ok()) status = PrepareModel(forward_, options_.weights, model.get());
  if (!status.ok()) {
    pool_->Return(std::move(model));
    return status;
  }
  Publish(std::move(model), std::move(tables), version);
  return absl::OkStatus();
}

void FrozenModel::Publish(std::unique_ptr<Model> model, CheckpointTables::Tables tables,
                          Version version) {
  auto snapshot = std::make_shared<Snapshot>();
  snapshot->model = pool_->Lend(std::move(model));
  if (options_.optimize_predict) {
    snapshot->model = compiler_.Compile(std::move(snapshot->model));
  }
  if (HasEmbeddings(options_.model)) {
    snapshot->model = WithRows(options_.model, std::move(snapshot->model), std::move(tables));
  }
  snapshot->version = std::move(version);
  snapshot->loaded_at = absl::Now();
  snapshot->precision = AnswerPrecision(options_.weights, options_.precision);
  {
    MutexLock lock(&mu_);
    ++counters_.swaps;
  }
  held_.Publish(std::move(snapshot));
}

absl::Status FrozenModel::LoadVersion(const Version& version) {
  const std::string path = JoinPath(directory_, ManifestName(version));
  CODISTILL_ASSIGN_OR_RETURN(const CheckpointManifest manifest,
                             ReadManifest(path, options_.file_system));
  const auto read = [&](Model* model, CheckpointTables::Tables* tables) -> absl::Status {
    CODISTILL_RETURN_IF_ERROR(ReadCheckpoint(directory_, manifest, model, options_.file_system));
    CODISTILL_ASSIGN_OR_RETURN(*tables, tables_.Read(directory_, manifest));
    return absl::OkStatus();
  };
  return Annotate(Load(manifest.version(), read), path);
}

absl::Status FrozenModel::LoadNewest() {
  CODISTILL_ASSIGN_OR_RETURN(const std::vector<Version> versions,
                             ListCheckpoints(directory_, options_.file_system));
  {
    MutexLock lock(&mu_);
    listed_at_ = absl::Now();
  }
  const HeldVersions::Ptr held_before = held_.Newest();
  // Newest first.
  const bool only_older = held_before != nullptr && !versions.empty() &&
                          KeyOf(versions.front()) < KeyOf(held_before->version);
  Refusals refused;  // of those still there
  for (const Version& version : versions) {
    const HeldVersions::Ptr held = held_.Newest();
    if (held != nullptr && KeyOf(version) <= KeyOf(held->version)) break;
    const auto before = refused_.find(KeyOf(version));
    if (before != refused_.end() && absl::Now() < before->second.until) {
      refused.insert(*before);
      continue;
    }
    const absl::Status status = LoadVersion(version);
    if (stopping()) return absl::OkStatus();
    if (status.ok()) break;
    if (!options_.file_system->Exists(JoinPath(directory_, ManifestName(version)))) {
      continue;  // retention has removed it meanwhile; there is a newer one, for the next time
    }
    LOG(WARNING) << "model " << options_.name << ": " << status.message();
    refused[KeyOf(version)] = {absl::Now() + kRefusedFor, std::string(status.message())};
    MutexLock lock(&mu_);
    ++counters_.failed_loads;
    counters_.last_load_error = WhyRefused(refused);
  }
  refused_ = std::move(refused);
  MutexLock lock(&mu_);
  counters_.last_load_error = WhyRefused(refused_);
  // A run that was started over in the same place counts from the beginning: its versions have the
  // names of others, whose predictions are in caches and tables here.
  if (only_older) {
    counters_.last_load_error =
        absl::StrCat(directory_, ": its newest checkpoint is ", VersionName(versions.front()),
                     ", older than the held ", VersionName(held_before->version),
                     "; if the run was started over, restart this process to follow it");
  }
  return absl::OkStatus();
}

absl::Status FrozenModel::LoadOnce() {
  FileSystem* const files = options_.file_system;
  if (options_.checkpoint.empty()) {
    return Annotate(
        Load(FirstVersion(),
             [](Model*, CheckpointTables::Tables*) {
               return absl::OkStatus();  // the pool's first copy has the archive's weights
             }),
        options_.archive);
  }
  if (!files->Exists(options_.checkpoint)) {
    return absl::NotFoundError(absl::StrCat(
        options_.checkpoint, ": no such safetensors file or directory of checkpoints"));
  }
  if (IsManifest(options_.checkpoint)) {
    Version version;
    ParseManifestName(BaseName(options_.checkpoint), &version);
    return LoadVersion(version);
  }
  if (!files->IsDirectory(options_.checkpoint)) {
    const auto read = [&](Model* model, CheckpointTables::Tables*) {
      return ReadSafetensors(options_.checkpoint, model, files);
    };
    return Annotate(Load(FirstVersion(), read), absl::StrCat("model ", options_.name));
  }
  // What was newest may be removed by retention while it is read; then there is a newer one.
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    CODISTILL_RETURN_IF_ERROR(LoadNewest());
    if (held_.Newest() != nullptr) return absl::OkStatus();
    if (counters().failed_loads > 0) {
      return absl::DataLossError(absl::StrCat(
          directory_, ": no checkpoint in it can be used: ", counters().last_load_error));
    }
  }
  return absl::NotFoundError(absl::StrCat(directory_, ": no checkpoint in it"));
}

void FrozenModel::Follow() {
  thread_ = std::thread([this] {
    SetThreadName("follow");
    if (options_.low_priority) LowerThreadPriority();
    Run();
  });
}

void FrozenModel::Run() {
  while (true) {
    const absl::Status status = LoadNewest();
    MutexLock lock(&mu_);
    if (!status.ok()) counters_.last_load_error = std::string(status.message());
    if (mu_.AwaitWithTimeout(absl::Condition(&stopping_), options_.poll_interval)) return;
  }
}

absl::Status CheckOptions(const FrozenModelOptions& options) {
  FileSystem* const files = options.file_system;
  CODISTILL_RETURN_IF_ERROR(CheckPrecision(options.weights));
  if (options.follow && options.checkpoint.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("model ", options.name, ": follow needs a checkpoint directory to look at"));
  }
  if (options.follow && files->Exists(options.checkpoint) &&
      !files->IsDirectory(options.checkpoint)) {
    return absl::InvalidArgumentError(absl::StrCat("model ", options.name,
                                                   ": follow needs a checkpoint directory; ",
                                                   options.checkpoint, " is a file"));
  }
  const bool directory =
      !options.checkpoint.empty() &&
      (options.follow || files->IsDirectory(options.checkpoint) || IsManifest(options.checkpoint));
  if (HasEmbeddings(options.model) && !directory) {
    return absl::InvalidArgumentError(
        absl::StrCat("model ", options.name, ": the rows of embedding table ",
                     options.model.embedding_tables(0).name(),
                     " come from a directory of checkpoints, which `checkpoint` must then be"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<FollowedModel>> LoadFrozenModel(FrozenModelOptions options) {
  CODISTILL_RETURN_IF_ERROR(CheckOptions(options));
  Model::Options model;
  model.archive = options.archive;
  model.config = ForwardConfig(options.model);
  model.threads = options.threads;
  model.optimize_predict = options.optimize_predict;
  model.device = options.device;
  model.predict_precision = options.precision;
  CODISTILL_ASSIGN_OR_RETURN(std::shared_ptr<ModelPool> pool,
                             ModelPool::Create(std::move(model), options.held_versions));
  const bool follow = options.follow;
  auto frozen = std::make_unique<FrozenModel>(std::move(options), std::move(pool));
  if (follow) {
    frozen->Follow();
  } else {
    CODISTILL_RETURN_IF_ERROR(frozen->LoadOnce());
  }
  return frozen;
}

}  // namespace codistill
