#ifndef CODISTILL_PREDSERVER_INFERENCE_STREAM_H_
#define CODISTILL_PREDSERVER_INFERENCE_STREAM_H_

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/rpc/call_registry.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"

namespace codistill {

// A bidirectional call on which every message is a request that is answered by one message, in the
// order in which answers come. What is under way is bounded: while so many requests are unanswered,
// or answers unread, that there is no room for another, the next request is not read, and gRPC's
// flow control holds the client up.
//
// Ends with OK when the client has closed its side and everything is answered; else by the client's
// cancellation or deadline (CANCELLED) or a broken connection: answers that come later go nowhere.
// After CallRegistry::FinishAll no more requests are read, and the stream ends, UNAVAILABLE, when
// all that were are answered and the client has taken the answers; who shuts down sets a client
// that does not a deadline. Thread-safe.
class InferenceStream final : public ParkedCall,
                              public std::enable_shared_from_this<InferenceStream> {
 public:
  struct Limits {
    // Requests under way: not answered yet, or with an answer that was not sent.
    int requests = 16;
    // Bytes that those take, their answers included. An answer that is still to come is taken to be
    // as large as the largest so far. A stream without anything under way always reads.
    size_t bytes = size_t{64} << 20;
  };
  using Respond = std::function<void(grpc::ByteBuffer response)>;
  // Called for one request at a time, on gRPC's threads: must not block. Calls `respond` once, now
  // or later; what keeps the request must not outlive that.
  using Handler = std::function<void(const std::shared_ptr<InferenceStream>& stream,
                                     grpc::ByteBuffer request, Respond respond)>;

  // At the beginning of the service's method. `registry` outlives the call.
  static std::shared_ptr<InferenceStream> Start(grpc::CallbackServerContext* context, Limits limits,
                                                Handler handler, CallRegistry* registry);

  // What the method returns; only for that.
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* reactor() const;

  absl::Time deadline() const { return deadline_; }
  // Whether the stream has ended without us: answers would go nowhere.
  bool ended() const;
  // Requests under way.
  int under_way() const;

  void EndForShutdown(const absl::Status& status) override;

 private:
  class Reactor;

  InferenceStream(absl::Time deadline, Limits limits, Handler handler, CallRegistry* registry);
  void ReadDone(bool ok);
  void Written(bool ok);
  void Answer(size_t request_bytes, grpc::ByteBuffer response);
  void End(const absl::Status& status);
  bool HasRoom() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Proceed();

  const absl::Time deadline_;
  const Limits limits_;
  const Handler handler_;
  CallRegistry* const registry_;
  Reactor* reactor_ = nullptr;
  grpc::ByteBuffer incoming_;  // gRPC's while reading_
  grpc::ByteBuffer outgoing_;  // gRPC's while writing_

  mutable Mutex mu_;
  bool reading_ ABSL_GUARDED_BY(mu_) = false;        // until the handler has taken the request
  bool starting_read_ ABSL_GUARDED_BY(mu_) = false;  // a thread is about to
  bool half_closed_ ABSL_GUARDED_BY(mu_) = false;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool closing_ ABSL_GUARDED_BY(mu_) = false;  // ends, with end_, when everything is answered
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status end_ ABSL_GUARDED_BY(mu_);
  int unanswered_ ABSL_GUARDED_BY(mu_) = 0;
  size_t request_bytes_ ABSL_GUARDED_BY(mu_) = 0;  // of the unanswered
  std::deque<grpc::ByteBuffer> waiting_ ABSL_GUARDED_BY(mu_);
  size_t response_bytes_ ABSL_GUARDED_BY(mu_) = 0;  // waiting, and being written
  size_t largest_response_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_INFERENCE_STREAM_H_
