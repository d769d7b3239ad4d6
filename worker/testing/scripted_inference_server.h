#ifndef CODISTILL_WORKER_TESTING_SCRIPTED_INFERENCE_SERVER_H_
#define CODISTILL_WORKER_TESTING_SCRIPTED_INFERENCE_SERVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "proto/open_inference.pb.h"

namespace codistill {

// A prediction server of the Open Inference Protocol on a port of its own that answers as a test
// says. Thread-safe. Stops when destroyed, with calls under way answered UNAVAILABLE.
class ScriptedInferenceServer {
 public:
  using Answer = std::function<absl::Status(const inference::ModelInferRequest&,
                                            inference::ModelInferResponse*)>;

  // `answer` runs on the server's threads, one call at a time.
  static std::unique_ptr<ScriptedInferenceServer> Start(Answer answer);
  virtual ~ScriptedInferenceServer() = default;

  virtual std::string address() const = 0;
  // Calls that arrive from now on wait until Release, or until their caller gives up.
  virtual void Hold() = 0;
  virtual void Release() = 0;
  virtual int64_t calls() const = 0;      // arrived
  virtual int64_t cancelled() const = 0;  // given up by their caller while held
  virtual int64_t waiting() const = 0;    // held now
};

// Parts of answers.
void AddFp32Output(const std::string& name, const std::vector<int64_t>& shape,
                   absl::Span<const float> values, inference::ModelInferResponse* response);
void SetVersion(uint64_t generation, int64_t step, int64_t latest_step,
                inference::ModelInferResponse* response);
// The fp32 values of input `name` of a request; empty if there is none.
std::vector<float> Fp32Input(const inference::ModelInferRequest& request, const std::string& name);

}  // namespace codistill

#endif  // CODISTILL_WORKER_TESTING_SCRIPTED_INFERENCE_SERVER_H_
