#ifndef CODISTILL_TESTS_BENCHMARKS_KNOWN_ANSWERS_LOAD_H_
#define CODISTILL_TESTS_BENCHMARKS_KNOWN_ANSWERS_LOAD_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "grpcpp/channel.h"
#include "grpcpp/support/byte_buffer.h"

// A cheap client of a prediction server, for measuring: requests are encoded around the examples,
// and one thread keeps as many open as it is told.
namespace codistill {

// Examples and the logits that a model gives of them, one row each.
struct KnownAnswers {
  std::string model;
  std::string input;           // its name
  std::vector<int64_t> shape;  // of one example
  int64_t classes = 0;
  std::vector<float> examples;
  std::vector<float> logits;

  int64_t rows() const { return static_cast<int64_t>(logits.size()) / classes; }
  int64_t width() const { return static_cast<int64_t>(examples.size()) / rows(); }
};

class KnownAnswersLoad {
 public:
  // `connections`: clients, as far as the server can tell. `known` outlives this object.
  KnownAnswersLoad(const std::string& address, int connections, const KnownAnswers* known);
  ~KnownAnswersLoad();

  struct Options {
    int requests = 0;
    int64_t rows = 1;   // of each request
    int in_flight = 1;  // requests open at a time, spread over the connections
    // With ids of the examples for the cache: of row r of request i, the example's own number plus
    // `first_id`, if `repeat`; else one that was never used.
    bool with_ids = false;
    bool repeat = false;
    int64_t first_id = 0;
    bool may_be_refused = false;  // RESOURCE_EXHAUSTED is counted and no error
    // Looks for answers without sleeping, so that its own core has not halted when one comes.
    bool stay_awake = false;
  };
  struct Result {
    double seconds = 0;
    std::vector<double> latencies;  // of answered requests, in seconds
    int64_t answered = 0;
    int64_t refused = 0;
    int64_t hinted = 0;          // of the refused, with a delay after which to come again
    uint64_t payload_bytes = 0;  // of logits
  };
  // Every answer is compared with what is known, every element; a wrong one is an error.
  absl::StatusOr<Result> Run(const Options& options);

 private:
  struct Call;
  grpc::ByteBuffer Request(const Options& options, int64_t index);
  absl::Status Check(const Options& options, int64_t index, grpc::ByteBuffer response,
                     Result* result) const;

  const KnownAnswers* const known_;
  std::vector<std::shared_ptr<grpc::Channel>> channels_;
  int64_t next_id_;
};

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_KNOWN_ANSWERS_LOAD_H_
