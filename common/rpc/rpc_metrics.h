#ifndef CODISTILL_COMMON_RPC_RPC_METRICS_H_
#define CODISTILL_COMMON_RPC_RPC_METRICS_H_

#include <array>
#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/metrics/metrics.h"
#include "grpcpp/support/server_interceptor.h"

namespace codistill {

// What a server's calls are counted by:
//
//   codistill_rpc_seconds{method,code}             from arrival to the end of the call
//   codistill_rpc_received_bytes_total{method}     bulk methods only
//   codistill_rpc_sent_bytes_total{method}         bulk methods only
//
// `method` is "codistill.Leader/Register". One object a method; thread-safe, lives as long as the
// Metrics.
class MethodMetrics {
 public:
  MethodMetrics(Metrics* metrics, std::string method);

  void Observe(absl::StatusCode code, absl::Duration duration);
  void Received(size_t bytes) { received()->Add(bytes); }
  void Sent(size_t bytes) { sent()->Add(bytes); }

 private:
  Metrics::Counter* received();
  Metrics::Counter* sent();

  Metrics* const metrics_;
  const std::string method_;
  Mutex mu_;
  // Series come into being with the first call of their kind.
  std::array<Metrics::Histogram*, 17> seconds_ ABSL_GUARDED_BY(mu_) = {};
  Metrics::Counter* received_ ABSL_GUARDED_BY(mu_) = nullptr;
  Metrics::Counter* sent_ ABSL_GUARDED_BY(mu_) = nullptr;
};

// Counts the calls of all services but bidirectional streams (BulkServer counts its own) and of
// methods nobody has heard of, whose names are the client's.
class MetricsInterceptorFactory : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit MetricsInterceptorFactory(Metrics* metrics) : metrics_(metrics) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override;

 private:
  Metrics* const metrics_;
  Mutex mu_;
  std::unordered_map<std::string, std::unique_ptr<MethodMetrics>> methods_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_RPC_METRICS_H_
