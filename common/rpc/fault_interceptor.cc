#include "common/rpc/fault_interceptor.h"

#include <signal.h>

#include <functional>
#include <map>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/fault.h"
#include "common/base/mutex.h"
#include "grpcpp/client_context.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/security/credentials.h"

namespace codistill {
namespace {

using grpc::experimental::InterceptionHookPoints;
using grpc::experimental::InterceptorBatchMethods;

constexpr absl::Duration kDuplicateTimeout = absl::Seconds(10);

// Lets calls go on later, on a thread of its own that lives as long as the process.
class Timer {
 public:
  static Timer& Global() {
    static Timer* const timer = new Timer;
    return *timer;
  }

  void After(absl::Duration delay, std::function<void()> f) {
    MutexLock lock(&mu_);
    due_.emplace(absl::Now() + delay, std::move(f));
  }

  // Holds `f` back until somebody else passes, or `longest` is over.
  void HoldUntilOvertaken(absl::Duration longest, std::function<void()> f) {
    MutexLock lock(&mu_);
    const auto it = due_.emplace(absl::Now() + longest, std::move(f));
    held_.push_back(it);
  }

  // Somebody has passed: those held back follow.
  void Overtake() {
    std::vector<std::function<void()>> follow;
    {
      MutexLock lock(&mu_);
      for (const auto& it : held_) {
        follow.push_back(std::move(it->second));
        due_.erase(it);
      }
      held_.clear();
    }
    for (const auto& f : follow) f();
  }

 private:
  using Due = std::multimap<absl::Time, std::function<void()>>;

  Timer() {
    std::thread([this] { Run(); }).detach();
  }

  void Run() {
    while (true) {
      std::function<void()> next;
      {
        MutexLock lock(&mu_);
        mu_.AwaitWithTimeout(absl::Condition(this, &Timer::SomethingIsDue), absl::Milliseconds(5));
        if (due_.empty() || due_.begin()->first > absl::Now()) continue;
        const auto it = due_.begin();
        for (auto held = held_.begin(); held != held_.end(); ++held) {
          if (*held == it) {
            held_.erase(held);
            break;
          }
        }
        next = std::move(it->second);
        due_.erase(it);
      }
      next();
    }
  }

  bool SomethingIsDue() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !due_.empty() && due_.begin()->first <= absl::Now();
  }

  Mutex mu_;
  Due due_ ABSL_GUARDED_BY(mu_);
  std::vector<Due::iterator> held_ ABSL_GUARDED_BY(mu_);
};

// The second arrival of a call, whose answer nobody wants.
struct Duplicate {
  grpc::ClientContext context;
  grpc::ByteBuffer request;
  grpc::ByteBuffer reply;
};

void SendAgain(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
               const grpc::ByteBuffer& request) {
  auto* const copy = new Duplicate;
  copy->request = request;
  copy->context.set_deadline(absl::ToChronoTime(absl::Now() + kDuplicateTimeout));
  grpc::GenericStub(channel).UnaryCall(&copy->context, method, {}, &copy->request, &copy->reply,
                                       [copy](grpc::Status) { delete copy; });
}

class FaultInterceptor final : public grpc::experimental::Interceptor {
 public:
  FaultInterceptor(grpc::experimental::ClientRpcInfo* info, std::shared_ptr<grpc::Channel> plain)
      : info_(info), plain_(std::move(plain)) {}

  void Intercept(InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::POST_RECV_STATUS) &&
        (verdict_.drop || verdict_.drop_reply)) {
      *methods->GetRecvStatus() = grpc::Status(
          grpc::StatusCode::UNAVAILABLE, verdict_.drop ? "injected fault: the call was lost"
                                                       : "injected fault: the answer was lost");
    }
    if (!methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->Proceed();
      return;
    }
    verdict_ = FaultInjector::Global().Hit(absl::StrCat("rpc:", info_->method()));
    if (verdict_.kill) raise(SIGKILL);
    if (verdict_.drop) info_->client_context()->TryCancel();
    if (verdict_.duplicate &&
        methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_MESSAGE)) {
      SendAgain(plain_, info_->method(), *methods->GetSerializedSendMessage());
    }
    if (verdict_.reorder) {
      Timer::Global().HoldUntilOvertaken(verdict_.hold, [methods] { methods->Proceed(); });
    } else if (verdict_.delay > absl::ZeroDuration()) {
      Timer::Global().After(verdict_.delay, [methods] { methods->Proceed(); });
    } else {
      methods->Proceed();
      Timer::Global().Overtake();
    }
  }

 private:
  grpc::experimental::ClientRpcInfo* const info_;
  const std::shared_ptr<grpc::Channel> plain_;
  FaultVerdict verdict_;
};

class Factory final : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit Factory(const std::string& target)
      : plain_(grpc::CreateChannel(target, grpc::InsecureChannelCredentials())) {}

  grpc::experimental::Interceptor* CreateClientInterceptor(
      grpc::experimental::ClientRpcInfo* info) override {
    if (info->type() != grpc::experimental::ClientRpcInfo::Type::UNARY) return nullptr;
    // Whoever sets the rules must get through, and nobody is helped by losing what is asked to look
    // at the damage.
    if (absl::string_view(info->method()).find("/codistill.Control/") != absl::string_view::npos ||
        absl::string_view(info->method()).find("/codistill.FaultInjection/") !=
            absl::string_view::npos) {
      return nullptr;
    }
    return new FaultInterceptor(info, plain_);
  }

 private:
  const std::shared_ptr<grpc::Channel> plain_;  // without interceptors
};

}  // namespace

std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>>
MakeFaultInterceptors(const std::string& target) {
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> factories;
  if (FaultInjector::Global().enabled()) factories.push_back(std::make_unique<Factory>(target));
  return factories;
}

}  // namespace codistill
