#include "common/rpc/bulk_server.h"

#include <algorithm>
#include <deque>
#include <thread>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/rpc/frame.h"
#include "common/rpc/grpc_status.h"
#include "common/rpc/rpc_metrics.h"
#include "common/rpc/shm_server.h"
#include "glog/logging.h"
#include "grpcpp/alarm.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/server_context.h"
#include "proto/local_transport.pb.h"

namespace codistill {
namespace {

// Tells where the shared memory is (proto/local_transport.proto).
class EndpointHandler final : public BulkHandler {
 public:
  explicit EndpointHandler(const LocalEndpoint& endpoint) : endpoint_(endpoint) {}
  void OnStart(std::shared_ptr<BulkCall> call) override {
    call->FinishWith(EncodeWithPayload(endpoint_, /*payload_field=*/0, {}));
  }
  void OnMessage(grpc::ByteBuffer) override {}
  void OnHalfClose() override {}
  void OnWritten() override {}
  void OnDone(bool) override {}

 private:
  const LocalEndpoint endpoint_;
};

}  // namespace

// How a call works. Each operation given to gRPC carries an Event as its tag; a completion-queue
// thread hands the event to its call, which handles events one after another: the thread that finds
// the call idle works off the list, others only add to it. What a handler asks for is done at once
// under the call's lock; gRPC never calls back from within.
//
// A call is over for gRPC when AsyncNotifyWhenDone's event has come, which may be before the thread
// that took kStart gets to it, and no other operation is out. Then the handler gets OnDone, and the
// context and stream are destroyed, although somebody may still hold the BulkCall: an undestroyed
// context would keep the server's connection, and its shutdown, waiting.
//
// Lock order: Impl::mu_ before Call::mu_.
class BulkServer::Impl {
 public:
  explicit Impl(int num_threads) : num_threads_(std::max(1, num_threads)) {}

  ~Impl() {
    Shutdown();
    if (queue_ == nullptr) return;
    // Attached, but never started.
    queue_->Shutdown();
    void* tag;
    bool ok;
    while (queue_->Next(&tag, &ok)) delete static_cast<Event*>(tag);
  }

  void RegisterMethod(std::string full_method, HandlerFactory factory, int max_message_bytes) {
    CHECK(threads_.empty()) << "methods are registered before Start";
    Method& method = methods_[std::move(full_method)];
    method.factory = std::move(factory);
    method.max_message_bytes = static_cast<size_t>(max_message_bytes);
  }

  void ServeSharedMemory() {
    CHECK(threads_.empty()) << "shared memory is asked for before Start";
    share_memory_ = true;
  }

  int shared_memory_connections() const {
    return shared_memory_ == nullptr ? 0 : shared_memory_->connections();
  }

  void CountIn(Metrics* metrics) {
    CHECK(threads_.empty()) << "metrics are given before Start";
    for (auto& entry : methods_) {
      const std::string name(absl::StripPrefix(entry.first, "/"));
      entry.second.metrics = std::make_unique<MethodMetrics>(metrics, name);
    }
  }

  void Attach(grpc::ServerBuilder* builder) {
    CHECK(queue_ == nullptr) << "attached to one server only";
    builder->RegisterAsyncGenericService(&service_);
    queue_ = builder->AddCompletionQueue();
  }

  void Start() {
    CHECK(queue_ != nullptr) << "Attach comes before Start";
    CHECK(threads_.empty()) << "Start is called once";
    if (share_memory_) StartSharedMemory();
    for (int i = 0; i < num_threads_; ++i) RequestCall();
    for (int i = 0; i < num_threads_; ++i) {
      threads_.emplace_back([this, i] {
        SetThreadName(absl::StrCat("bulk/", i));
        Run();
      });
    }
  }

  void StopAccepting() {
    if (shared_memory_ != nullptr) shared_memory_->StopAccepting();
    std::vector<std::shared_ptr<Call>> open;
    {
      MutexLock lock(&mu_);
      stopping_ = true;
      for (const auto& entry : calls_) open.push_back(entry.second);
    }
    for (const std::shared_ptr<Call>& call : open) call->Finish(Stopping());
  }

  void Shutdown() {
    if (threads_.empty()) return;
    StopAccepting();
    if (shared_memory_ != nullptr) shared_memory_->Shutdown();
    {
      MutexLock lock(&mu_);
      for (const auto& entry : calls_) entry.second->Cancel();
      // Both come to an end by themselves after grpc::Server::Shutdown.
      CHECK(mu_.AwaitWithTimeout(absl::Condition(this, &Impl::Idle), absl::Seconds(30)))
          << calls_.size() << " calls do not end; was grpc::Server::Shutdown called before?";
    }
    queue_->Shutdown();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    queue_.reset();
  }

