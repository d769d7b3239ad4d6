#ifndef CODISTILL_TESTS_BENCHMARKS_KNOWN_LOAD_H_
#define CODISTILL_TESTS_BENCHMARKS_KNOWN_LOAD_H_

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "tests/benchmarks/known_group.h"

namespace codistill {

// Clients of a prediction server that has a KnownModel, each of which asks again as soon as it is
// answered. Every element of every answer is held against the version that the answer names. With
// generated protobuf code only.
class KnownLoad {
 public:
  struct Options {
    KnownModel model;
    std::string address;
    std::string name;  // of the model there
    int clients = 4;
    int64_t rows = 8;                             // of a request
    absl::Duration pause = absl::ZeroDuration();  // of a client between answer and question
  };
  explicit KnownLoad(Options options);
  ~KnownLoad();  // Stop()

  struct Answered {
    absl::Time asked;
    absl::Duration latency;
    int64_t step = 0;
  };
  struct Result {
    std::vector<Answered> answered;  // right, by client and time
    int64_t failed = 0;              // not answered
    int64_t wrong = 0;               // answers that are not one version's
    std::string error;               // the first of either
  };
  // Idempotent.
  Result Stop();

  // Newest step that any answer named.
  int64_t newest_step() const { return newest_step_; }
  int64_t answers() const { return answers_; }

 private:
  void Run(int client);
  void Fail(int64_t Result::*count, const std::string& error);

  const Options options_;
  std::atomic<bool> stopping_{false};
  std::atomic<int64_t> newest_step_{-1};
  std::atomic<int64_t> answers_{0};
  Mutex mu_;
  Result result_ ABSL_GUARDED_BY(mu_);
  std::vector<std::thread> threads_;
};

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_KNOWN_LOAD_H_
