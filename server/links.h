#ifndef CODISTILL_SERVER_LINKS_H_
#define CODISTILL_SERVER_LINKS_H_

#include <memory>
#include <string>

#include "proto/parameter_server.pb.h"
#include "server/leader.h"
#include "server/shard.h"
#include "server/shard_link.h"

// The two directions between a leader and its shards: over gRPC, or by a plain call where both are
// in one process. Links to other processes cancel what is under way when they are destroyed, and
// wait for it.
namespace codistill {

std::unique_ptr<ShardLink> MakeGrpcShardLink(const std::string& address);

// `shard` is not owned.
std::unique_ptr<ShardLink> MakeLocalShardLink(ModelShard* shard);

// Reports to the leader's address as Restore gives it.
std::unique_ptr<EndReporter> MakeGrpcEndReporter();

// Reports to a leader in this process, once it is set; UNAVAILABLE before. Not owned.
class LocalEndReporter final : public EndReporter {
 public:
  void set_leader(GroupLeader* leader);
  void SetLeader(const std::string&) override {}
  void ReportEnd(ReportEndRequest request, std::function<void(absl::Status)> done) override;

 private:
  Mutex mu_;
  GroupLeader* leader_ ABSL_GUARDED_BY(mu_) = nullptr;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_LINKS_H_
