#ifndef CODISTILL_COMMON_MODEL_WEIGHT_FILES_H_
#define CODISTILL_COMMON_MODEL_WEIGHT_FILES_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/file.h"
#include "common/model/followed_rows.h"
#include "common/model/model.h"
#include "proto/checkpoint.pb.h"
#include "proto/job.pb.h"

// A model's weights from files, straight into its storage. Files are only read, and not trusted:
// what is damaged or of another model is refused by name, and what the model holds is unspecified
// then.
namespace codistill {

// A safetensors file that has every parameter and buffer of the model under its name, and nothing
// else. FAILED_PRECONDITION names every tensor that is missing, of another shape or type, or
// unknown; DATA_LOSS if the file is damaged.
absl::Status ReadSafetensors(const std::string& path, Model* model,
                             FileSystem* file_system = FileSystem::Real());

// A checkpoint of a group: values of parameters and buffers, whole, on however many shards they
// were written. Every file is checked as a whole first. FAILED_PRECONDITION if the tensors are not
// the model's; DATA_LOSS names the damaged file; NOT_FOUND one that is gone.
absl::Status ReadCheckpoint(const std::string& directory, const CheckpointManifest& manifest,
                            Model* model, FileSystem* file_system = FileSystem::Real());

// The embedding tables of checkpoints, without optimizer slots. What the rule of age has evicted by
// the checkpoint's step is left out; what only the rule of norm has is not. A key without a row
// reads as zeros: the initial row that its group has for it depends on the seed of that group's
// job, which checkpoints do not tell, and has zero mean. Not thread-safe.
class CheckpointTables {
 public:
  using Tables = std::vector<std::shared_ptr<const FollowedRows>>;  // by index in the model

  explicit CheckpointTables(const ModelConfig& model, FileSystem* file_system = FileSystem::Real());

  // Reads the files that are new since the last call where they go on from the others, else all of
  // them. Empty if the model has no tables. FAILED_PRECONDITION names the table that the checkpoint
  // lacks or has with another dim; DATA_LOSS names the damaged file.
  absl::StatusOr<Tables> Read(const std::string& directory, const CheckpointManifest& manifest);

 private:
  // Names of the files that were read, by shard.
  using Files = std::vector<std::vector<std::string>>;

  absl::StatusOr<Tables> ReadFiles(const std::string& directory, const CheckpointManifest& manifest,
                                   const Files& done, const Tables& base) const;
  absl::Status ReadFile(const std::string& path, int shard, int64_t step,
                        std::vector<FollowedRows::Builder>* builders) const;

  const ModelConfig model_;
  FileSystem* const file_system_;
  Tables empty_;
  bool ages_ = false;  // some table's rows are evicted by age
  std::string directory_;
  Files files_;
  Tables tables_;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_WEIGHT_FILES_H_
