#include "common/client/fake_leader.h"

#include <cstdlib>
#include <vector>

#include "common/base/mutex.h"
#include "common/rpc/server.h"
#include "grpcpp/server_context.h"
#include "gtest/gtest.h"
#include "proto/parameter_server.grpc.pb.h"

namespace codistill {

class FakeLeader::Service final : public Leader::Service {
 public:
  Service() {
    RpcServer::Options options;
    options.services = {this};
    auto server = RpcServer::Start(options);
    if (!server.ok()) {
      ADD_FAILURE() << server.status();
      std::abort();
    }
    server_ = *std::move(server);
  }
  ~Service() override {
    {
      MutexLock lock(&mu_);
      stopping_ = true;
    }
    server_.reset();
  }

  const std::string& address() const { return server_->address(); }

  void Tell(const GroupState& state) {
    MutexLock lock(&mu_);
    states_.push_back(state);
  }

  grpc::Status Watch(grpc::ServerContext* context, const WatchRequest*,
                     grpc::ServerWriter<GroupState>* writer) override {
    // A watcher that comes late gets the newest only.
    size_t next;
    {
      MutexLock lock(&mu_);
      next = states_.empty() ? 0 : states_.size() - 1;
    }
    while (!context->IsCancelled()) {
      GroupState state;
      {
        MutexLock lock(&mu_);
        auto ready = [&] { return stopping_ || next < states_.size(); };
        mu_.AwaitWithTimeout(absl::Condition(&ready), absl::Milliseconds(500));
        if (stopping_) return {grpc::StatusCode::UNAVAILABLE, "the fake leader goes"};
        if (states_.empty()) continue;
        // Like a real one, it repeats itself when there is nothing new.
        if (next == states_.size()) --next;
        state = states_[next++];
      }
      writer->Write(state);
    }
    return grpc::Status::CANCELLED;
  }

 private:
  Mutex mu_;
  std::vector<GroupState> states_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::unique_ptr<RpcServer> server_;
};

FakeLeader::FakeLeader() : service_(std::make_unique<Service>()), address_(service_->address()) {}
FakeLeader::~FakeLeader() = default;

void FakeLeader::Tell(const GroupState& state) { service_->Tell(state); }

}  // namespace codistill
