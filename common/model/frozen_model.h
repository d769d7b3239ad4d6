#ifndef CODISTILL_COMMON_MODEL_FROZEN_MODEL_H_
#define CODISTILL_COMMON_MODEL_FROZEN_MODEL_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/file.h"
#include "common/model/followed_model.h"
#include "proto/job.pb.h"

namespace codistill {

// Where a model comes from that no running group publishes.
struct FrozenModelOptions {
  std::string name;     // in messages and as group_state's error context
  std::string archive;  // TorchScript archive; its weights too, where `checkpoint` is empty
  // Inputs, states, num_outputs and embedding tables, as requests see the model.
  ModelConfig model;
  // A safetensors file; a directory of checkpoints, of which the newest whole one is taken; or the
  // path of one checkpoint's manifest. Nothing is written there, and nobody's claim is disturbed.
  std::string checkpoint;
  // `checkpoint` is a directory, which may still be empty or not be there: its newest checkpoint is
  // loaded, in the background, and newer ones as they appear.
  bool follow = false;
  int threads = 1;                // of libtorch in this process
  DataType weights = DT_FLOAT;    // as FollowedModel::Options
  int held_versions = 1;          // with `follow`
  bool low_priority = false;      // of loading in the background
  bool optimize_predict = false;  // as FollowedModel::Options, and so are the next two
  std::string device = "cpu";
  Precision precision = FP32;
  // How often the directory is looked at.
  absl::Duration poll_interval = absl::Seconds(1);
  FileSystem* file_system = FileSystem::Real();
};

// A model of files. Its version is that of the checkpoint; an archive's or a safetensors file's own
// weights are version 1.0. It is never stale: group_step is the step held. group_state is FINISHED
// without `follow`, else TRAINING; group_silence is the time since the directory was last read.
//
// Without `follow` everything is loaded here, and whatever is wrong is an error now: NOT_FOUND,
// DATA_LOSS (naming every damaged checkpoint that was passed over) or FAILED_PRECONDITION name the
// file. With it, only a wrong archive or option is; a checkpoint that is damaged, or whose weights
// are not finite, is passed over for the next older one that is newer than the version held,
// counted in failed_loads and named in last_load_error; one that retention removes while it is read
// is no failure. A version is never gone back from: where all checkpoints there are are older than
// the held one, last_load_error says so.
absl::StatusOr<std::unique_ptr<FollowedModel>> LoadFrozenModel(FrozenModelOptions options);

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_FROZEN_MODEL_H_
