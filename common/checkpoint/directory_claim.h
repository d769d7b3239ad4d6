#ifndef CODISTILL_COMMON_CHECKPOINT_DIRECTORY_CLAIM_H_
#define CODISTILL_COMMON_CHECKPOINT_DIRECTORY_CLAIM_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/file.h"

namespace codistill {

// Which process owns a name in a directory that all of them see: the newest that has claimed it.
// A claim is a file NAME-<number> that was created exclusively, with a number larger than any
// before, so of two processes one is newer, whatever their clocks say; the older finds out when it
// next looks, by Check, and stops. Nothing has to be released: a process that dies leaves a claim
// that the next one outnumbers. Thread-safe.
class DirectoryClaim {
 public:
  // Claims `name` in `directory`, which exists; `owner` is for people (host, process id). Removes
  // the files of older claims.
  static absl::StatusOr<std::unique_ptr<DirectoryClaim>> Take(
      const std::string& directory, const std::string& name, const std::string& owner,
      FileSystem* file_system = FileSystem::Real());

  // FAILED_PRECONDITION, naming the newer claim and its owner, once there is one. Other errors say
  // that the directory could not be looked at.
  absl::Status Check() const;

  uint64_t number() const { return number_; }

 private:
  DirectoryClaim(std::string directory, std::string name, uint64_t number, FileSystem* file_system)
      : directory_(std::move(directory)),
        name_(std::move(name)),
        number_(number),
        file_system_(file_system) {}

  const std::string directory_;
  const std::string name_;
  const uint64_t number_;
  FileSystem* const file_system_;
};

// "host, process 1234": what a process calls itself in its claims.
std::string ClaimOwner();

}  // namespace codistill

#endif  // CODISTILL_COMMON_CHECKPOINT_DIRECTORY_CLAIM_H_
