#ifndef CODISTILL_TESTS_BENCHMARKS_PINNED_PROCESS_H_
#define CODISTILL_TESTS_BENCHMARKS_PINNED_PROCESS_H_

#include <sys/types.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "control/child_process.h"
#include "nlohmann/json.hpp"

// Processes that stay on one core.
namespace codistill {

// For StartPinned: not pinned at all.
inline constexpr int kAnyCore = -1;

// Starts `binary` on one core, with its log beside `ready_file`, and waits until it has written
// that file. The calling thread's own core is restored to `own_core` (or kAnyCore).
absl::StatusOr<ChildProcess> StartPinned(const std::vector<std::string>& argv,
                                         const std::string& ready_file, int core, int own_core);

// A child with libtorch on one thread, driven through pipes: a line for each question, a line of
// JSON for each answer. Computes only while it is asked.
class PipedProcess {
 public:
  // OK once it has said its first line. `core` may be kAnyCore.
  static absl::StatusOr<std::unique_ptr<PipedProcess>> Start(const std::vector<std::string>& args,
                                                             int core);
  ~PipedProcess();  // ends it

  absl::StatusOr<nlohmann::json> Ask(const std::string& line);

 private:
  PipedProcess(pid_t pid, std::FILE* to, std::FILE* from) : pid_(pid), to_(to), from_(from) {}
  absl::StatusOr<nlohmann::json> ReadLine();

  const pid_t pid_;
  std::FILE* const to_;
  std::FILE* const from_;
};

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_PINNED_PROCESS_H_
