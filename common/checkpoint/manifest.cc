#include "common/checkpoint/manifest.h"

#include <cstdint>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/crc32c.h"
#include "common/base/status.h"

namespace codistill {
namespace {

constexpr size_t kMaxManifestBytes = 1 << 30;
constexpr size_t kChecksumBytes = 4;

}  // namespace

std::string ManifestName(const Version& version) {
  return absl::StrCat("MANIFEST-", version.generation(), "-", version.step());
}

bool ParseManifestName(absl::string_view name, Version* version) {
  const std::vector<absl::string_view> parts = absl::StrSplit(name, '-');
  uint64_t generation;
  int64_t step;
  if (parts.size() != 3 || parts[0] != "MANIFEST" || !absl::SimpleAtoi(parts[1], &generation) ||
      !absl::SimpleAtoi(parts[2], &step) || step < 0) {
    return false;
  }
  version->Clear();
  version->set_generation(generation);
  version->set_step(step);
  return ManifestName(*version) == name;  // no leading zeros or signs
}

absl::Status WriteManifest(const std::string& directory, const CheckpointManifest& manifest,
                           FileSystem* file_system) {
  std::string bytes;
  if (!manifest.SerializeToString(&bytes)) {
    return absl::InternalError(absl::StrCat("manifest in ", directory, " cannot be serialised"));
  }
  const uint32_t crc = Crc32c(bytes);
  for (int i = 0; i < 4; ++i) bytes.push_back(static_cast<char>(crc >> (8 * i)));
  return WriteFileAtomically(JoinPath(directory, ManifestName(manifest.version())), bytes,
                             file_system);
}

absl::StatusOr<CheckpointManifest> ReadManifest(const std::string& path, FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(const std::string bytes,
                             ReadFile(path, kMaxManifestBytes, file_system));
  if (bytes.size() < kChecksumBytes) {
    return absl::DataLossError(absl::StrCat(path, ": is cut short: ", bytes.size(), " bytes"));
  }
  const absl::string_view message(bytes.data(), bytes.size() - kChecksumBytes);
  uint32_t crc = 0;
  for (size_t i = 0; i < kChecksumBytes; ++i) {
    crc |= uint32_t{static_cast<uint8_t>(bytes[message.size() + i])} << (8 * i);
  }
  if (Crc32c(message) != crc) {
    return absl::DataLossError(absl::StrCat(path, ": the message (bytes 0 to ", message.size(),
                                            ") does not match the checksum in the last 4 bytes"));
  }
  CheckpointManifest manifest;
  if (!manifest.ParseFromArray(message.data(), static_cast<int>(message.size()))) {
    return absl::DataLossError(absl::StrCat(path, ": is no message CheckpointManifest"));
  }
  if (manifest.format_version() != 1) {
    return absl::FailedPreconditionError(absl::StrCat(
        path, ": format version ", manifest.format_version(), "; this program reads version 1"));
  }
  if (BaseName(path) != ManifestName(manifest.version())) {
    return absl::DataLossError(
        absl::StrCat(path, ": holds the manifest of ", ManifestName(manifest.version())));
  }
  if (manifest.files_size() != manifest.shard_map().num_shards()) {
    return absl::DataLossError(absl::StrCat(path, ": names ", manifest.files_size(), " files for ",
                                            manifest.shard_map().num_shards(), " shards"));
  }
  return manifest;
}

}  // namespace codistill
