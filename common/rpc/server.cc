#include "common/rpc/server.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "common/rpc/address.h"
#include "common/rpc/rpc_metrics.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/resource_quota.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"

namespace codistill {
namespace {

// Both are process-wide settings that builders look at.
void EnableHealthAndReflection() {
  static const bool once = [] {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    return true;
  }();
  static_cast<void>(once);
}

}  // namespace

absl::StatusOr<std::unique_ptr<RpcServer>> RpcServer::Start(Options options) {
  std::unique_ptr<RpcServer> server(new RpcServer(std::move(options)));
  CODISTILL_RETURN_IF_ERROR(server->Listen());
  return server;
}

absl::Status RpcServer::Listen() {
  CODISTILL_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(options_.address));
  CODISTILL_RETURN_IF_ERROR(CheckListenAddress(address, options_.insecure_listen));

  internal::KeepGrpcRunning();
  EnableHealthAndReflection();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address.ToString(), grpc::InsecureServerCredentials(), &port_);
  // Otherwise two daemons given one port share it, and each call reaches either.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // The guard against a bad length, on both sides.
  const int limit = options_.bulk == nullptr ? options_.max_message_bytes
                                             : std::max(options_.max_message_bytes, kMaxFrameBytes);
  builder.SetMaxReceiveMessageSize(limit);
  builder.SetMaxSendMessageSize(limit);
  // Clients ping every 20 s (common/rpc/channel.cc); with gRPC's own 5 minutes they would be cut
  // off.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kKeepaliveMs / 2);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  // A client that vanished without a word is noticed too.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options_.max_calls_per_connection);
  grpc::ResourceQuota quota("codistill");
  quota.Resize(options_.buffer_bytes);
  builder.SetResourceQuota(quota);
  // Only reflection is served by blocking threads.
  builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, 1);
  for (grpc::Service* service : options_.services) builder.RegisterService(service);
  if (options_.bulk != nullptr) options_.bulk->Attach(&builder);
  if (options_.metrics != nullptr) {
    std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> factories;
    factories.push_back(std::make_unique<MetricsInterceptorFactory>(options_.metrics));
    builder.experimental().SetInterceptorCreators(std::move(factories));
    if (options_.bulk != nullptr) options_.bulk->CountIn(options_.metrics);
  }

  server_ = builder.BuildAndStart();
  if (server_ == nullptr || port_ == 0) {
    if (server_ != nullptr) server_->Shutdown();
    server_.reset();
    return ExplainListenFailure(address);
  }
  if (options_.bulk != nullptr) options_.bulk->Start();
  address.port = port_;
  address_ = address.ToString();
  return absl::OkStatus();
}

RpcServer::~RpcServer() { Shutdown(absl::Now() + absl::Seconds(1)); }

void RpcServer::SetServing(bool serving) {
  if (auto* health = server_->GetHealthCheckService()) health->SetServingStatus(serving);
}

void RpcServer::Shutdown(absl::Time deadline) {
  MutexLock lock(&shutdown_mu_);
  if (shut_down_ || server_ == nullptr) return;
  shut_down_ = true;
  if (auto* health = server_->GetHealthCheckService()) health->Shutdown();
  for (CallRegistry* registry : options_.registries) registry->FinishAll();
  if (options_.bulk != nullptr) options_.bulk->StopAccepting();
  server_->Shutdown(absl::ToChronoTime(deadline));
  if (options_.bulk != nullptr) options_.bulk->Shutdown();
  server_->Wait();
}

}  // namespace codistill
