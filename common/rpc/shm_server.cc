#include "common/rpc/shm_server.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/executor.h"
#include "common/base/status.h"
#include "common/rpc/channel.h"
#include "common/rpc/shm_message.h"
#include "glog/logging.h"
#include "proto/local_transport.pb.h"

namespace codistill {
namespace {

constexpr size_t kMaxErrorBytes = 64 << 10;

// How long Shutdown lets finished calls tell their clients.
constexpr absl::Duration kFarewell = absl::Milliseconds(500);

absl::Status Stopping() { return absl::UnavailableError("this daemon is shutting down"); }

// Wakes a connection's thread. Lives as long as anybody who may want to.
class Waker {
 public:
  Waker() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  ~Waker() {
    if (fd_ >= 0) close(fd_);
  }
  Waker(const Waker&) = delete;
  Waker& operator=(const Waker&) = delete;
  int fd() const { return fd_; }
  void Wake() const {
    const uint64_t one = 1;
    if (write(fd_, &one, sizeof(one)) < 0) return;  // full: it wakes anyhow
  }

 private:
  const int fd_;
};

}  // namespace

// What a handler holds of a call. All state that other threads may touch is here; the connection's
// thread works it off.
class ShmServer::Call final : public BulkCall {
 public:
  Call(std::shared_ptr<const Waker> waker, std::string peer)
      : waker_(std::move(waker)), peer_(std::move(peer)), thread_(std::this_thread::get_id()) {}

  void Read() override {
    {
      MutexLock lock(&mu_);
      if (finishing_ || over_) return;
      CHECK(!reading_) << "one Read at a time";
      reading_ = true;
    }
    Wake();
  }

  void Write(grpc::ByteBuffer message) override {
    {
      MutexLock lock(&mu_);
      if (finishing_ || over_) return;
      CHECK(!writing_) << "one Write at a time";
      writing_ = true;
      has_outgoing_ = true;
      outgoing_ = std::move(message);
    }
    Wake();
  }

  void Finish(absl::Status status) override { FinishOnce(std::move(status), nullptr); }
  void FinishWith(grpc::ByteBuffer reply) override { FinishOnce(absl::OkStatus(), &reply); }

  void Post(std::function<void()> f) override {
    {
      MutexLock lock(&mu_);
      if (over_) return;
      posted_.push_back(std::move(f));
    }
    Wake();
  }

  std::string peer() const override { return peer_; }

  // ------------------------------------------------------------- the rest: connection's thread

  bool HasWork() const {
    MutexLock lock(&mu_);
    return !posted_.empty() || has_outgoing_ || finishing_;
  }
  bool reading() const {
    MutexLock lock(&mu_);
    return reading_ && !finishing_;
  }
  bool finishing() const {
    MutexLock lock(&mu_);
    return finishing_;
  }
  // False if the call was finished meanwhile: then the handler hears no more of it.
  bool EndRead() {
    MutexLock lock(&mu_);
    reading_ = false;
    return !finishing_;
  }
  bool TakePosted(std::function<void()>* f) {
    MutexLock lock(&mu_);
    if (posted_.empty()) return false;
    *f = std::move(posted_.front());
    posted_.pop_front();
    return true;
  }
  bool TakeOutgoing(grpc::ByteBuffer* message) {
    MutexLock lock(&mu_);
    if (!has_outgoing_) return false;
    has_outgoing_ = false;
    *message = std::move(outgoing_);
    outgoing_.Clear();
    return true;
  }
  bool EndWrite() {
    MutexLock lock(&mu_);
    writing_ = false;
    return !finishing_;
  }
  bool TakeReply(grpc::ByteBuffer* reply) {
    MutexLock lock(&mu_);
    if (!has_reply_) return false;
    has_reply_ = false;
    *reply = std::move(reply_);
    reply_.Clear();
    return true;
  }
  absl::Status final_status() const {
    MutexLock lock(&mu_);
    return final_status_;
  }
  // Nothing more is asked of it. What was posted goes unheard.
  void SetOver() {
    std::deque<std::function<void()>> dropped;
    MutexLock lock(&mu_);
    over_ = true;
    dropped.swap(posted_);
    outgoing_.Clear();
    reply_.Clear();
  }

 private:
  void FinishOnce(absl::Status status, grpc::ByteBuffer* reply) {
    {
      MutexLock lock(&mu_);
      if (finishing_ || over_) return;
      finishing_ = true;
      final_status_ = std::move(status);
      has_reply_ = reply != nullptr;
      if (has_reply_) reply_ = std::move(*reply);
    }
    Wake();
  }

