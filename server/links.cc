#include "server/links.h"

#include <utility>

#include "common/rpc/channel.h"
#include "proto/parameter_server.grpc.pb.h"
#include "server/pending_calls.h"

namespace codistill {
namespace {

constexpr absl::Duration kReportTimeout = absl::Seconds(10);

class GrpcShardLink final : public ShardLink {
 public:
  explicit GrpcShardLink(const std::string& address)
      : stub_(Shard::NewStub(MakeChannel(address, ChannelUse::kControl))) {}

  void Probe(const ProbeRequest& request, absl::Duration timeout, Done<ProbeReply> done) override {
    calls_.Call<ProbeRequest, ProbeReply>(
        request, timeout, [this](auto... args) { stub_->async()->Probe(std::move(args)...); },
        std::move(done));
  }
  void Restore(const RestoreRequest& request, absl::Duration timeout,
               Done<RestoreReply> done) override {
    calls_.Call<RestoreRequest, RestoreReply>(
        request, timeout, [this](auto... args) { stub_->async()->Restore(std::move(args)...); },
        std::move(done));
  }
  void Prepare(const PrepareRequest& request, absl::Duration timeout,
               Done<PrepareReply> done) override {
    calls_.Call<PrepareRequest, PrepareReply>(
        request, timeout, [this](auto... args) { stub_->async()->Prepare(std::move(args)...); },
        std::move(done));
  }
  void Commit(const CommitRequest& request, absl::Duration timeout,
              Done<CommitReply> done) override {
    calls_.Call<CommitRequest, CommitReply>(
        request, timeout, [this](auto... args) { stub_->async()->Commit(std::move(args)...); },
        std::move(done));
  }
  void WriteCheckpoint(const WriteCheckpointRequest& request, absl::Duration timeout,
                       Done<WriteCheckpointReply> done) override {
    calls_.Call<WriteCheckpointRequest, WriteCheckpointReply>(
        request, timeout,
        [this](auto... args) { stub_->async()->WriteCheckpoint(std::move(args)...); },
        std::move(done));
  }

 private:
  const std::unique_ptr<Shard::Stub> stub_;
  PendingCalls calls_;  // ends before the stub
};

class LocalShardLink final : public ShardLink {
 public:
  explicit LocalShardLink(ModelShard* shard) : shard_(shard) {}

  void Probe(const ProbeRequest&, absl::Duration, Done<ProbeReply> done) override {
    done(shard_->Probe());
  }
  void Restore(const RestoreRequest& request, absl::Duration, Done<RestoreReply> done) override {
    shard_->Restore(request, std::move(done));
  }
  void Prepare(const PrepareRequest& request, absl::Duration, Done<PrepareReply> done) override {
    shard_->Prepare(request, std::move(done));
  }
  void Commit(const CommitRequest& request, absl::Duration, Done<CommitReply> done) override {
    shard_->Commit(request, std::move(done));
  }
  void WriteCheckpoint(const WriteCheckpointRequest& request, absl::Duration,
                       Done<WriteCheckpointReply> done) override {
    shard_->WriteCheckpoint(request, std::move(done));
  }

 private:
  ModelShard* const shard_;
};

class GrpcEndReporter final : public EndReporter {
 public:
  void SetLeader(const std::string& address) override {
    MutexLock lock(&mu_);
    if (address == address_) return;
    address_ = address;
    stub_ = Leader::NewStub(MakeChannel(address, ChannelUse::kControl));
  }

  void ReportEnd(ReportEndRequest request, std::function<void(absl::Status)> done) override {
    std::shared_ptr<Leader::Stub> stub;
    {
      MutexLock lock(&mu_);
      stub = stub_;
    }
    if (stub == nullptr) {
      done(absl::UnavailableError("no leader has called yet"));
      return;
    }
    calls_.Call<ReportEndRequest, ReportEndReply>(
        request, kReportTimeout,
        [stub](auto... args) { stub->async()->ReportEnd(std::move(args)...); },
        // The stub stays until its call has ended, whoever leads by then.
        [stub, done = std::move(done)](absl::StatusOr<ReportEndReply> reply) {
          done(reply.status());
        });
  }

  void Stop() override { calls_.CancelAll(); }

 private:
  Mutex mu_;
  std::string address_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<Leader::Stub> stub_ ABSL_GUARDED_BY(mu_);
  PendingCalls calls_;
};

}  // namespace

std::unique_ptr<ShardLink> MakeGrpcShardLink(const std::string& address) {
  return std::make_unique<GrpcShardLink>(address);
}

std::unique_ptr<ShardLink> MakeLocalShardLink(ModelShard* shard) {
  return std::make_unique<LocalShardLink>(shard);
}

std::unique_ptr<EndReporter> MakeGrpcEndReporter() { return std::make_unique<GrpcEndReporter>(); }

void LocalEndReporter::set_leader(GroupLeader* leader) {
  MutexLock lock(&mu_);
  leader_ = leader;
}

void LocalEndReporter::ReportEnd(ReportEndRequest request, std::function<void(absl::Status)> done) {
  GroupLeader* leader;
  {
    MutexLock lock(&mu_);
    leader = leader_;
  }
  done(leader == nullptr ? absl::UnavailableError("the leader is not there yet")
                         : leader->ReportEnd(request));
}

}  // namespace codistill
