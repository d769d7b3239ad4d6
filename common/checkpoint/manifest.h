#ifndef CODISTILL_COMMON_CHECKPOINT_MANIFEST_H_
#define CODISTILL_COMMON_CHECKPOINT_MANIFEST_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/file.h"
#include "proto/checkpoint.pb.h"

namespace codistill {

// MANIFEST-<generation>-<step>.
std::string ManifestName(const Version& version);
// False if `name` is no manifest's name.
bool ParseManifestName(absl::string_view name, Version* version);

// Puts the manifest into its directory so that it appears whole or not at all: this is what makes a
// checkpoint exist. Everything it names must be durable already. RESOURCE_EXHAUSTED: disk full.
absl::Status WriteManifest(const std::string& directory, const CheckpointManifest& manifest,
                           FileSystem* file_system = FileSystem::Real());

// NOT_FOUND; DATA_LOSS if the file is damaged or cut short (names it and the place);
// FAILED_PRECONDITION for another format version. The files it names are not looked at.
absl::StatusOr<CheckpointManifest> ReadManifest(const std::string& path,
                                                FileSystem* file_system = FileSystem::Real());

}  // namespace codistill

#endif  // CODISTILL_COMMON_CHECKPOINT_MANIFEST_H_