 private:
  class Call;

  struct Method {
    HandlerFactory factory;
    size_t max_message_bytes = 0;
    std::unique_ptr<MethodMetrics> metrics;  // null: not counted
  };

  void StartSharedMemory() {
    auto methods = std::make_shared<std::unordered_map<std::string, ShmServer::Method>>();
    for (const auto& entry : methods_) {
      const Method& method = entry.second;
      (*methods)[entry.first] = {method.factory, method.max_message_bytes, method.metrics.get()};
    }
    ShmServer::Options options;
    options.find_method = [methods](const std::string& name) -> const ShmServer::Method* {
      const auto found = methods->find(name);
      return found == methods->end() ? nullptr : &found->second;
    };
    LocalEndpoint endpoint;
    endpoint.set_boot_id(BootId());
    absl::StatusOr<std::unique_ptr<ShmServer>> server = ShmServer::Start(std::move(options));
    if (!server.ok() || endpoint.boot_id().empty()) {
      LOG(WARNING) << "tensors go through gRPC alone, as shared memory is not to be had here: "
                   << server.status();
      return;
    }
    shared_memory_ = *std::move(server);
    endpoint.set_socket_name(shared_memory_->socket_name());
    Method& method = methods_[kLocalEndpointMethod];
    method.factory = [endpoint] { return std::make_unique<EndpointHandler>(endpoint); };
    method.max_message_bytes = 1 << 10;
  }

  enum class EventKind { kStart, kRead, kWritten, kFinished, kDone, kPosted };

  // Lives from the start of an operation until it was handled, and keeps its call alive meanwhile.
  struct Event {
    std::shared_ptr<Call> call;
    EventKind kind;
    bool ok = false;
    std::function<void()> posted;        // kPosted
    std::unique_ptr<grpc::Alarm> alarm;  // kPosted
  };

  class Call : public BulkCall, public std::enable_shared_from_this<Call> {
   public:
    explicit Call(Impl* server) : server_(server), rpc_(std::make_unique<Rpc>()) {}

    void Request() {
      done_event_ = NewEvent(EventKind::kDone);
      rpc_->context.AsyncNotifyWhenDone(done_event_);
      server_->service_.RequestCall(&rpc_->context, &rpc_->stream, server_->queue_.get(),
                                    server_->queue_.get(), NewEvent(EventKind::kStart));
    }

    // The server shut down before a call came: gRPC will not deliver the kDone event.
    void Abandon() { delete done_event_; }

    // Takes what an operation brought. Runs the call's callbacks unless another thread is at it,
    // which then takes this event too.
    void Take(std::unique_ptr<Event> event) {
      const std::shared_ptr<Call> self = shared_from_this();
      {
        MutexLock lock(&mu_);
        events_.push_back(std::move(event));
        if (running_) return;
        running_ = true;
      }
      while (true) {
        std::unique_ptr<Event> next;
        {
          MutexLock lock(&mu_);
          if (events_.empty()) {
            running_ = false;
            return;
          }
          next = std::move(events_.front());
          events_.pop_front();
        }
        Handle(next.get());
      }
    }

    void Read() override {
      MutexLock lock(&mu_);
      if (finishing_ || done_) return;
      CHECK(!reading_) << "one Read at a time";
      reading_ = true;
      rpc_->stream.Read(&incoming_, NewEvent(EventKind::kRead));
    }

    void Write(grpc::ByteBuffer message) override {
      MutexLock lock(&mu_);
      if (finishing_ || done_) return;
      CHECK(!writing_) << "one Write at a time";
      writing_ = true;
      if (metrics_ != nullptr) metrics_->Sent(message.Length());
      rpc_->stream.Write(message, NewEvent(EventKind::kWritten));
    }

    void Finish(absl::Status status) override { FinishOnce(std::move(status), nullptr); }

    void FinishWith(grpc::ByteBuffer reply) override { FinishOnce(absl::OkStatus(), &reply); }

    void Post(std::function<void()> f) override {
      MutexLock lock(&mu_);
      // A call that is not done is listed, and while any is the queue is not shut down.
      if (done_) return;
      Event* event = NewEvent(EventKind::kPosted);
      event->posted = std::move(f);
      event->alarm = std::make_unique<grpc::Alarm>();
      event->alarm->Set(server_->queue_.get(), gpr_now(GPR_CLOCK_MONOTONIC), event);
    }

