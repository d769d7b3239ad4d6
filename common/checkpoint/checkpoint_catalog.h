#ifndef CODISTILL_COMMON_CHECKPOINT_CHECKPOINT_CATALOG_H_
#define CODISTILL_COMMON_CHECKPOINT_CHECKPOINT_CATALOG_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/file.h"
#include "common/checkpoint/directory_claim.h"
#include "proto/checkpoint.pb.h"

namespace codistill {

// The checkpoints of one group, as its leader sees them: which are there, which is the newest whole
// one, and what is left over from writes that never became one. Holding this object is owning the
// directory, until a newer process claims it (DirectoryClaim): then nothing here changes anything
// any more, and CheckClaim says who has it. Not thread-safe; used from one thread at a time.
class CheckpointCatalog {
 public:
  // Creates the directory if need be and claims it, in the place of whoever had it. An older owner
  // that still runs is given a few seconds to notice and to let go of the lock on the file CLAIM,
  // so that it writes nothing meanwhile; one that hangs is not waited for.
  static absl::StatusOr<std::unique_ptr<CheckpointCatalog>> Claim(
      const std::string& directory, FileSystem* file_system = FileSystem::Real());
  ~CheckpointCatalog();
  CheckpointCatalog(const CheckpointCatalog&) = delete;
  CheckpointCatalog& operator=(const CheckpointCatalog&) = delete;

  const std::string& path() const { return path_; }

  // FAILED_PRECONDITION, naming the newer owner, once there is one.
  absl::Status CheckClaim() const { return claim_->Check(); }
  // After CheckClaim has failed: tells the newer owner that it need not wait.
  void LetGo();
  // Grows with every claim of the directory.
  uint64_t claim_number() const { return claim_->number(); }

  // The newest generation any leader of this directory has begun: that of the file GENERATION or of
  // a manifest, whichever is larger; 0 = none.
  absl::StatusOr<uint64_t> LastGeneration();
  // Durably notes that `generation` begins.
  absl::Status BeginGeneration(uint64_t generation);

  // Versions of the manifests in the directory, newest (largest generation, then step) first.
  absl::StatusOr<std::vector<Version>> List();

  struct Newest {
    // Null when the directory has no checkpoint at all.
    std::unique_ptr<CheckpointManifest> manifest;
    // Why newer ones were passed over, each naming the file at fault.
    std::vector<absl::Status> refused;
  };
  // The newest checkpoint whose manifest and files are all whole, skipping the versions in
  // `except`. DATA_LOSS, naming every fault, when there are checkpoints and all of them are
  // damaged: starting afresh is then for people to decide.
  absl::StatusOr<Newest> FindNewest(const std::vector<Version>& except = {});

  // Which checkpoints are kept: the newest one always; of the others the `keep` - 1 newest, unless
  // they are older than `max_age` at `now`. Ones that do not say when they were written have no
  // age.
  struct Retention {
    int keep = 1;
    absl::Duration max_age = absl::InfiniteDuration();
    absl::Time now = absl::InfinitePast();
  };
  // Makes a checkpoint of files that are all durable, and removes what `retention` does not keep;
  // what cannot be removed is left for the next time.
  absl::Status Commit(const CheckpointManifest& manifest, const Retention& retention);

  // Removes shard files and temporary files no manifest names. Returns how many. Only while no
  // shard is writing. Files of a manifest that cannot be read are spared.
  absl::StatusOr<int> SweepOrphans();

 private:
  CheckpointCatalog(std::string path, FileSystem* file_system,
                    std::unique_ptr<DirectoryClaim> claim, int lock_fd)
      : path_(std::move(path)),
        file_system_(file_system),
        claim_(std::move(claim)),
        lock_fd_(lock_fd) {}

  const std::string path_;
  FileSystem* const file_system_;
  const std::unique_ptr<DirectoryClaim> claim_;
  int lock_fd_;  // -1 = let go
};

// Versions of the manifests in a directory, newest (largest generation, then step) first. For
// readers that own nothing there: retention may remove what is listed at any time.
absl::StatusOr<std::vector<Version>> ListCheckpoints(const std::string& directory,
                                                     FileSystem* file_system = FileSystem::Real());

// The manifest and every file it names, by length and checksum. Errors name the file at fault.
absl::Status VerifyCheckpoint(const std::string& directory, const CheckpointManifest& manifest,
                              FileSystem* file_system = FileSystem::Real());

}  // namespace codistill

#endif  // CODISTILL_COMMON_CHECKPOINT_CHECKPOINT_CATALOG_H_
