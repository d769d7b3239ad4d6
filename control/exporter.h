#ifndef CODISTILL_CONTROL_EXPORTER_H_
#define CODISTILL_CONTROL_EXPORTER_H_

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/job.pb.h"

namespace codistill {

// Where models/export.py is: `flag` if given, else beside the binaries or in Bazel's runfiles or
// the working directory. NOT_FOUND lists the places.
absl::StatusOr<std::string> FindExporter(const std::string& flag);

// Makes the archives of all groups in `directory` by running models/export.py with `python` once a
// group, each with a seed of its own, derived from (job seed, group index). Files that exist
// already from the same module, options and seed are kept; others are made anew, except that a
// resumed run must keep its model: INVALID_ARGUMENT names the group. A relative path of a user's
// module is taken from `job_directory`. Errors carry the exporter's own message.
absl::Status ExportModels(const JobConfig& job, const std::string& job_directory,
                          const std::string& python, const std::string& exporter,
                          const std::string& directory, bool resume,
                          const std::function<bool()>& cancelled);

}  // namespace codistill

#endif  // CODISTILL_CONTROL_EXPORTER_H_
