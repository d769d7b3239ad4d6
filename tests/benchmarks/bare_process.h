#ifndef CODISTILL_TESTS_BENCHMARKS_BARE_PROCESS_H_
#define CODISTILL_TESTS_BENCHMARKS_BARE_PROCESS_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "tests/benchmarks/pinned_process.h"

namespace codistill {

// bare_loop as a child process, pinned to one core and with libtorch on one thread, driven through
// pipes. Computes only while Run waits for it.
class BareProcess {
 public:
  struct Options {
    std::string binary;
    int core = 1;
    std::string job;  // path of a resolved job file
    std::string data_dir;
    int batches = 0;     // steps it can run in all
    int chunk_rows = 0;  // of the loss; 0 = all at once
    bool optimize_graph = false;
    std::string device;  // empty: the CPU, and each batch is taken once
  };
  // OK once it has its batches.
  static absl::StatusOr<std::unique_ptr<BareProcess>> Start(const Options& options);

  struct Result {
    double seconds = 0;            // by the clock
    double processor_seconds = 0;  // of its core
    std::vector<double> losses;    // of each step
  };
  absl::StatusOr<Result> Run(int steps);

 private:
  explicit BareProcess(std::unique_ptr<PipedProcess> process) : process_(std::move(process)) {}

  const std::unique_ptr<PipedProcess> process_;
};

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_BARE_PROCESS_H_
