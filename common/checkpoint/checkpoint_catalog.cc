#include "common/checkpoint/checkpoint_catalog.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "common/checkpoint/manifest.h"
#include "common/checkpoint/shard_file.h"

namespace codistill {
namespace {

constexpr char kClaimName[] = "CLAIM";
// How long an owner that was outnumbered may take to notice.
constexpr absl::Duration kOlderOwner = absl::Seconds(3);
constexpr char kGenerationName[] = "GENERATION";

bool SameVersion(const Version& a, const Version& b) {
  return a.generation() == b.generation() && a.step() == b.step();
}

// The version in the name of a shard file: files that a damaged manifest may name are told by it.
bool ParseShardFileName(const std::string& name, Version* version) {
  const std::vector<std::string> parts = absl::StrSplit(name, '-');
  uint64_t generation;
  int64_t step;
  if (parts.size() != 7 || (parts[0] != "shard" && parts[0] != "tables") || parts[2] != "of" ||
      !absl::SimpleAtoi(parts[4], &generation) || !absl::SimpleAtoi(parts[5], &step)) {
    return false;
  }
  version->set_generation(generation);
  version->set_step(step);
  return true;
}

bool IsTableFile(const std::string& name) { return absl::StartsWith(name, "tables-"); }

// All files that a manifest names.
std::vector<CheckpointFile> FilesOf(const CheckpointManifest& manifest) {
  std::vector<CheckpointFile> files(manifest.files().begin(), manifest.files().end());
  for (const ShardTables& tables : manifest.tables()) {
    files.insert(files.end(), tables.files().begin(), tables.files().end());
  }
  return files;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CheckpointCatalog>> CheckpointCatalog::Claim(
    const std::string& directory, FileSystem* file_system) {
  CODISTILL_RETURN_IF_ERROR(Annotate(file_system->MakeDirs(directory), "checkpoint directory"));
  CODISTILL_ASSIGN_OR_RETURN(
      std::unique_ptr<DirectoryClaim> claim,
      DirectoryClaim::Take(directory, kClaimName, ClaimOwner(), file_system));
  const std::string path = JoinPath(directory, kClaimName);
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) return FileError(errno, "open", path);
  // The claim decides; the lock only tells whether an older owner has let go, which the system sees
  // to when a process ends, however it ends.
  const absl::Time end = absl::Now() + kOlderOwner;
  while (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    if (error != EWOULDBLOCK && error != EINTR) {
      close(fd);
      return FileError(error, "lock", path);
    }
    if (absl::Now() >= end) break;
    absl::SleepFor(absl::Milliseconds(20));
  }
  return std::unique_ptr<CheckpointCatalog>(
      new CheckpointCatalog(directory, file_system, std::move(claim), fd));
}

CheckpointCatalog::~CheckpointCatalog() { LetGo(); }

void CheckpointCatalog::LetGo() {
  if (lock_fd_ >= 0) close(lock_fd_);
  lock_fd_ = -1;
}

absl::StatusOr<uint64_t> CheckpointCatalog::LastGeneration() {
  uint64_t last = 0;
  const std::string path = JoinPath(path_, kGenerationName);
  if (file_system_->Exists(path)) {
    CODISTILL_ASSIGN_OR_RETURN(std::string text, ReadFile(path, 64, file_system_));
    if (!absl::SimpleAtoi(absl::StripSuffix(text, "\n"), &last)) {
      return absl::DataLossError(absl::StrCat(path, ": holds no number"));
    }
  }
  CODISTILL_ASSIGN_OR_RETURN(const std::vector<Version> versions, List());
  for (const Version& version : versions) last = std::max(last, version.generation());
  return last;
}

absl::Status CheckpointCatalog::BeginGeneration(uint64_t generation) {
  CODISTILL_RETURN_IF_ERROR(CheckClaim());
  return WriteFileAtomically(JoinPath(path_, kGenerationName), absl::StrCat(generation, "\n"),
                             file_system_);
}

absl::StatusOr<std::vector<Version>> CheckpointCatalog::List() {
  return ListCheckpoints(path_, file_system_);
}

absl::StatusOr<CheckpointCatalog::Newest> CheckpointCatalog::FindNewest(
    const std::vector<Version>& except) {
  CODISTILL_ASSIGN_OR_RETURN(const std::vector<Version> versions, List());
  Newest newest;
  for (const Version& version : versions) {
    if (std::any_of(except.begin(), except.end(),
                    [&](const Version& e) { return SameVersion(e, version); })) {
      newest.refused.push_back(absl::DataLossError(absl::StrCat(
          JoinPath(path_, ManifestName(version)), ": a shard could not load its part")));
      continue;
    }
    absl::StatusOr<CheckpointManifest> manifest =
        ReadManifest(JoinPath(path_, ManifestName(version)), file_system_);
    const absl::Status status =
        manifest.ok() ? VerifyCheckpoint(path_, *manifest, file_system_) : manifest.status();
    if (status.ok()) {
      newest.manifest = std::make_unique<CheckpointManifest>(*std::move(manifest));
      return newest;
    }
    newest.refused.push_back(status);
  }
  if (!versions.empty()) {
    ErrorList errors;
    for (const absl::Status& status : newest.refused) errors.Add(status);
    return absl::DataLossError(
        errors
            .ToStatus(absl::StrCat("no checkpoint in ", path_,
                                   " can be read; remove them to start afresh:"))
            .message());
  }
  return newest;
}

absl::Status CheckpointCatalog::Commit(const CheckpointManifest& manifest,
                                       const Retention& retention) {
  CODISTILL_RETURN_IF_ERROR(CheckClaim());
  CODISTILL_RETURN_IF_ERROR(WriteManifest(path_, manifest, file_system_));
  absl::StatusOr<std::vector<Version>> versions = List();
  if (!versions.ok()) return absl::OkStatus();  // the checkpoint itself is there
  // Several checkpoints may need one file of embedding tables.
  std::set<std::string> needed;
  bool spare_tables = false;
  std::vector<std::pair<std::string, absl::StatusOr<CheckpointManifest>>> old;
  for (size_t i = 0; i < versions->size(); ++i) {
    const std::string path = JoinPath(path_, ManifestName((*versions)[i]));
    absl::StatusOr<CheckpointManifest> read = ReadManifest(path, file_system_);
    const bool too_old =
        i > 0 && read.ok() && read->created_unix_ms() > 0 &&
        retention.now - absl::FromUnixMillis(read->created_unix_ms()) > retention.max_age;
    if (too_old || i >= static_cast<size_t>(std::max(retention.keep, 1))) {
      old.emplace_back(path, std::move(read));
    } else if (!read.ok()) {
      spare_tables = true;
    } else {
      for (const CheckpointFile& file : FilesOf(*read)) needed.insert(file.name());
    }
  }
  for (const auto& [path, read] : old) {
    // The manifest goes first: what is left if this is interrupted are orphans, never a manifest
    // without its files.
    if (!file_system_->RemoveFile(path).ok() || !read.ok()) continue;
    for (const CheckpointFile& file : FilesOf(*read)) {
      if (needed.count(file.name()) > 0 || (spare_tables && IsTableFile(file.name()))) continue;
      file_system_->RemoveFile(JoinPath(path_, file.name())).IgnoreError();
    }
  }
  file_system_->SyncDir(path_).IgnoreError();
  return absl::OkStatus();
}

absl::StatusOr<int> CheckpointCatalog::SweepOrphans() {
  CODISTILL_ASSIGN_OR_RETURN(const std::vector<std::string> names, file_system_->ListDir(path_));
  std::set<std::string> named;
  std::vector<Version> unreadable;
  for (const std::string& name : names) {
    Version version;
    if (!ParseManifestName(name, &version)) continue;
    const absl::StatusOr<CheckpointManifest> manifest =
        ReadManifest(JoinPath(path_, name), file_system_);
    if (!manifest.ok()) {
      unreadable.push_back(version);
      continue;
    }
    for (const CheckpointFile& file : FilesOf(*manifest)) named.insert(file.name());
  }
  int removed = 0;
  for (const std::string& name : names) {
    Version version;
    const bool shard_file = ParseShardFileName(name, &version);
    // WriteFileAtomically and FileWriter leave these when a process dies in the middle.
    const bool temporary = absl::StrContains(name, ".tmp");
    if (!(shard_file || temporary) || named.count(name) > 0) continue;
    // A manifest may name table files of any version.
    if (IsTableFile(name) && !unreadable.empty()) continue;
    if (shard_file && std::any_of(unreadable.begin(), unreadable.end(),
                                  [&](const Version& u) { return SameVersion(u, version); })) {
      continue;
    }
    if (file_system_->RemoveFile(JoinPath(path_, name)).ok()) ++removed;
  }
  if (removed > 0) CODISTILL_RETURN_IF_ERROR(file_system_->SyncDir(path_));
  return removed;
}

absl::StatusOr<std::vector<Version>> ListCheckpoints(const std::string& directory,
                                                     FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(const std::vector<std::string> names, file_system->ListDir(directory));
  std::vector<Version> versions;
  for (const std::string& name : names) {
    Version version;
    if (ParseManifestName(name, &version)) versions.push_back(version);
  }
  std::sort(versions.begin(), versions.end(), [](const Version& a, const Version& b) {
    return a.generation() != b.generation() ? a.generation() > b.generation() : a.step() > b.step();
  });
  return versions;
}

absl::Status VerifyCheckpoint(const std::string& directory, const CheckpointManifest& manifest,
                              FileSystem* file_system) {
  for (const CheckpointFile& file : FilesOf(manifest)) {
    CODISTILL_RETURN_IF_ERROR(
        Annotate(VerifyCheckpointFile(directory, file, file_system),
                 absl::StrCat("checkpoint ", ManifestName(manifest.version()))));
  }
  return absl::OkStatus();
}

}  // namespace codistill
