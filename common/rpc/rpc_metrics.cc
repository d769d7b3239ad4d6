#include "common/rpc/rpc_metrics.h"

#include <utility>

#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "google/protobuf/descriptor.h"

namespace codistill {
namespace {

class MetricsInterceptor : public grpc::experimental::Interceptor {
 public:
  explicit MetricsInterceptor(MethodMetrics* method) : method_(method), start_(absl::Now()) {}

  // A call that was cancelled may end without a status.
  ~MetricsInterceptor() override { method_->Observe(code_, absl::Now() - start_); }

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(
            grpc::experimental::InterceptionHookPoints::PRE_SEND_STATUS)) {
      code_ = static_cast<absl::StatusCode>(methods->GetSendStatus().error_code());
    }
    methods->Proceed();
  }

 private:
  MethodMetrics* const method_;
  const absl::Time start_;
  absl::StatusCode code_ = absl::StatusCode::kCancelled;
};

}  // namespace

MethodMetrics::MethodMetrics(Metrics* metrics, std::string method)
    : metrics_(metrics), method_(std::move(method)) {}

void MethodMetrics::Observe(absl::StatusCode code, absl::Duration duration) {
  size_t index = static_cast<size_t>(code);
  if (index >= seconds_.size()) index = static_cast<size_t>(absl::StatusCode::kUnknown);
  Metrics::Histogram* histogram;
  {
    MutexLock lock(&mu_);
    Metrics::Histogram*& slot = seconds_[index];
    if (slot == nullptr) {
      slot = metrics_->latency("codistill_rpc_seconds", "Calls served, from arrival to end.",
                               {{"method", method_}, {"code", absl::StatusCodeToString(code)}});
    }
    histogram = slot;
  }
  histogram->Observe(absl::ToDoubleSeconds(duration));
}

Metrics::Counter* MethodMetrics::received() {
  MutexLock lock(&mu_);
  if (received_ == nullptr) {
    received_ = metrics_->counter("codistill_rpc_received_bytes_total",
                                  "Bytes of messages received.", {{"method", method_}});
  }
  return received_;
}

Metrics::Counter* MethodMetrics::sent() {
  MutexLock lock(&mu_);
  if (sent_ == nullptr) {
    sent_ = metrics_->counter("codistill_rpc_sent_bytes_total", "Bytes of messages sent.",
                              {{"method", method_}});
  }
  return sent_;
}

grpc::experimental::Interceptor* MetricsInterceptorFactory::CreateServerInterceptor(
    grpc::experimental::ServerRpcInfo* info) {
  if (info->type() == grpc::experimental::ServerRpcInfo::Type::BIDI_STREAMING) return nullptr;
  absl::string_view path = info->method();  // "/package.Service/Method"
  if (!path.empty() && path.front() == '/') path.remove_prefix(1);
  const std::string method(path);
  MutexLock lock(&mu_);
  auto found = methods_.find(method);
  if (found == methods_.end()) {
    if (google::protobuf::DescriptorPool::generated_pool()->FindMethodByName(
            absl::StrReplaceAll(method, {{"/", "."}})) == nullptr) {
      return nullptr;
    }
    found = methods_.emplace(method, std::make_unique<MethodMetrics>(metrics_, method)).first;
  }
  return new MetricsInterceptor(found->second.get());
}

}  // namespace codistill
