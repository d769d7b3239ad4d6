#ifndef CODISTILL_SERVER_EMBEDDING_CHECKPOINT_H_
#define CODISTILL_SERVER_EMBEDDING_CHECKPOINT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/file.h"
#include "common/base/mutex.h"
#include "proto/checkpoint.pb.h"
#include "server/embedding/embedding_table.h"

namespace codistill {

// The embedding tables of one shard on their way to disk and back. The first checkpoint after a
// restore is a base, a file with all rows; those after it are deltas, with what has changed since
// the file before, until the deltas of a base are together half as large as it: then comes a new
// base.
//
// Snapshot, Load and Forget are called by the thread that changes the tables, between updates;
// Write by one other thread.
class EmbeddingCheckpoint {
 public:
  // The tables outlive this.
  EmbeddingCheckpoint(std::vector<EmbeddingTable*> tables, std::vector<std::string> optimizers)
      : tables_(std::move(tables)), optimizers_(std::move(optimizers)) {}

  // Keeps the tables as they are for the checkpoint `label`, unless that is kept already; replaces
  // an older one that was not written.
  void Snapshot(int64_t label);

  // Writes what was kept. `identity` has group, shard, num_shards and version. The files that the
  // checkpoint needs, in the order in which they are read, the last of which is new; none without
  // tables. NOT_FOUND: nothing is kept for `label`. After an error it is not kept any more, and the
  // next checkpoint has what this one lacks.
  absl::StatusOr<std::vector<CheckpointFile>> Write(int64_t label, const std::string& directory,
                                                    const std::string& name,
                                                    TableFileHeader identity,
                                                    FileSystem* file_system);

  // The tables at `step`, from a checkpoint's files, which may be of another number of shards: rows
  // of this shard's keys are taken. DATA_LOSS names file and place, FAILED_PRECONDITION what
  // differs from the job.
  absl::Status Load(int64_t step, const std::string& directory, const CheckpointManifest& manifest,
                    int shard, int num_shards, FileSystem* file_system);

  // The next checkpoint is a base.
  void Forget();

 private:
  struct Kept {
    int64_t label = 0;
    bool base = true;
    struct Table {
      std::unique_ptr<EmbeddingTable::Snapshot> rows;
      std::vector<uint64_t> removed;
      int64_t step = 0;
      int64_t evicted = 0;
    };
    std::vector<Table> tables;
  };

  absl::StatusOr<CheckpointFile> WriteFile(Kept* kept, const std::string& directory,
                                           const std::string& name, TableFileHeader identity,
                                           FileSystem* file_system) const;

  const std::vector<EmbeddingTable*> tables_;
  const std::vector<std::string> optimizers_;  // by table: kind by name

  Mutex mu_;
  std::unique_ptr<Kept> kept_ ABSL_GUARDED_BY(mu_);
  // What the newest file that was written ends with.
  std::vector<CheckpointFile> chain_ ABSL_GUARDED_BY(mu_);
  std::string chain_directory_ ABSL_GUARDED_BY(mu_);
  std::vector<int64_t> steps_ ABSL_GUARDED_BY(mu_);    // by table
  std::vector<int64_t> evicted_ ABSL_GUARDED_BY(mu_);  // by table
  uint64_t epoch_ ABSL_GUARDED_BY(mu_) = 0;            // Forget began so many
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_CHECKPOINT_H_