  void Wake() const {
    if (std::this_thread::get_id() != thread_) waker_->Wake();
  }

  const std::shared_ptr<const Waker> waker_;
  const std::string peer_;
  const std::thread::id thread_;

  mutable Mutex mu_;
  bool reading_ ABSL_GUARDED_BY(mu_) = false;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool has_outgoing_ ABSL_GUARDED_BY(mu_) = false;  // and not yet begun
  bool finishing_ ABSL_GUARDED_BY(mu_) = false;
  bool over_ ABSL_GUARDED_BY(mu_) = false;
  bool has_reply_ ABSL_GUARDED_BY(mu_) = false;
  grpc::ByteBuffer outgoing_ ABSL_GUARDED_BY(mu_);
  grpc::ByteBuffer reply_ ABSL_GUARDED_BY(mu_);
  absl::Status final_status_ ABSL_GUARDED_BY(mu_);
  std::deque<std::function<void()>> posted_ ABSL_GUARDED_BY(mu_);
};

class ShmServer::Connection {
 public:
  Connection(ShmServer* server, int socket)
      : server_(server), waker_(std::make_shared<Waker>()), thread_([this, socket] {
          SetThreadName("shm");
          Serve(socket);
          ended_.store(true);
        }) {}
  ~Connection() { thread_.join(); }

  bool ended() const { return ended_.load(); }

  // The call in hand, if there is one, is finished with UNAVAILABLE, and every later one.
  void StopCalls() {
    MutexLock lock(&mu_);
    stopping_ = true;
    if (shared_call_ != nullptr) shared_call_->Finish(Stopping());
  }
  void Cut() {
    cut_.store(true);
    MutexLock lock(&mu_);
    if (shared_link_ != nullptr) shared_link_->Shutdown();
  }

 private:
  void Serve(int socket) {
    absl::StatusOr<std::shared_ptr<ShmLink>> link =
        ShmLink::Offer(socket, server_->options_.geometry);
    if (!link.ok()) {
      LOG(WARNING) << "a connection through shared memory was refused: " << link.status();
      return;
    }
    link_ = *std::move(link);
    {
      MutexLock lock(&mu_);
      shared_link_ = link_;
      if (cut_.load()) link_->Shutdown();
    }
    writer_ = std::make_unique<ShmMessageWriter>(link_.get());
    while (Step()) {
    }
    if (call_ != nullptr) EndCall(/*cancelled=*/true);
    link_->Shutdown();
    const absl::Status error = link_->error();
    if (!error.ok()) LOG(WARNING) << error;
    MutexLock lock(&mu_);
    shared_link_.reset();
  }

  // Does what can be done, or waits. False: the connection is over.
  bool Step() {
    if (call_ == nullptr) {
      ShmLink::Frame frame;
      if (link_->Take(&frame)) return StartOrDrop(frame);
      return link_->Wait(absl::InfiniteFuture(), [this] { return link_->HasFrame(); }) ==
             ShmLink::Wake::kReady;
    }
    bool worked = RunPosted();
    worked |= PumpOut();
    if (call_ == nullptr) return true;  // it has ended well
    if (!TakeIn(&worked)) return false;
    // Who always has work never waits, and so never hears of these.
    if (worked) return !cut_.load() && absl::Now() < deadline_;
    switch (link_->Wait(
        deadline_, [this] { return CanWork(); }, waker_->fd())) {
      case ShmLink::Wake::kReady:
        return true;
      case ShmLink::Wake::kHangUp:
      case ShmLink::Wake::kDeadline:  // the client has given up by now, too
        return false;
    }
    return false;
  }

  bool CanWork() const {
    if (call_->HasWork() && !writer_->started()) return true;
    if (writer_->started() && link_->HasFreeSlot()) return true;
    if (half_closed_ && call_->reading()) return true;
    return (call_->reading() || call_->finishing()) && link_->HasFrame();
  }