    std::string peer() const override {
      MutexLock lock(&mu_);
      return peer_;
    }

    void Cancel() {
      MutexLock lock(&mu_);
      if (!done_) rpc_->context.TryCancel();
    }

   private:
    struct Rpc {
      grpc::GenericServerContext context;
      grpc::GenericServerAsyncReaderWriter stream{&context};
    };

    Event* NewEvent(EventKind kind) {
      auto* event = new Event;
      event->call = shared_from_this();
      event->kind = kind;
      return event;
    }

    void FinishOnce(absl::Status status, grpc::ByteBuffer* reply) {
      MutexLock lock(&mu_);
      if (finishing_ || done_) return;
      finishing_ = true;
      final_status_ = std::move(status);
      has_reply_ = reply != nullptr;
      if (has_reply_) reply_.Swap(reply);
      // gRPC takes the end of a call only when no message is on its way.
      if (!writing_) SendFinish();
    }

    void SendFinish() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      sending_finish_ = true;
      Event* event = NewEvent(EventKind::kFinished);
      if (has_reply_) {
        if (metrics_ != nullptr) metrics_->Sent(reply_.Length());
        rpc_->stream.WriteAndFinish(reply_, grpc::WriteOptions(), grpc::Status::OK, event);
        reply_.Clear();
      } else {
        rpc_->stream.Finish(ToGrpcStatus(final_status_), event);
      }
    }

    void Handle(Event* event) {
      switch (event->kind) {
        case EventKind::kStart:
          OnStart();
          break;
        case EventKind::kRead:
          OnRead(event->ok);
          break;
        case EventKind::kWritten: {
          bool tell;
          {
            MutexLock lock(&mu_);
            writing_ = false;
            if (finishing_ && !done_) SendFinish();
            tell = event->ok && !finishing_ && !done_;
          }
          if (tell) handler_->OnWritten();
          break;
        }
        case EventKind::kFinished: {
          MutexLock lock(&mu_);
          sending_finish_ = false;
          break;
        }
        case EventKind::kDone: {
          MutexLock lock(&mu_);
          done_ = true;
          cancelled_ = rpc_->context.IsCancelled();
          break;
        }
        case EventKind::kPosted: {
          bool run;
          {
            MutexLock lock(&mu_);
            run = !done_;
          }
          if (run) event->posted();
          break;
        }
      }
      MaybeEnd();
    }

    void OnStart() {
      const Method* method = nullptr;
      std::string name;
      {
        MutexLock lock(&mu_);
        started_ = true;
        start_ = absl::Now();
        peer_ = rpc_->context.peer();
        name = rpc_->context.method();
        auto found = server_->methods_.find(name);
        if (found != server_->methods_.end()) {
          method = &found->second;
          metrics_ = method->metrics.get();
        }
      }
      if (method == nullptr) {
        Finish(absl::UnimplementedError(absl::StrCat("no method ", name)));
      } else if (server_->stopping()) {
        Finish(Stopping());
      } else {
        max_message_bytes_ = method->max_message_bytes;
        handler_ = method->factory();
        handler_->OnStart(shared_from_this());
      }
    }

    void OnRead(bool ok) {
      grpc::ByteBuffer message;
      {
        MutexLock lock(&mu_);
        reading_ = false;
        message.Swap(&incoming_);
        if (ok && metrics_ != nullptr) metrics_->Received(message.Length());
        if (finishing_ || done_) return;
      }
      if (!ok) {
        handler_->OnHalfClose();
      } else if (message.Length() > max_message_bytes_) {
        Finish(absl::ResourceExhaustedError(absl::StrCat("message of ", message.Length(),
                                                         " bytes; at most ", max_message_bytes_,
                                                         " are accepted")));
      } else {
        handler_->OnMessage(std::move(message));
      }
    }

    void MaybeEnd() {
      std::unique_ptr<Rpc> rpc;
      bool cancelled;
      {
        MutexLock lock(&mu_);
        if (over_ || !started_ || !done_ || reading_ || writing_ || sending_finish_) return;
        over_ = true;
        cancelled = cancelled_;
        rpc = std::move(rpc_);
        if (metrics_ != nullptr) {
          metrics_->Observe(cancelled ? absl::StatusCode::kCancelled : final_status_.code(),
                            absl::Now() - start_);
        }
      }
      if (handler_ != nullptr) {
        handler_->OnDone(cancelled);
        handler_.reset();
      }
      rpc.reset();
      server_->Remove(this);
    }

