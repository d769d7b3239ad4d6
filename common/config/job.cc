#include "common/config/job.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/config/teachers.h"
#include "common/config/text_proto.h"
#include "common/config/validate.h"
#include "google/protobuf/text_format.h"

namespace codistill {
namespace {

constexpr size_t kMaxJobBytes = size_t{4} << 20;

std::string InArchive(const JobConfig& job, int group, absl::string_view ending) {
  return JoinPath(job.model().archive_dir(), absl::StrCat(job.groups(group).name(), ending));
}

}  // namespace

absl::StatusOr<JobConfig> LoadJob(const std::string& path,
                                  const std::vector<std::string>& overrides,
                                  const std::string& teachers_directory) {
  CODISTILL_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxJobBytes));
  JobConfig job;
  ErrorList errors;
  // Fields about which something was said already: that they are missing or have a wrong value then
  // follows from it.
  std::vector<std::string> known_bad;
  bool broken = false;
  for (const TextProtoError& error : ParseTextProto(text, &job)) {
    errors.Add(error.ToString());
    if (!error.path.empty()) known_bad.push_back(error.path);
    if (!error.meant.empty()) known_bad.push_back(error.meant);
    broken = broken || error.breaks;
  }
  // Half a file tells nothing about what is missing.
  if (broken) return errors.ToStatus(absl::StrCat(path, ":"));
  for (const std::string& override : overrides) {
    const absl::Status status = SetField(override, &job);
    if (!status.ok()) errors.Add(absl::StrCat("override ", override), status.message());
  }
  for (const internal::Mistake& mistake : internal::FindMistakes(job)) {
    if (absl::c_any_of(known_bad, [&mistake](const std::string& field) {
          return internal::IsWithin(mistake.path, field);
        })) {
      continue;
    }
    errors.Add(mistake.path, mistake.problem);
  }
  CODISTILL_RETURN_IF_ERROR(errors.ToStatus(absl::StrCat(path, ":")));
  ResolveTeacherPaths(teachers_directory.empty() ? DirName(path) : teachers_directory, &job);
  return job;
}

absl::Status ValidateJob(const JobConfig& job) {
  ErrorList errors;
  for (const internal::Mistake& mistake : internal::FindMistakes(job)) {
    errors.Add(mistake.path, mistake.problem);
  }
  return errors.ToStatus();
}

absl::Status SaveJob(const JobConfig& job, const std::string& path) {
  std::string text;
  if (!google::protobuf::TextFormat::PrintToString(job, &text)) {
    return absl::InternalError(absl::StrCat(path, ": the job does not print as text"));
  }
  return WriteFileAtomically(path, text);
}

absl::StatusOr<int> FindGroup(const JobConfig& job, absl::string_view name) {
  for (int i = 0; i < job.groups_size(); ++i) {
    if (job.groups(i).name() == name) return i;
  }
  return absl::NotFoundError(absl::StrCat(
      "no group \"", name, "\" in job ", job.name(), "; its groups are ",
      absl::StrJoin(job.groups(), ", ", [](std::string* out, const GroupConfig& group) {
        absl::StrAppend(out, group.name());
      })));
}

int MaxWorkers(const JobConfig& job, int group) {
  const GroupConfig& config = job.groups(group);
  if (job.training().membership() != TrainingConfig::ELASTIC) return config.num_workers();
  return std::max(config.num_workers(), config.max_workers());
}

std::string RunId(const JobConfig& job) { return job.has_run_id() ? job.run_id() : job.name(); }

std::string ArchivePath(const JobConfig& job, int group) { return InArchive(job, group, ".pt"); }
std::string WeightsPath(const JobConfig& job, int group) {
  return InArchive(job, group, ".safetensors");
}
std::string TensorListPath(const JobConfig& job, int group) {
  return InArchive(job, group, ".tensors.textproto");
}
std::string CheckpointDirectory(const JobConfig& job, int group) {
  if (job.checkpoint().directory().empty()) return "";
  return JoinPath(job.checkpoint().directory(), job.groups(group).name());
}

}  // namespace codistill
