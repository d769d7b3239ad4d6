#ifndef CODISTILL_CONTROL_CHECKPOINT_COMMAND_H_
#define CODISTILL_CONTROL_CHECKPOINT_COMMAND_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace codistill {

// codistillctl checkpoint list | verify | reshard | export: works on files alone, whether or not
// the job runs. Checkpoints of a running job may be read at any time; one that is removed meanwhile
// is NOT_FOUND.
struct CheckpointCommandOptions {
  std::string verb;     // list, verify, reshard, export
  std::string target;   // a group's directory of checkpoints, a directory of such, or a run's --out
  std::string group;    // of those found; empty: all, or the only one
  int64_t step = 0;     // of the checkpoint; 0 = the newest
  int shards = 0;       // reshard
  std::string out;      // reshard: directory; export: file, .safetensors or .pt
  std::string archive;  // export to .pt: archive to take the model from (default: the run's own)
  std::string python;
  std::string exporter;  // path of models/export.py, beside which with_weights.py lies
  bool json = false;
  absl::Time now;
};

// Prints to stdout; `*damaged` says whether a damaged checkpoint was met (each is named in the
// output).
absl::Status RunCheckpointCommand(const CheckpointCommandOptions& options, std::string* output,
                                  bool* damaged);

// Directories with checkpoints under `target`, each with its group's name, sorted by it. NOT_FOUND
// says where was looked.
struct CheckpointPlace {
  std::string group;
  std::string directory;
};
absl::StatusOr<std::vector<CheckpointPlace>> FindCheckpoints(const std::string& target,
                                                             const std::string& group);

}  // namespace codistill

#endif  // CODISTILL_CONTROL_CHECKPOINT_COMMAND_H_