  // Between calls: what the client sent for one that ended early is dropped.
  bool StartOrDrop(const ShmLink::Frame& frame) {
    if (frame.kind != ShmLink::Kind::kCallStart) {
      link_->Release(frame.slot);
      return frame.kind != ShmLink::Kind::kCallEnd;
    }
    LocalCallStart start;
    const bool parsed =
        start.ParseFromString(std::string(reinterpret_cast<const char*>(frame.data), frame.bytes));
    link_->Release(frame.slot);
    if (!parsed) return false;
    ++call_number_;
    server_->CountCalls(1);
    started_at_ = absl::Now();
    deadline_ = started_at_ + absl::Microseconds(std::max<int64_t>(start.timeout_us(), 0));
    phase_ = Phase::kOpen;
    half_closed_ = false;
    writing_ = false;
    call_ = std::make_shared<Call>(waker_, absl::StrCat("shm:pid ", link_->peer_pid()));
    method_ = server_->options_.find_method(start.method());
    reader_ = std::make_unique<ShmMessageReader>(
        link_, method_ == nullptr ? 0 : method_->max_message_bytes);
    bool stopping;
    {
      MutexLock lock(&mu_);
      shared_call_ = call_;
      stopping = stopping_;
    }
    if (stopping) {
      call_->Finish(Stopping());
    } else if (method_ == nullptr) {
      call_->Finish(absl::UnimplementedError(absl::StrCat("no method ", start.method())));
    } else {
      handler_ = method_->factory();
      handler_->OnStart(call_);
    }
    return true;
  }

  bool RunPosted() {
    std::function<void()> f;
    bool worked = false;
    while (call_->TakePosted(&f)) {
      f();
      f = nullptr;
      worked = true;
    }
    return worked;
  }

  // Messages, then the reply, then the end, as far as there are slots.
  bool PumpOut() {
    bool worked = false;
    while (true) {
      if (writer_->started()) {
        if (!link_->HasFreeSlot()) return worked;
        worked = true;
        if (!writer_->Pump()) return worked;
        if (phase_ == Phase::kEnd) {
          EndCall(/*cancelled=*/false);
          return true;
        }
        if (writing_) {
          writing_ = false;
          if (call_->EndWrite()) handler_->OnWritten();
        }
        continue;
      }
      grpc::ByteBuffer message;
      if (call_->TakeOutgoing(&message)) {
        writing_ = true;
        Count(message);
        writer_->Start(message);
      } else if (!call_->finishing()) {
        return worked;
      } else if (phase_ == Phase::kOpen) {
        phase_ = Phase::kReply;
        link_->SetEnded(call_number_);
        if (call_->TakeReply(&message)) {
          Count(message);
          writer_->Start(message);
        }
      } else {
        phase_ = Phase::kEnd;
        const absl::Status status = call_->final_status();
        LocalCallEnd end;
        end.set_code(static_cast<int>(status.code()));
        end.set_message(std::string(status.message().substr(0, kMaxErrorBytes)));
        writer_->Start(ShmLink::Kind::kCallEnd, end.SerializeAsString());
      }
      worked = true;
    }
  }

  void Count(const grpc::ByteBuffer& message) {
    if (method_ != nullptr && method_->metrics != nullptr) method_->metrics->Sent(message.Length());
  }

  // At most one message, if the handler wants one; everything, once the call is finished, so that
  // a client in the middle of sending comes to know. False: the client broke the rules.
  bool TakeIn(bool* worked) {
    ShmLink::Frame frame;
    while (true) {
      if (half_closed_ && call_->reading()) {
        *worked = true;
        if (call_->EndRead()) handler_->OnHalfClose();
        return true;
      }
      if (!call_->reading() && !call_->finishing()) return true;
      if (!link_->Take(&frame)) return true;
      *worked = true;
      if (half_closed_) {  // nothing comes after it
        link_->Release(frame.slot);
        return false;
      }
      const bool wanted = call_->reading();
      switch (frame.kind) {
        case ShmLink::Kind::kMessage:
        case ShmLink::Kind::kMessageEnd:
          if (!wanted) {
            link_->Release(frame.slot);
            break;
          }
          switch (reader_->Add(frame)) {
            case ShmMessageReader::Result::kMore:
              break;
            case ShmMessageReader::Result::kTooLong:
              call_->EndRead();
              call_->Finish(absl::ResourceExhaustedError(
                  absl::StrCat("message of at least ", reader_->bytes(), " bytes; at most ",
                               method_->max_message_bytes, " are accepted")));
              reader_->Clear();
              break;
            case ShmMessageReader::Result::kComplete: {
              if (method_->metrics != nullptr) method_->metrics->Received(reader_->bytes());
              grpc::ByteBuffer message = reader_->Message();
              if (call_->EndRead()) handler_->OnMessage(std::move(message));
              return true;
            }
          }
          break;
        case ShmLink::Kind::kHalfClose:
          link_->Release(frame.slot);
          half_closed_ = true;
          break;
        case ShmLink::Kind::kCallStart:
        case ShmLink::Kind::kCallEnd:
          link_->Release(frame.slot);
          return false;
      }
    }
  }

