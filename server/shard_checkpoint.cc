// Checkpoint files, written while training goes on.

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/fault.h"
#include "common/base/status.h"
#include "common/checkpoint/shard_file.h"
#include "glog/logging.h"
#include "server/shard.h"

namespace codistill {

void ModelShard::WriteCheckpoint(WriteCheckpointRequest request, Done<WriteCheckpointReply> done) {
  {
    MutexLock lock(&mu_);
    last_leader_call_ = options_.clock->Now();
  }
  auto shared = std::make_shared<Done<WriteCheckpointReply>>(std::move(done));
  const absl::Status status = io_executor_->Schedule(
      [this, request = std::move(request), shared] { (*shared)(DoWriteCheckpoint(request)); });
  if (!status.ok()) (*shared)(Annotate(status, Name()));
}

absl::StatusOr<WriteCheckpointReply> ModelShard::DoWriteCheckpoint(
    const WriteCheckpointRequest& request) {
  const absl::Time begin = options_.clock->Now();
  std::shared_ptr<const ShardStore::Snapshot> snapshot;
  {
    MutexLock lock(&mu_);
    if (generation_ == 0 || request.generation() != generation_) {
      return absl::AbortedError(absl::StrCat(Name(), " is in generation ", generation_,
                                             ", the checkpoint in ", request.generation()));
    }
    if (written_.generation == request.generation() && written_.step == request.step() &&
        written_.directory == request.directory()) {
      return written_.reply;  // asked again: the answer was lost
    }
    snapshot = store_->snapshot(request.step());
  }
  if (snapshot == nullptr) {
    return absl::NotFoundError(absl::StrCat(Name(), " has no snapshot of step ", request.step()));
  }
  CheckpointShardHeader identity;
  identity.set_group(group_name_);
  identity.set_shard(options_.shard);
  identity.set_shard_map_digest(options_.map_digest);
  identity.mutable_version()->set_generation(request.generation());
  identity.mutable_version()->set_step(request.step());
  if (!sync_) identity.mutable_version()->add_shard_steps(snapshot->step);
  const std::string name = ShardFileName(options_.shard, options_.map.num_shards(),
                                         identity.version(), request.attempt());
  const absl::StatusOr<CheckpointFile> file =
      store_->WriteSnapshot(*snapshot, request.directory(), name, identity, options_.file_system);
  absl::StatusOr<std::vector<CheckpointFile>> tables = std::vector<CheckpointFile>();
  if (file.ok()) tables = WriteTables(request);
  FaultPoint("shard.checkpoint.written");
  MutexLock lock(&mu_);
  if (const absl::Status status = file.ok() ? tables.status() : file.status(); !status.ok()) {
    ++counters_.failures;
    LOG(ERROR) << Name() << ": checkpoint of step " << request.step() << " failed: " << status;
    return Annotate(status, Name());
  }
  store_->DropSnapshot(request.step());
  ++counters_.checkpoints;
  counters_.checkpoint_bytes += file->bytes();
  LOG(INFO) << Name() << ": checkpoint of step " << request.step() << ": " << file->bytes()
            << " bytes in " << absl::ToDoubleSeconds(options_.clock->Now() - begin) << " s";
  WriteCheckpointReply reply;
  reply.set_file_name(file->name());
  reply.set_bytes(file->bytes());
  reply.set_crc32c(file->crc32c());
  for (const CheckpointFile& of_tables : *tables) {
    WrittenFile* const written = reply.add_table_files();
    written->set_name(of_tables.name());
    written->set_bytes(of_tables.bytes());
    written->set_crc32c(of_tables.crc32c());
  }
  if (!tables->empty()) counters_.checkpoint_bytes += tables->back().bytes();
  written_ = {request.generation(), request.step(), request.directory(), reply};
  return reply;
}

}  // namespace codistill
