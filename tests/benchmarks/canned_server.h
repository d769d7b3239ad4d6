#ifndef CODISTILL_TESTS_BENCHMARKS_CANNED_SERVER_H_
#define CODISTILL_TESTS_BENCHMARKS_CANNED_SERVER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "control/child_process.h"
#include "proto/job.pb.h"

namespace codistill {

// tests/benchmarks/canned_inference_server.cc as a child process: a teacher who answers from bytes
// made once.
class CannedServer {
 public:
  // `outputs`: as its flag has it. `core`: on which it stays, and the caller with it; kAnyCore: on
  // none.
  static absl::StatusOr<std::unique_ptr<CannedServer>> Start(const std::string& outputs,
                                                             double sleep_seconds, int core);
  ~CannedServer();
  const std::string& address() const { return address_; }

 private:
  ChildProcess process_;
  std::string address_;
};

// `job` with a teacher at `address`, asked as our own servers are.
JobConfig Taught(JobConfig job, const std::string& name, const std::string& address);

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_CANNED_SERVER_H_
