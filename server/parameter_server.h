#ifndef CODISTILL_SERVER_PARAMETER_SERVER_H_
#define CODISTILL_SERVER_PARAMETER_SERVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/executor.h"
#include "common/base/file.h"
#include "common/checkpoint/directory_claim.h"
#include "common/metrics/metrics.h"
#include "common/rpc/bulk_server.h"
#include "common/rpc/call_registry.h"
#include "grpcpp/impl/codegen/service_type.h"
#include "proto/control.pb.h"
#include "proto/job.pb.h"
#include "server/follow_service.h"
#include "server/leader.h"
#include "server/leader_service.h"
#include "server/links.h"
#include "server/shard.h"
#include "server/shard_service.h"
#include "server/transfer_service.h"

namespace codistill {

// One parameter-server process without its daemon: the shard, in shard 0 the leader too, and their
// services. Use: Create; serve services(), bulk() and registries(); Start with the address bound;
// Drain; take the servers down; destroy.
class ParameterServer {
 public:
  struct Options {
    JobConfig job;
    int group = 0;
    int shard = 0;
    Metrics* metrics = nullptr;  // optional; not owned
    FileSystem* file_system = FileSystem::Real();
    // Optional: told once, on a thread of this class, when a newer process has taken this one's
    // place (a leader's or a shard's, by their claims in the checkpoint directory). The process
    // should end with the error.
    std::function<void(absl::Status)> on_superseded;
  };
  // Reads the group's tensor list. Shard 0 needs the other shards' addresses in the job:
  // INVALID_ARGUMENT names the field that lacks one.
  static absl::StatusOr<std::unique_ptr<ParameterServer>> Create(Options options);
  ~ParameterServer();

  std::vector<grpc::Service*> services();
  BulkServer* bulk() { return &bulk_; }
  std::vector<CallRegistry*> registries();

  // Begins to lead, or to be led. `address` is the one bound; the job's own is told to others where
  // it has one.
  void Start(const std::string& address);

  // Blocks: a leader ends its group's work and writes a checkpoint; another shard serves on until
  // its leader has fallen silent. Then answers everything that waits. An error is what the group
  // failed with.
  absl::Status Drain();

  bool leads() const { return leader_ != nullptr; }
  bool ready() const { return shard_->state().generation != 0; }
  void FillStatus(DaemonStatus* status) const;
  // Leaders only.
  absl::Status Pause() { return leader_->Pause(); }
  absl::Status Resume() { return leader_->Resume(); }
  absl::StatusOr<CheckpointReply> Checkpoint();

  ModelShard* shard() { return shard_.get(); }
  GroupLeader* leader() { return leader_.get(); }

 private:
  explicit ParameterServer(Options options);
  absl::Status Init();
  void RegisterMetrics();
  void CheckShardClaim();

  const Options options_;
  GroupRef group_;

  // Destroyed from below: what is further down calls what is further up.
  std::unique_ptr<GroupLeader> leader_;
  std::unique_ptr<ModelShard> shard_;
  std::unique_ptr<LocalEndReporter> local_reporter_;
  std::unique_ptr<EndReporter> grpc_reporter_;
  std::vector<std::unique_ptr<ShardLink>> links_;
  std::unique_ptr<TransferService> transfer_;
  std::unique_ptr<FollowService> follow_;
  std::unique_ptr<ShardService> shard_service_;
  std::unique_ptr<LeaderService> leader_service_;
  BulkServer bulk_;
  std::unique_ptr<PeriodicTask> leader_ticks_;
  std::unique_ptr<PeriodicTask> shard_ticks_;
  std::unique_ptr<DirectoryClaim> shard_claim_;  // shards that do not lead
  bool superseded_ = false;
  std::unique_ptr<PeriodicTask> claim_ticks_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_PARAMETER_SERVER_H_
