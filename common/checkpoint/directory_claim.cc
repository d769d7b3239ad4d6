#include "common/checkpoint/directory_claim.h"

#include <unistd.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"

namespace codistill {
namespace {

constexpr int kAttempts = 100;
constexpr uint64_t kMaxOwnerBytes = 4096;

// Numbers of the claims of `name` that are there, in no order.
absl::StatusOr<std::vector<uint64_t>> Claims(const std::string& directory, const std::string& name,
                                             FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(const std::vector<std::string> files, file_system->ListDir(directory));
  std::vector<uint64_t> numbers;
  for (absl::string_view file : files) {
    uint64_t number;
    if (absl::ConsumePrefix(&file, absl::StrCat(name, "-")) && absl::SimpleAtoi(file, &number)) {
      numbers.push_back(number);
    }
  }
  return numbers;
}

std::string ClaimPath(const std::string& directory, const std::string& name, uint64_t number) {
  return JoinPath(directory, absl::StrCat(name, "-", number));
}

}  // namespace

absl::StatusOr<std::unique_ptr<DirectoryClaim>> DirectoryClaim::Take(const std::string& directory,
                                                                     const std::string& name,
                                                                     const std::string& owner,
                                                                     FileSystem* file_system) {
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    CODISTILL_ASSIGN_OR_RETURN(const std::vector<uint64_t> older,
                               Claims(directory, name, file_system));
    uint64_t number = 1;
    for (uint64_t other : older) number = std::max(number, other + 1);
    const absl::Status status = CreateFileExclusively(ClaimPath(directory, name, number),
                                                      absl::StrCat(owner, "\n"), file_system);
    if (absl::IsAlreadyExists(status)) continue;  // another process was faster
    CODISTILL_RETURN_IF_ERROR(status);
    for (uint64_t other : older) {
      file_system->RemoveFile(ClaimPath(directory, name, other)).IgnoreError();
    }
    return std::unique_ptr<DirectoryClaim>(
        new DirectoryClaim(directory, name, number, file_system));
  }
  return absl::UnavailableError(absl::StrCat("directory ", directory, ": ", kAttempts,
                                             " others claimed ", name, " at the same time"));
}

absl::Status DirectoryClaim::Check() const {
  CODISTILL_ASSIGN_OR_RETURN(const std::vector<uint64_t> numbers,
                             Claims(directory_, name_, file_system_));
  uint64_t newest = 0;
  for (uint64_t number : numbers) newest = std::max(newest, number);
  if (newest <= number_) return absl::OkStatus();
  const std::string path = ClaimPath(directory_, name_, newest);
  const absl::StatusOr<std::string> owner = ReadFile(path, kMaxOwnerBytes, file_system_);
  return absl::FailedPreconditionError(
      absl::StrCat("a newer process has taken this one's place: ", path, " (",
                   owner.ok() ? absl::StripSuffix(*owner, "\n") : "owner unknown",
                   ") is after claim ", number_));
}

std::string ClaimOwner() {
  char host[256] = "unknown host";
  gethostname(host, sizeof(host) - 1);
  return absl::StrCat(host, ", process ", getpid());
}

}  // namespace codistill
