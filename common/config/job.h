#ifndef CODISTILL_COMMON_CONFIG_JOB_H_
#define CODISTILL_COMMON_CONFIG_JOB_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/job.pb.h"

namespace codistill {

// Reads a job file and validates it. Every mistake is reported at once, one line each, as
// "field.path: what is wrong (value); what would be right"; syntax errors with line and column.
// NOT_FOUND if the file does not exist. `overrides` are "field.path=value" (see SetField), applied
// between parsing and validation. Relative paths of frozen teachers are made to start at
// `teachers_directory`; empty = the directory of `path`.
absl::StatusOr<JobConfig> LoadJob(const std::string& path,
                                  const std::vector<std::string>& overrides = {},
                                  const std::string& teachers_directory = "");

// All rules on a job, including those across fields. OK or INVALID_ARGUMENT with one line a
// mistake.
absl::Status ValidateJob(const JobConfig& job);

// Sets one field by path: "stop.steps=100", "groups[1].num_shards=4", "groups.num_workers=2" (every
// element), "training.optimizer.kind=ADAM". INVALID_ARGUMENT names the part of the path that does
// not exist (and lists the fields there are) or the value that does not fit.
absl::Status SetField(absl::string_view assignment, JobConfig* job);

// Writes `job` as a text proto, atomically.
absl::Status SaveJob(const JobConfig& job, const std::string& path);

// Index of a group by name; NOT_FOUND lists the groups there are.
absl::StatusOr<int> FindGroup(const JobConfig& job, absl::string_view name);

// `run_id`, or the job's name where it is not set.
std::string RunId(const JobConfig& job);

// How many ranks a group may have: num_workers, under ELASTIC membership max_workers.
int MaxWorkers(const JobConfig& job, int group);

// Paths of a group's files in model.archive_dir.
std::string ArchivePath(const JobConfig& job, int group);     // GROUP.pt
std::string WeightsPath(const JobConfig& job, int group);     // GROUP.safetensors
std::string TensorListPath(const JobConfig& job, int group);  // GROUP.tensors.textproto
// Directory of a group's checkpoints; empty if the job has none.
std::string CheckpointDirectory(const JobConfig& job, int group);

}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_JOB_H_
