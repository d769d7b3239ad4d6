#ifndef CODISTILL_WORKER_INFERENCE_CHANNEL_H_
#define CODISTILL_WORKER_INFERENCE_CHANNEL_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/inference_messages.h"

namespace codistill {

// Asks prediction servers without waiting for their answers. Thread-safe.
class InferenceChannel {
 public:
  using Done = std::function<void(absl::StatusOr<InferenceAnswer>)>;

  // One question on its way.
  class Call {
   public:
    virtual ~Call() = default;
    // `Done` gets CANCELLED soon, unless the answer has come already. Any thread, any time.
    virtual void Cancel() = 0;
  };

  // Over gRPC, one connection an address, made at once in the background so that the first question
  // does not pay for it. Answers arrive, and are copied out of their messages, on one thread.
  static std::unique_ptr<InferenceChannel> Create(const std::vector<std::string>& addresses);
  // Cancels what is under way and returns when every `Done` has run.
  virtual ~InferenceChannel() = default;

  // One attempt, towards addresses[endpoint]. `done` runs exactly once, on a thread of the channel,
  // never within Ask; it must not wait. Errors are the server's, or DEADLINE_EXCEEDED, CANCELLED,
  // UNAVAILABLE (no connection), INVALID_ARGUMENT (a malformed answer).
  virtual std::shared_ptr<Call> Ask(int endpoint, InferenceQuestion question, absl::Time deadline,
                                    Done done) = 0;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_INFERENCE_CHANNEL_H_
