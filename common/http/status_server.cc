#include "common/http/status_server.h"

#include <sys/socket.h>

#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/bounded_queue.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/base/status.h"
#include "common/http/status_page.h"
#include "common/rpc/address.h"
#include "httplib.h"

namespace codistill {
namespace {

constexpr int kThreads = 2;
constexpr size_t kWaitingConnections = 16;
constexpr int kTimeoutSeconds = 2;  // to send us a request, or to take our answer
constexpr size_t kMaxBodyBytes = 4096;

// The library's own queue has no bound. When this one is full, connections wait in the kernel's
// backlog, which has.
class BoundedTasks : public httplib::TaskQueue {
 public:
  BoundedTasks() : tasks_(kWaitingConnections) {
    for (int i = 0; i < kThreads; ++i) {
      threads_.emplace_back([this, i] {
        SetThreadName(absl::StrCat("http/", i));
        while (true) {
          absl::StatusOr<std::function<void()>> task = tasks_.Pop(absl::InfiniteFuture());
          if (!task.ok()) return;
          (*task)();
        }
      });
    }
  }
  void enqueue(std::function<void()> task) override {
    // Room comes: every task ends by the timeouts of its connection. Not closed while accepting.
    tasks_.Push(std::move(task), absl::InfiniteFuture()).IgnoreError();
  }
  void shutdown() override {
    tasks_.Close();
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  BoundedQueue<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
};

class HttplibStatusServer : public StatusServer {
 public:
  explicit HttplibStatusServer(Options options) : options_(std::move(options)) {}
  ~HttplibStatusServer() override { Stop(); }

  absl::Status Listen() {
    CODISTILL_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(options_.address));
    CODISTILL_RETURN_IF_ERROR(CheckListenAddress(address, options_.insecure_listen));
    Configure();
    // The library would share the port with whoever has it (SO_REUSEPORT).
    server_.set_socket_options([](socket_t socket) {
      const int on = 1;
      setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    });
    if (address.port == 0) {
      address.port = server_.bind_to_any_port(address.host);
      if (address.port <= 0) {
        address.port = 0;
        return ExplainListenFailure(address);
      }
    } else if (!server_.bind_to_port(address.host, address.port)) {
      return ExplainListenFailure(address);
    }
    address_ = address.ToString();
    listener_ = std::thread([this] {
      SetThreadName("http/listen");
      server_.listen_after_bind();
    });
    // httplib's stop() has no effect before the listener runs.
    while (!server_.is_running()) absl::SleepFor(absl::Milliseconds(1));
    return absl::OkStatus();
  }

  const std::string& address() const override { return address_; }

  void Stop() override {
    MutexLock lock(&stop_mu_);
    if (!listener_.joinable()) return;
    server_.stop();
    listener_.join();
  }

 private:
  void Configure() {
    server_.new_task_queue = [] { return new BoundedTasks; };
    server_.set_keep_alive_max_count(1);
    server_.set_keep_alive_timeout(kTimeoutSeconds);
    server_.set_read_timeout(kTimeoutSeconds);
    server_.set_write_timeout(kTimeoutSeconds);
    server_.set_payload_max_length(kMaxBodyBytes);
    server_.set_default_headers(
        {{"Cache-Control", "no-store"}, {"X-Content-Type-Options", "nosniff"}});
    server_.Get("/", [](const httplib::Request&, httplib::Response& response) {
      response.set_redirect("/statusz");
    });
    server_.Get("/statusz", [this](const httplib::Request& request, httplib::Response& response) {
      const DaemonStatus status = options_.status();
      if (request.has_param("json")) {
        response.set_content(RenderStatusJson(status), "application/json");
      } else {
        response.set_content(RenderStatusPage(status), "text/html; charset=utf-8");
      }
    });
    server_.Get("/healthz", [](const httplib::Request&, httplib::Response& response) {
      response.set_content("ok\n", "text/plain");
    });
    server_.Get("/readyz", [this](const httplib::Request&, httplib::Response& response) {
      const bool ready = options_.ready();
      response.status = ready ? 200 : 503;
      response.set_content(ready ? "ready\n" : "not ready\n", "text/plain");
    });
    server_.Get("/metrics", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(options_.metrics(), "text/plain; version=0.0.4");
    });
  }

  const Options options_;
  httplib::Server server_;
  std::string address_;
  Mutex stop_mu_;
  std::thread listener_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<StatusServer>> StatusServer::Start(Options options) {
  auto server = std::make_unique<HttplibStatusServer>(std::move(options));
  CODISTILL_RETURN_IF_ERROR(server->Listen());
  return server;
}

}  // namespace codistill