    Impl* const server_;
    // Touched by the callbacks only.
    std::unique_ptr<BulkHandler> handler_;
    size_t max_message_bytes_ = 0;

    mutable Mutex mu_;
    std::unique_ptr<Rpc> rpc_;   // operations are started under mu_; null once over_
    grpc::ByteBuffer incoming_;  // gRPC's while reading_
    std::deque<std::unique_ptr<Event>> events_ ABSL_GUARDED_BY(mu_);
    std::string peer_ ABSL_GUARDED_BY(mu_);
    Event* done_event_ = nullptr;                // for Abandon
    bool started_ ABSL_GUARDED_BY(mu_) = false;  // kStart was handled
    bool running_ ABSL_GUARDED_BY(mu_) = false;
    bool reading_ ABSL_GUARDED_BY(mu_) = false;
    bool writing_ ABSL_GUARDED_BY(mu_) = false;
    bool finishing_ ABSL_GUARDED_BY(mu_) = false;       // Finish was called
    bool sending_finish_ ABSL_GUARDED_BY(mu_) = false;  // and given to gRPC, not answered yet
    bool done_ ABSL_GUARDED_BY(mu_) = false;            // gRPC says the call has ended
    bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
    bool over_ ABSL_GUARDED_BY(mu_) = false;  // nothing of it is left in gRPC
    absl::Time start_ ABSL_GUARDED_BY(mu_);
    MethodMetrics* metrics_ ABSL_GUARDED_BY(mu_) = nullptr;
    absl::Status final_status_ ABSL_GUARDED_BY(mu_);
    bool has_reply_ ABSL_GUARDED_BY(mu_) = false;
    grpc::ByteBuffer reply_ ABSL_GUARDED_BY(mu_);
  };

  static absl::Status Stopping() { return absl::UnavailableError("this daemon is shutting down"); }

  bool stopping() const {
    MutexLock lock(&mu_);
    return stopping_;
  }

  void RequestCall() {
    {
      MutexLock lock(&mu_);
      ++requested_;
    }
    std::make_shared<Call>(this)->Request();
  }

  void Run() {
    void* tag;
    bool ok;
    while (queue_->Next(&tag, &ok)) {
      std::unique_ptr<Event> event(static_cast<Event*>(tag));
      event->ok = ok;
      Call* const call = event->call.get();
      if (event->kind == EventKind::kStart) {
        if (!ok) {
          call->Abandon();
          MutexLock lock(&mu_);
          --requested_;
          continue;
        }
        RequestCall();  // the next one
        Add(event->call);
      }
      call->Take(std::move(event));
    }
  }

  void Add(std::shared_ptr<Call> call) {
    MutexLock lock(&mu_);
    --requested_;
    Call* const key = call.get();
    calls_[key] = std::move(call);
  }

  void Remove(Call* call) {
    MutexLock lock(&mu_);
    calls_.erase(call);
  }

  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return calls_.empty() && requested_ == 0; }

  const int num_threads_;
  std::unordered_map<std::string, Method> methods_;  // not changed after Start
  grpc::AsyncGenericService service_;
  std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  std::vector<std::thread> threads_;
  bool share_memory_ = false;
  std::unique_ptr<ShmServer> shared_memory_;  // set by Start

  mutable Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  int requested_ ABSL_GUARDED_BY(mu_) = 0;  // calls asked of gRPC that have not come
  std::unordered_map<Call*, std::shared_ptr<Call>> calls_ ABSL_GUARDED_BY(mu_);
};

BulkServer::BulkServer(int threads) : impl_(std::make_unique<Impl>(threads)) {}
BulkServer::~BulkServer() = default;

void BulkServer::RegisterMethod(std::string full_method, HandlerFactory factory,
                                int max_message_bytes) {
  impl_->RegisterMethod(std::move(full_method), std::move(factory), max_message_bytes);
}
void BulkServer::ServeSharedMemory() { impl_->ServeSharedMemory(); }
int BulkServer::shared_memory_connections() const { return impl_->shared_memory_connections(); }
void BulkServer::CountIn(Metrics* metrics) { impl_->CountIn(metrics); }
void BulkServer::Attach(grpc::ServerBuilder* builder) { impl_->Attach(builder); }
void BulkServer::Start() { impl_->Start(); }
void BulkServer::StopAccepting() { impl_->StopAccepting(); }
void BulkServer::Shutdown() { impl_->Shutdown(); }

}  // namespace codistill
