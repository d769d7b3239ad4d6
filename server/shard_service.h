#ifndef CODISTILL_SERVER_SHARD_SERVICE_H_
#define CODISTILL_SERVER_SHARD_SERVICE_H_

#include <utility>

#include "common/rpc/call_registry.h"
#include "proto/parameter_server.grpc.pb.h"
#include "server/shard.h"

namespace codistill {

// Service Shard over gRPC: decodes, calls, encodes. The shard outlives the server.
class ShardService final : public Shard::CallbackService {
 public:
  ShardService(ModelShard* shard, GroupRef group) : shard_(shard), group_(std::move(group)) {}

  CallRegistry* registry() { return &registry_; }

  grpc::ServerUnaryReactor* Probe(grpc::CallbackServerContext* context, const ProbeRequest* request,
                                  ProbeReply* reply) override;
  grpc::ServerUnaryReactor* Restore(grpc::CallbackServerContext* context,
                                    const RestoreRequest* request, RestoreReply* reply) override;
  grpc::ServerUnaryReactor* Prepare(grpc::CallbackServerContext* context,
                                    const PrepareRequest* request, PrepareReply* reply) override;
  grpc::ServerUnaryReactor* Commit(grpc::CallbackServerContext* context,
                                   const CommitRequest* request, CommitReply* reply) override;
  grpc::ServerUnaryReactor* WriteCheckpoint(grpc::CallbackServerContext* context,
                                            const WriteCheckpointRequest* request,
                                            WriteCheckpointReply* reply) override;

 private:
  template <typename Request, typename Reply>
  grpc::ServerUnaryReactor* Run(void (ModelShard::*method)(Request, ModelShard::Done<Reply>),
                                grpc::CallbackServerContext* context, const Request* request,
                                Reply* reply);

  ModelShard* const shard_;
  const GroupRef group_;
  CallRegistry registry_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_SHARD_SERVICE_H_