  void EndCall(bool cancelled) {
    {
      MutexLock lock(&mu_);
      shared_call_.reset();
    }
    if (handler_ != nullptr) {
      handler_->OnDone(cancelled);
      handler_.reset();
    }
    if (method_ != nullptr && method_->metrics != nullptr) {
      method_->metrics->Observe(
          cancelled ? absl::StatusCode::kCancelled : call_->final_status().code(),
          absl::Now() - started_at_);
    }
    reader_.reset();
    call_->SetOver();
    call_.reset();
    server_->CountCalls(-1);
  }

  enum class Phase { kOpen, kReply, kEnd };

  ShmServer* const server_;
  const std::shared_ptr<Waker> waker_;

  // The connection's thread's own.
  std::shared_ptr<ShmLink> link_;
  std::unique_ptr<ShmMessageWriter> writer_;
  std::unique_ptr<ShmMessageReader> reader_;
  std::shared_ptr<Call> call_;
  std::unique_ptr<BulkHandler> handler_;
  const Method* method_ = nullptr;
  uint64_t call_number_ = 0;
  absl::Time started_at_;
  absl::Time deadline_ = absl::InfiniteFuture();
  Phase phase_ = Phase::kOpen;
  bool half_closed_ = false;
  bool writing_ = false;  // a message of the handler's, which hears of its end

  Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::shared_ptr<Call> shared_call_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<ShmLink> shared_link_ ABSL_GUARDED_BY(mu_);

  std::atomic<bool> cut_{false};
  std::atomic<bool> ended_{false};
  std::thread thread_;
};

absl::StatusOr<std::unique_ptr<ShmServer>> ShmServer::Start(Options options) {
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<ShmListener> listener, ShmListener::Create());
  return std::unique_ptr<ShmServer>(new ShmServer(std::move(options), std::move(listener)));
}

ShmServer::ShmServer(Options options, std::unique_ptr<ShmListener> listener)
    : options_(std::move(options)), listener_(std::move(listener)), accepting_([this] {
        SetThreadName("shm-accept");
        AcceptAll();
      }) {}

ShmServer::~ShmServer() { Shutdown(); }

void ShmServer::AcceptAll() {
  while (true) {
    const int socket = listener_->Accept();
    if (socket < 0) return;
    JoinEnded();
    MutexLock lock(&mu_);
    if (stopping_ || static_cast<int>(connections_.size()) >= options_.max_connections) {
      close(socket);
      continue;
    }
    connections_.push_back(std::make_unique<Connection>(this, socket));
  }
}

void ShmServer::JoinEnded() {
  std::list<std::unique_ptr<Connection>> ended;
  {
    MutexLock lock(&mu_);
    for (auto it = connections_.begin(); it != connections_.end();) {
      const auto next = std::next(it);
      if ((*it)->ended()) ended.splice(ended.end(), connections_, it);
      it = next;
    }
  }
}

int ShmServer::connections() const {
  MutexLock lock(&mu_);
  return static_cast<int>(std::count_if(connections_.begin(), connections_.end(),
                                        [](const auto& c) { return !c->ended(); }));
}

void ShmServer::CountCalls(int change) {
  MutexLock lock(&mu_);
  open_calls_ += change;
}

void ShmServer::StopAccepting() {
  listener_->Stop();
  MutexLock lock(&mu_);
  stopping_ = true;
  for (const auto& connection : connections_) connection->StopCalls();
}

void ShmServer::Shutdown() {
  MutexLock shutdown_lock(&shutdown_mu_);
  if (!accepting_.joinable()) return;
  StopAccepting();
  accepting_.join();
  std::list<std::unique_ptr<Connection>> connections;
  {
    MutexLock lock(&mu_);
    // Calls that were finished just now have a moment to tell their clients.
    mu_.AwaitWithTimeout(absl::Condition(this, &ShmServer::NoCalls), kFarewell);
    connections.swap(connections_);
  }
  for (const auto& connection : connections) connection->Cut();
}

}  // namespace codistill
